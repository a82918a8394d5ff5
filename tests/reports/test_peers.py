"""What the report says of peers."""

import json
from pathlib import Path
from typing import Any

import pytest

from fastft.errors import DataError
from reports import build_report
from reports.peers import peers_files, peers_tables

GIB = 2**30
HOSTILE = "<script>alert('x')</script> | `code`"


def run(name: str, step_ms: float, peak: float | None = 4.0, **changes: Any) -> dict[str, Any]:
    answer = {
        "version": "1.2", "step_time_ms": [step_ms] * 3, "loss": [12.5915, 12.5], "model_bytes": GIB,
        "peak_bytes": None if peak is None else int(peak * GIB), "trainable_parameters": 7, "batches_sha256": "a",
    }  # fmt: skip
    facts = {"implementation": name, "turn": 0, "memory_cap_bytes": None, "answer": answer, "problem": ""}
    return {**facts, **changes}


def result(*runs: dict[str, Any], recomputation: str = "own") -> dict[str, Any]:
    config = {"model": "llama-3-8b", "quantization": "nf4", "batch_size": 4, "sequence_tokens": 2048}
    device = {"kind": "cuda", "name": "H200"}
    return {"config": config, "device": device, "recomputation": recomputation, "runs": list(runs)}


def rows(folder: Path, found: dict[str, Any]) -> list[tuple[Any, ...]]:
    file = folder / "peers.json"
    file.write_text(json.dumps(found))
    (table,) = peers_tables(peers_files([folder]))
    assert {sum(cell.columns for cell in row) for row in table.rows} == {len(table.columns)}
    return list(table.rows)


def test_a_row_an_implementation_and_by_how_much_fastft_is_faster(tmp_path):
    unsloth, ours = rows(
        tmp_path,
        result(
            run("unsloth", 800.0, 7.8), run("fastft", 500.0, 7.6, memory_cap_bytes=int(7.8 * GIB)),
            run("unsloth", 840.0, 7.9), run("fastft", 500.0, 7.5, memory_cap_bytes=int(7.8 * GIB)),
        ),
    )  # fmt: skip
    assert [cell.text for cell in unsloth] == ["unsloth 1.2", "9,990", "7.90", "1.64×", "12.5915"]
    assert unsloth[1].detail == "9,752–10,240"
    assert [cell.text for cell in ours] == ["fastft 1.2", "16,380", "7.60", "—", "12.5915"]
    assert ours[2].detail == "cap 7.80"


def test_what_failed_says_why_and_what_did_other_work_is_marked(tmp_path):
    lost, other, _ = rows(
        tmp_path,
        result(
            run("unsloth", 1.0, answer=None, problem="it is lost"), run("peft", 900.0, problem="its first loss is 3"),
            run("fastft", 500.0),
        ),
    )  # fmt: skip
    assert (lost[1].text, lost[1].detail, lost[1].tone) == ("failed", "it is lost", "bad")
    assert (other[0].detail, other[0].tone, other[3].text) == ("its first loss is 3", "bad", "1.80×")


def test_without_fastft_and_on_a_cpu_there_is_no_ratio_and_no_peak(tmp_path):
    (row,) = rows(tmp_path, result(run("peft", 900.0, None), recomputation="none"))
    assert [cell.text for cell in row] == ["peft 1.2", "9,102", "—", "—", "12.5915"]


def test_peers_are_a_section(tmp_path):
    rows(tmp_path, result(run("unsloth", 1.0, answer=None, problem=HOSTILE), run("fastft", 500.0)))
    made = build_report([tmp_path], tmp_path / "page")
    markdown, page = made.markdown.read_text(), made.html.read_text()
    title = "llama-3-8b in nf4, 4 × 2,048 tokens, each one's own checkpointing, on H200"
    assert f"## Peers\n\n### {title}\n" in markdown
    assert "- **Peers.** " in markdown
    assert "peers.json |" in markdown.rpartition("## Sources")[2]
    assert '<section id="peers">' in page
    assert "<script" not in markdown + page
    assert made.headline.startswith("Peers: llama-3-8b")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"runs": [{}], "config": {}}'])
def test_what_is_no_result_is_refused(text, tmp_path):
    (tmp_path / "peers.json").write_text(text)
    with pytest.raises(DataError, match=r"cannot read .*peers\.json.*python -m bench peers"):
        peers_tables(peers_files([tmp_path]))
