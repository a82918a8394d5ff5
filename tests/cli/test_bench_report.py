"""`fastft bench` and `fastft report`: workers run in this process, records are real."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.messages import Answer, GateRequest
from bench.worker import run_gate, run_repetition
from fastft.errors import MeasureError
from fastft.record import Record, read_records, write_records

Cli = Callable[..., Any]

SCENARIO = """
name = "small"
arms = ["peft", "eager"]
repetitions = 1
warmup_steps = 1
steps = 2
data = "random"
[config]
model = "toy-llama"
batch_size = 4
sequence_tokens = 16
device = "cpu"
"""


@pytest.fixture
def scenario(work: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A scenario's file; its workers run here."""
    (work / "small.toml").write_text(SCENARIO)

    def answer(request: Any, **_: Any) -> Answer:
        if isinstance(request, GateRequest):
            return Answer(gate=run_gate(request))
        return Answer(record=run_repetition(request))

    monkeypatch.setattr("bench.runner.ask_worker", answer)
    return "small.toml"


def test_a_bench_prints_the_comparison_and_where_the_records_are(cli: Cli, scenario: str, work: Path) -> None:
    result = cli("bench", scenario, "--output", "out", "--rank", "4", "--repetitions", "2")
    assert result.exit_code == 0, result.stderr
    records = read_records(work / "out" / "records.jsonl")
    assert len(records) == 4
    assert {record.lora["rank"] for record in records} == {4}
    *_, headline, where = result.stdout.splitlines()
    assert headline.startswith("small: eager is ")
    assert where == "records: out/records.jsonl; a page of them: fastft report out"
    for title in ("Against stock PEFT:", "Speed and memory:", "Quality:"):
        assert title in result.stdout
    for record in records:
        assert (
            f"{record.arm}: repetition {record.repetition + 1}: {record.tokens_per_second():,.0f} tokens/s"
            in result.stderr
        )

    page = cli("report", "out", "--json")
    built = json.loads(page.stdout)
    assert built["headline"] == headline
    assert Path(built["html"]) == Path("out/report/report.html")
    assert (work / built["markdown"]).is_file()
    assert "no ratio" not in built["headline"]


def test_json_and_the_folder_by_default(cli: Cli, scenario: str, work: Path) -> None:
    answer = json.loads(cli("bench", scenario, "--arms", "peft,eager", "--json").stdout)
    file = Path(answer["records"])
    assert file.parts[0] == "runs"
    assert file.parts[1].startswith("small-2")
    assert len(read_records(work / file)) == 2
    (comparison,) = answer["comparisons"]
    assert (comparison["arm"], comparison["baseline"], comparison["withheld"]) == ("eager", "peft", [])
    assert comparison["tokens_per_second"]["value"] > 0


def test_arms_without_stock_are_compared_with_the_first(cli: Cli, scenario: str) -> None:
    result = cli("bench", scenario, "--arms", "eager", "--output", "out")
    assert result.exit_code == 0
    assert "no baseline to compare with" in result.stdout


def test_an_arm_that_failed_is_shown_and_is_an_error(
    cli: Cli, scenario: str, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(request: Any, **_: Any) -> Answer:
        if isinstance(request, GateRequest):
            return Answer(gate=run_gate(request))
        if request.arm == "eager":
            raise MeasureError("the worker was killed", got="SIGKILL")
        return Answer(record=run_repetition(request))

    monkeypatch.setattr("bench.runner.ask_worker", answer)
    result = cli("bench", scenario, "--output", "out")
    assert result.exit_code == 8
    assert "small: no ratio for eager: " in result.stdout
    assert result.stderr.splitlines()[-1] == (
        "error: arm eager was not measured; got the worker was killed; got SIGKILL; "
        "fix: see the logs beside the records"
    )
    assert len(read_records(work / "out" / "records.jsonl")) == 2


def test_an_interrupted_bench_says_where_its_records_are(
    cli: Cli, scenario: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> Answer:
        raise KeyboardInterrupt

    monkeypatch.setattr("bench.runner.ask_worker", interrupted)
    result = cli("bench", scenario, "--output", "out")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "interrupted; the records so far are in out"


def records(arm: str) -> list[Record]:
    return [
        Record(
            run_id="r", scenario="s", arm=arm, backend=arm, repetition=n, seed=n, status="ok", loss=[1.0, 0.9],
            gradient_norm=[1.0, 1.0], step_time_ms=[10.0, 10.0], step_tokens=[100, 100], batch_sha256=["a", "b"],
        )
        for n in range(3)
    ]  # fmt: skip


def test_a_report_needs_no_torch(work: Path) -> None:
    write_records(work / "runs" / "records.jsonl", records("peft") + records("eager"))
    code = """
import sys
from fastft.cli import main
try:
    main(["report", "runs", "--output", "page", "--title", "Mine"])
finally:
    if "torch" in sys.modules:
        sys.exit("imported torch")
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=work, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("report in page/report.html: s: ")
    assert "<title>Mine" in (work / "page" / "report.html").read_text()


def test_a_report_replaces_one_only_if_told(cli: Cli, work: Path) -> None:
    write_records(work / "runs" / "records.jsonl", records("peft") + records("eager"))
    assert cli("report", "runs/records.jsonl").exit_code == 0
    first = (work / "runs" / "report" / "report.html").read_bytes()
    again = cli("report", "runs", "--title", "Second")
    assert again.exit_code == 7
    assert "the report folder is not empty" in again.stderr
    assert (work / "runs" / "report" / "report.html").read_bytes() == first
    assert cli("report", "runs", "--title", "Second", "--force").exit_code == 0
    assert (work / "runs" / "report" / "report.html").read_bytes() != first


def test_another_baseline(cli: Cli, work: Path) -> None:
    write_records(work / "a.jsonl", records("eager") + records("peft"))
    result = cli("report", "a.jsonl", "--baseline", "eager", "--output", "page")
    assert "peft is 1.00× eager" in result.stdout
    unknown = cli("report", "a.jsonl", "--baseline", "eagr", "--output", "other")
    assert unknown.exit_code == 2
    assert "did you mean 'eager'?" in unknown.stderr
    assert not (work / "other").exists()
