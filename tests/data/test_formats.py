"""fastft.data.formats: every format, and every way in which a file can be wrong."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastft.data.formats import Conversation, Message, conversation_of, load_rows
from fastft.errors import DataError

ROWS = {
    "instruction": {"instruction": "Add", "input": "1 2", "output": "3"},
    "messages": {"messages": [{"role": "user", "content": "Add\n\n1 2"}, {"role": "assistant", "content": "3"}]},
    "conversations": {"conversations": [{"from": "human", "value": "Add\n\n1 2"}, {"from": "gpt", "value": "3"}]},
    "question": {"question": "Add\n\n1 2", "answer": "3"},
}


def write(folder: Path, *lines: object, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_every_format_gives_the_same_conversation(tmp_path: Path, row: dict[str, object]) -> None:
    path = write(tmp_path, row, "\n", {"id": "ignored", **row})
    first, second = load_rows(path)
    assert first.messages == second.messages == (Message("user", "Add\n\n1 2"), Message("assistant", "3"))
    assert (first.where, second.where) == (f"{path}:1", f"{path}:3")


def test_sharegpt_names_are_mapped() -> None:
    turns = [("system", "s"), ("user", "q"), ("assistant", "a"), ("human", "q"), ("gpt", "a")]
    row = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    roles = [message.role for message in conversation_of(row, where="x").messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]


@pytest.mark.parametrize("row", [{"instruction": "Add", "output": "3"}, {**ROWS["instruction"], "input": ""}])
def test_an_absent_input_leaves_the_instruction_alone(row: dict[str, str]) -> None:
    assert conversation_of(row, where="x").messages[0] == Message("user", "Add")


def test_a_json_list_is_read_and_its_rows_keep_their_lines(tmp_path: Path) -> None:
    rows = [ROWS["question"], {**ROWS["question"], "id": "2"}]
    path = write(tmp_path, json.dumps(rows, indent=1), name="rows.json")
    lines = path.read_text().splitlines()
    assert [row.where for row in load_rows(path)] == [
        f"{path}:{number}" for number, line in enumerate(lines, 1) if line.strip() == "{"
    ]


def test_json_lines_under_a_json_name_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS["question"]).encode() + b"\r\n")
    assert len(load_rows(path)) == 1


@given(st.text(min_size=1).filter(str.strip))
def test_any_text_survives(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    """Line separators such as U+2028 are legal inside a JSON string and end no line."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    row = {"question": text, "answer": text}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n" + json.dumps(row) + "\n", newline="")
    assert [each.messages[1].content for each in load_rows(path)] == [text, text]


GOOD = ROWS["question"]
BAD_ROWS = {
    "malformed": ('{"question": \n', "is not JSON"),
    "a list": ("3\n", "is not an object"),
    "unknown format": ({"prompt": "q", "completion": "a"}, "has no known format"),
    "two formats": ({**ROWS["question"], "messages": []}, "several formats"),
    "unknown key": ({**GOOD, "image": "a.png"}, "unknown keys; got image"),
    "missing answer": ({"question": "q"}, "has no 'answer'"),
    "empty answer": ({"question": "q", "answer": " \n"}, "empty answer"),
    "answer not text": ({"question": "q", "answer": 3}, "'answer' is not text"),
    "other format": (ROWS["instruction"], "mixes formats"),
    "half a character": ('{"question": "q", "answer": "\\ud800"}\n', "surrogate"),
    "too deep": ("[" * 100_000 + "\n", "nested too deeply"),
}


@pytest.mark.parametrize(("row", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_named_by_its_line(tmp_path: Path, row: object, message: str) -> None:
    path = write(tmp_path, GOOD, row)
    with pytest.raises(DataError) as caught:
        load_rows(path)
    assert f"{path}:2" in str(caught.value)
    assert message in str(caught.value)
    assert caught.value.fix


BAD_MESSAGES = {
    "not a list": ("hello", "not a list of turns"),
    "empty": ([], "not a list of turns"),
    "not an object": (["hello"], "turn 1 is not a turn"),
    "unknown key": ([{"role": "user", "content": "q", "name": "x"}], "turn 1 is not a turn"),
    "unknown role": ([{"role": "tool", "content": "q"}], "unknown role"),
    "content of parts": ([{"role": "user", "content": [{"type": "text", "text": "q"}]}], "'content' is not text"),
    "no answer": ([{"role": "user", "content": "q"}], "has no answer"),
    "answer first": ([{"role": "assistant", "content": "a"}], "begins with an answer"),
}


@pytest.mark.parametrize(("messages", "message"), BAD_MESSAGES.values(), ids=BAD_MESSAGES)
def test_bad_messages_are_refused(messages: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        conversation_of({"messages": messages}, where="rows.jsonl:1")


def test_an_unknown_key_lists_the_formats() -> None:
    with pytest.raises(DataError) as caught:
        conversation_of({**GOOD, "image": "a.png"}, where="rows.jsonl:1")
    assert all(f'"{name}"' in str(caught.value) for name in ROWS)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "empty"), (b" \n\n", "empty"), (b"[ ]", "empty list"), (b'{"question": "q"}\n\xff\n', ":2 is not UTF-8")],
)
def test_a_bad_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    # The first row of the last case is incomplete as well: the encoding is judged before any row.
    with pytest.raises(DataError, match=message):
        load_rows(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(DataError, match="cannot read the data file"):
            load_rows(path)


def test_a_malformed_list_names_the_line(tmp_path: Path) -> None:
    path = write(tmp_path, '[\n{"question": "q", "answer": "a"}\n{}\n]', name="rows.json")
    with pytest.raises(DataError, match=r"rows\.json:3 is not JSON"):
        load_rows(path)


def test_no_conversation_without_an_answer_can_exist() -> None:
    with pytest.raises(DataError, match="no answer"):
        Conversation((), "here")
