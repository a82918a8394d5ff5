"""What the report says of memory measures, with records beside them and without."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fastft.errors import DataError
from reports import build_report
from reports.measures import measures_files, measures_tables

GIB = 2**30
HOSTILE = "<script>alert('x')</script> | `code`"


def one(name: str, tokens_per_second: float, peak: float, predicted: float, **changes: Any) -> dict[str, Any]:
    return {
        "name": name, "description": f"what {name} does", "verdict": "ok", "detail": "",
        "tokens_per_second": tokens_per_second, "turn_tokens_per_second": [tokens_per_second] * 3,
        "peak_bytes": int(peak * GIB), "predicted_peak_bytes": int(predicted * GIB), **changes,
    }  # fmt: skip


def failed(name: str, **changes: Any) -> dict[str, Any]:
    facts = {"verdict": "out_of_memory", "detail": "OutOfMemoryError: 3 GiB", "tokens_per_second": None}
    return {**one(name, 1.0, 1.0, 30.0), "peak_bytes": None, **facts, **changes}


LIGHT = one("light", 16_000.0, 30.0, 30.6)


def result(*results: dict[str, Any], kind: str = "cuda", name: str = "H200") -> dict[str, Any]:
    config = {"model": "llama-3-8b", "quantization": "nf4", "batch_size": 4, "sequence_tokens": 2048}
    return {"config": config, "device": {"kind": kind, "name": name}, "results": list(results)}


def rows(folder: Path, found: dict[str, Any]) -> list[tuple[Any, ...]]:
    file = folder / "measures.json"
    file.write_text(json.dumps(found))
    (table,) = measures_tables([file])
    assert {sum(cell.columns for cell in row) for row in table.rows} == {len(table.columns)}
    return list(table.rows)


def test_a_row_a_measure_against_the_first(tmp_path):
    light, full, dense = rows(
        tmp_path, result(LIGHT, one("full", 12_000.0, 9.0, 9.0), one("dense", 16_800.0, 43.0, 42.57))
    )
    assert (light[0].text, light[0].detail) == ("light", "what light does")
    assert [cell.text for cell in light[1:]] == ["16,000", "1.00×", "30.00", "0.00", "30.60"]
    assert [cell.text for cell in full[1:]] == ["12,000", "0.750×", "9.00", "21.00", "9.00"]
    assert [cell.text for cell in dense[1:]] == ["16,800", "1.05×", "43.00", "−13.00", "42.57"]
    assert [row[5].detail for row in (light, full, dense)] == ["+2.0 %", "0.0 %", "−1.0 %"]
    assert not any(cell.tone for row in (light, full, dense) for cell in row)


@pytest.mark.parametrize(
    ("predicted", "kind", "detail", "tone"),
    [
        (10.49, "cuda", "+4.9 %", ""),
        (10.51, "cuda", "+5.1 %, over 5 %", "warn"),
        (9.81, "cuda", "−1.9 %", ""),
        (9.79, "cuda", "−2.1 %, more than 2 % under", "warn"),
        (9.0, "cpu", "−10.0 %", ""),
    ],
)
def test_a_prediction_that_misses_on_a_gpu_is_marked(predicted, kind, detail, tone, tmp_path):
    _, row = rows(tmp_path, result(LIGHT, one("full", 12_000.0, 10.0, predicted), kind=kind))
    assert (row[5].detail, row[5].tone) == (detail, tone)


def test_what_did_not_run_says_why_and_has_its_prediction(tmp_path):
    _, row = rows(tmp_path, result(LIGHT, failed("dense")))
    assert (row[1].text, row[1].detail, row[1].tone) == ("out of memory", "OutOfMemoryError: 3 GiB", "bad")
    assert row[2].text == "30.00"


def test_turns_that_differ_show_it(tmp_path):
    disturbed = one("full", 12_000.0, 9.0, 9.0, turn_tokens_per_second=[12_000.0, 1_500.0, 12_100.0])
    _, row = rows(tmp_path, result(LIGHT, disturbed))
    assert (row[1].text, row[1].detail) == ("12,000", "1,500–12,100")


def test_without_a_baseline_nothing_is_compared(tmp_path):
    baseline, row = rows(tmp_path, result(failed("light"), one("full", 12_000.0, 9.0, 9.0)))
    assert baseline[1].tone == "bad"
    assert [cell.text for cell in row[1:]] == ["12,000", "—", "9.00", "—", "9.00"]


def test_small_peaks_are_in_mib(tmp_path):
    file = tmp_path / "measures.json"
    file.write_text(json.dumps(result(one("light", 100.0, 0.5, 0.5), one("full", 90.0, 0.25, 0.25), kind="cpu")))
    (table,) = measures_tables([file])
    assert table.columns == ("Measure", "Tokens/s", "× light", "Peak, MiB", "Saved, MiB", "Predicted, MiB")
    assert [cell.text for cell in table.rows[1]] == ["full", "90.00", "0.900×", "256.00", "256.00", "256.00"]


class Text(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_data(self, data):
        self.text += data


def put(folder: Path, found: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "measures.json").write_text(json.dumps(found))
    (folder / "measures.jsonl").write_text('{"trial_file": 1}\n')


@pytest.mark.parametrize("alone", [True, False])
def test_measures_are_a_section_with_records_beside_them_or_without(alone, records, saved, tmp_path):
    folder = tmp_path / "input" if alone else saved(records(scenario="memory measures")).parent
    put(folder, result(LIGHT, failed(HOSTILE, detail=HOSTILE)))
    made = build_report([folder], tmp_path / "page")
    markdown = made.markdown.read_text()
    assert "## Memory measures\n\n### llama-3-8b in nf4, 4 × 2,048 tokens, on H200\n" in markdown
    assert "| light (what light does) | 16,000 | 1.00× | 30.00 | 0.00 | 30.60 (+2.0 %) |" in markdown
    assert "**out of memory**" in markdown
    assert "<script" not in markdown
    sources = markdown.rpartition("## Sources")[2]
    assert "measures.json |" in sources
    assert "measures.jsonl |" in sources, "what it is derived from, by its hash"
    page = Text(made.html.read_text())
    assert "script" not in page.tags
    assert HOSTILE in page.text
    assert len(page.ids) == len(set(page.ids)), "no scenario has the section's anchor"
    assert ("bootstrap" in page.text) != alone, "how records are compared is told where there are some"
    if alone:
        assert made.headline == "Memory measures of llama-3-8b in nf4, 4 × 2,048 tokens, on H200"
        assert markdown.startswith(f"# Benchmark: {made.headline}\n\n1 result\n")
        assert (made.figures, made.comparisons) == ((), ())
    else:
        assert made.headline.startswith("memory measures: eager is ")


def test_a_folder_with_neither_is_refused_beside_one_with_measures(tmp_path):
    put(tmp_path / "measures", result(LIGHT))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no records found; got .*empty"):
        build_report([tmp_path / "measures", tmp_path / "empty"], tmp_path / "page")


def test_a_report_without_measures_says_nothing_of_them(records, saved, tmp_path):
    made = build_report([saved(records())], tmp_path / "page")
    assert "Memory measures" not in made.markdown.read_text()
    assert measures_files([tmp_path]) == []


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"config": {}, "results": []}', json.dumps(result())])
def test_other_files_of_that_name_are_refused(text, tmp_path):
    (tmp_path / "measures.json").write_text(text)
    with pytest.raises(DataError, match=r"cannot read .*measures\.json.*python -m bench measures"):
        build_report([tmp_path], tmp_path / "page")
    assert not (tmp_path / "page").exists()
