"""What the report says of tuned plans: regret under caps, repeated tunings, tuned against default."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fastft.errors import DataError
from reports import build_report
from reports.regret import regret_files, regret_tables

GIB = 2**30
HOSTILE = "<script>alert('x')</script> | `code`"


def measured(
    tokens_per_second: float | None, peak_gib: float = 9.0, summary: str = "triton, 4×2 sequences"
) -> dict[str, Any]:
    return {"tokens_per_second": tokens_per_second, "peak_bytes": int(peak_gib * GIB), "summary": summary}


def cap(
    size_gib: float = 10.0, *, regret: float = 0.01, default: float = 0.02, uniform: float = 0.1, **changes: Any
) -> dict[str, Any]:
    return {
        "cap_bytes": int(size_gib * GIB), "tuned": measured(50_000.0), "default": measured(49_000.0),
        "best": measured(50_500.0), "best_uniform": measured(45_000.0), "over_cap": False, "regret": regret,
        "gain_over_default": default, "gain_over_uniform": uniform, "problem": "", **changes,
    }  # fmt: skip


def result(*caps: dict[str, Any], **changes: Any) -> dict[str, Any]:
    config = {
        "model": "qwen2-1.5b",
        "quantization": "none",
        "batch_size": 8,
        "sequence_tokens": 2048,
        "memory_cap": None,
    }
    return {
        "config": config,
        "device": {"name": "H200"},
        "grid_trials": 484,
        "grid_total": 484,
        "caps": list(caps),
        **changes,
    }


def repeats(*verdicts: str) -> dict[str, Any]:
    config = {**result()["config"], "quantization": "nf4", "memory_cap": "9GiB"}
    found = [{"verdict": verdict, "summary": f"way {number}"} for number, verdict in enumerate(verdicts)]
    return {"config": config, "device": {"name": "H200"}, "noise": 0.01, "usual": "way 0", "repetitions": found}


def rows(folder: Path, *results: dict[str, Any]) -> list[tuple[Any, ...]]:
    files = []
    for number, one in enumerate(results):
        files.append(folder / f"{number}" / "regret.json")
        files[-1].parent.mkdir()
        files[-1].write_text(json.dumps(one))
    (table,) = regret_tables(files)
    assert {sum(cell.columns for cell in row) for row in table.rows} == {len(table.columns)}
    return list(table.rows)


def test_a_row_a_cap_and_one_for_all(tmp_path):
    first, second, third, everything = rows(tmp_path, result(cap(), cap(12.5, regret=0.03)), result(cap(regret=-0.004)))
    assert first[0].text == "qwen2-1.5b, 8 × 2,048 tokens, 10.00 GiB"
    assert [cell.text for cell in first[1:]] == [
        "50,000",
        "49,000",
        "50,500",
        "45,000",
        "9.00",
        "+1.0 %",
        "+2.0 %",
        "+10.0 %",
    ]
    assert second[0].text.endswith("12.50 GiB")
    assert third[6].text == "−0.4 %"
    assert not any(cell.tone == "bad" for row in (first, second, third, everything) for cell in row)
    assert (everything[0].text, everything[0].detail) == ("All", "3 caps")
    assert (everything[6].text, everything[6].detail) == ("+1.0 %", "median; worst +3.0 %")


@pytest.mark.parametrize(
    ("changes", "column", "note"),
    [
        ({"regret": 0.051}, 6, "over 5 %"),
        ({"default": -0.011}, 7, "more than 1 % slower"),
        ({"uniform": 0.079}, 8, "under 8 %"),
        ({"over_cap": True}, 5, "over the cap"),
    ],
)
def test_what_misses_its_target_is_marked(changes, column, note, tmp_path):
    row, _ = rows(tmp_path, result(cap(**changes)))
    assert (row[column].tone, row[column].detail) == ("bad", note)
    assert [cell.tone for cell in row].count("bad") == 1


def test_a_default_that_exceeds_the_cap_is_no_rival(tmp_path):
    row, _ = rows(tmp_path, result({**cap(10.0), "default": measured(60_000.0, peak_gib=10.5)}))
    assert (row[7].text, row[7].detail, row[7].tone) == ("no ratio", "the default takes 10.50 GiB", "muted")


@pytest.mark.parametrize("changes", [{"regret": 0.05}, {"default": -0.01}, {"uniform": 0.08}])
def test_a_target_that_is_just_reached_is_reached(changes, tmp_path):
    row, _ = rows(tmp_path, result(cap(**changes)))
    assert not any(cell.tone == "bad" for cell in row)


def test_the_median_and_the_worst_have_targets_of_their_own(tmp_path):
    *_, everything = rows(tmp_path, result(cap(regret=0.021), cap(regret=0.021), cap(regret=0.06)))
    assert everything[6].tone == "bad"
    assert everything[6].detail == "median; worst +6.0 %; median over 2 %; worst over 5 %"


def test_a_cap_without_a_plan_or_with_one_that_exceeds_it_does_not_improve_the_median(tmp_path):
    none = cap(tuned=None, regret=None, problem="no plan: nothing trains under the memory cap")
    row, over, _, everything = rows(tmp_path, result(none, cap(over_cap=True, regret=-0.5), cap()))
    assert (row[1].text, row[1].tone) == ("not measured", "bad")
    assert "nothing trains" in row[1].detail
    assert over[5].tone == "bad"
    assert (everything[6].text, everything[6].tone) == ("+1.0 %", "bad")
    assert everything[0].detail == "3 caps, 2 without a regret"


def test_a_grid_that_is_not_complete_says_so(tmp_path):
    row, _ = rows(tmp_path, result(cap(), grid_trials=400))
    assert (row[0].detail, row[0].tone) == ("grid of 400 of 484", "warn")


@pytest.mark.parametrize(
    ("verdicts", "text", "tone"),
    [
        (("same",) * 5, "5 of 5", ""),
        (("same",) * 4 + ("tie",), "5 of 5", ""),
        (("same",) * 4 + ("other",), "4 of 5", "bad"),
    ],
)
def test_repeated_tunings(verdicts, text, tone, tmp_path):
    file = tmp_path / "repeats.json"
    file.write_text(json.dumps(repeats(*verdicts)))
    (table,) = regret_tables([file])
    ((run, same, usual, others),) = table.rows
    assert run.text == "qwen2-1.5b in nf4, 8 × 2,048 tokens, cap 9GiB"
    assert (same.text, same.tone) == (text, tone)
    assert usual.text == "way 0"
    assert ("(other)" in others.text) == (tone == "bad")


class Text(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data


def test_results_beside_the_records_become_tables_and_trials_are_no_records(records, saved, tmp_path):
    folder = saved(records()).parent
    one = result(cap(regret=0.06, tuned=measured(1000.0, summary=HOSTILE)))
    (folder / "regret.json").write_text(json.dumps(one))
    (folder / "repeats.json").write_text(json.dumps(repeats("same", "tie")))
    (folder / "grid.jsonl").write_text('{"trial_file": 1}\n')
    (folder / "tuner-cache" / "trials").mkdir(parents=True)
    (folder / "tuner-cache" / "trials" / "0123.jsonl").write_text('{"at": 1}\n')
    made = build_report([folder], tmp_path / "page")
    markdown = made.markdown.read_text()
    assert "## Plans" in markdown
    assert "### Tuned plans under memory caps on H200" in markdown
    assert "**+6.0 %** (over 5 %)" in markdown
    assert "### Repeated tunings on H200" in markdown
    assert "<script" not in markdown
    assert "regret.json" in markdown.rpartition("## Sources")[2]
    assert "grid.jsonl" in markdown.rpartition("## Sources")[2], "what it is derived from, by its hash"
    assert "0123.jsonl" not in markdown
    page = Text(made.html.read_text())
    assert "script" not in page.tags
    assert "Tuned plans under memory caps on H200" in page.text
    assert HOSTILE in page.text
    assert "Over default, over uniform" in page.text


def test_a_report_without_such_results_says_nothing_of_them(records, saved, tmp_path):
    made = build_report([saved(records())], tmp_path / "page")
    assert "Plans" not in made.markdown.read_text()
    assert regret_files([tmp_path]) == []


@pytest.mark.parametrize("name", ["regret.json", "repeats.json"])
@pytest.mark.parametrize("text", ["", "[]", "{}", '{"config": {}, "caps": [{}]}'])
def test_other_files_of_that_name_are_refused(name, text, records, saved, tmp_path):
    file = saved(records()).with_name(name)
    file.write_text(text)
    with pytest.raises(DataError, match=rf"cannot read .*{name}"):
        build_report([file.parent], tmp_path / "page")
    assert not (tmp_path / "page").exists()


def test_an_arm_with_a_plan_against_the_same_without(record, saved, tmp_path):
    found = []
    for scenario, slower in (("short", 1.0), ("long", 1.015)):
        for repetition in range(3):
            base = record("triton+default", repetition, backend="triton", scenario=scenario)
            times = [time * slower for time in base.step_time_ms]
            found += [base, record("triton", repetition, scenario=scenario, **work(base), step_time_ms=times)]
        found.append(record("eager", 0, scenario=scenario))
    made = build_report([saved(found)], tmp_path / "page", baseline="triton+default")
    section = made.markdown.read_text().partition("## Plans")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    assert [line.split("|")[1].strip() for line in lines] == ["long (triton, n = 3)", "short (triton, n = 3)"]
    assert "**0.985×**" in lines[0]
    assert "more than 1 % slower" in lines[0]
    assert "| 1.00×" in lines[1]
    assert "eager" not in section


def work(base: Any) -> dict[str, Any]:
    """What two arms of one repetition have in common."""
    return {name: getattr(base, name) for name in ("loss", "gradient_norm", "batch_sha256", "step_tokens", "memory")}
