"""TRL's row formats: what is taken, and what is refused by its row."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from fastft.data.formats import load_rows
from fastft.data.trl_rows import JUDGEMENT, PREFERENCE, PROMPT, SCORED_PAIR, RowFormat, check_rows, load_trl_rows
from fastft.errors import DataError


def said(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


PAIR = {"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"}
CHAT = {name: said("user" if name == "prompt" else "assistant", text) for name, text in PAIR.items()}
WHOLE = {name: [*CHAT["prompt"], *CHAT[name]] for name in ("chosen", "rejected")}
JUDGED = {"prompt": "1 + 1 =", "completion": " 2", "label": True}


def check(wanted: RowFormat, *rows: Any) -> Any:
    return check_rows([(f"rows:{number}", row) for number, row in enumerate(rows, 1)], wanted)


@pytest.mark.parametrize(
    ("wanted", "row", "conversational"),
    [
        (PREFERENCE, PAIR, False),
        (PREFERENCE, CHAT, True),
        (PREFERENCE, WHOLE, True),
        (SCORED_PAIR, {name: PAIR[name] for name in ("chosen", "rejected")}, False),
        (SCORED_PAIR, {**PAIR, "margin": 0.5}, False),
        (SCORED_PAIR, WHOLE, True),
        (JUDGEMENT, JUDGED, False),
        (JUDGEMENT, {**JUDGED, "prompt": CHAT["prompt"], "completion": CHAT["chosen"]}, True),
        (PROMPT, {"prompt": "1 + 1 =", "answer": 2}, False),
        (PROMPT, {"prompt": CHAT["prompt"]}, True),
    ],
)
def test_trls_formats_are_taken_as_they_are(wanted: RowFormat, row: dict[str, Any], conversational: bool) -> None:
    found = check(wanted, row, {**row, "id": 7})
    assert found.rows[0] == row
    assert found.conversational is conversational
    assert found.places == ["rows:1", "rows:2"]


def test_columns_that_no_method_reads_are_dropped_and_named() -> None:
    found = check(PREFERENCE, {**PAIR, "score_chosen": 9, "id": 1})
    assert found.rows == [PAIR]
    assert found.dropped == ("score_chosen",)


def test_columns_for_a_reward_function_are_kept_and_filled() -> None:
    found = check(PROMPT, {"prompt": "a", "answer": 2}, {"prompt": "b", "level": None})
    assert found.rows == [{"prompt": "a", "answer": 2, "level": None}, {"prompt": "b", "answer": None, "level": None}]
    assert found.dropped == ()


BAD: dict[str, tuple[RowFormat, list[Any], str]] = {
    "no rejected": (PREFERENCE, [PAIR, {"prompt": "a", "chosen": "b"}], "rows:2 has no 'rejected'; got columns prompt"),
    "null is missing": (PREFERENCE, [{**PAIR, "chosen": None}], "rows:1 has no 'chosen'"),
    "no prompt in texts": (PREFERENCE, [{"chosen": "a", "rejected": "b"}], "rows:1 has no 'prompt'"),
    "no label": (JUDGEMENT, [{"prompt": "a", "completion": "b"}], "rows:1 has no 'label'"),
    "no prompt": (PROMPT, [{"question": "a"}], "rows:1 has no 'prompt'; got columns question"),
    "label as a number": (JUDGEMENT, [{**JUDGED, "label": 1}], "'label' is no label; got 1; allowed: true or false"),
    "margin as text": (SCORED_PAIR, [{**PAIR, "margin": "1"}], "'margin' is no number"),
    "no object": (PROMPT, ["text"], "rows:1 is not an object"),
    "a number as prompt": (PROMPT, [{"prompt": 3}], "'prompt' is neither text nor messages; got 3"),
    "no messages": (PROMPT, [{"prompt": []}], "'prompt' is neither text nor messages"),
    "a message without content": (PROMPT, [{"prompt": [{"role": "user"}]}], "message 1 of 'prompt' is no message"),
    "an unknown role": (PROMPT, [{"prompt": said("human", "a")}], "message 1 of 'prompt' is no message"),
    "an empty answer": (PREFERENCE, [{**PAIR, "chosen": " "}], "'chosen' is empty"),
    "an answer of the user": (PREFERENCE, [{**CHAT, "chosen": said("user", "2")}], "'chosen' does not end with"),
    "text and messages": (PREFERENCE, [{**PAIR, "chosen": said("assistant", "2")}], "rows:1 mixes text and messages"),
    "another kind of row": (PREFERENCE, [PAIR, CHAT], "rows:2 is not like the rows before it"),
    "a margin in some rows": (SCORED_PAIR, [{**PAIR, "margin": 1}, PAIR], "rows:2 is not like the rows before it"),
    "a reserved name": (PROMPT, [{"prompt": "a", "completions": "b"}], "has a column 'completions'"),
    "nothing": (PROMPT, [], "the data holds no rows"),
}  # fmt: skip


@pytest.mark.parametrize(("wanted", "rows", "message"), BAD.values(), ids=BAD)
def test_a_bad_row_is_named(wanted: RowFormat, rows: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        check(wanted, *rows)


def test_json_lines_a_list_and_parquet_give_the_same_rows(tmp_path: Path) -> None:
    rows = [CHAT, {name: CHAT[name] for name in ("rejected", "chosen", "prompt")}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    lines, whole, table = (
        load_trl_rows(tmp_path / f"a.{suffix}", PREFERENCE) for suffix in ("jsonl", "json", "parquet")
    )
    assert lines.rows == whole.rows == table.rows == [CHAT, CHAT]
    assert table.places == [f"{tmp_path / 'a.parquet'}, row {number}" for number in (1, 2)]


def test_sft_reads_parquet_too(tmp_path: Path) -> None:
    rows = [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows")
    assert [[each.content for each in row.messages] for row in load_rows(tmp_path / "rows")] == [["a", "b"], ["c", "d"]]


def test_a_broken_parquet_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(DataError, match="is not parquet"):
        load_trl_rows(tmp_path / "rows", PROMPT)
