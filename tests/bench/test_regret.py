"""Regret: its arithmetic on made-up trials, and one real run of the whole command."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bench import regret as module
from bench.__main__ import app
from bench.grid import Grid, make_header
from bench.regret import FINALISTS, REGRET, compare, fitting, peaks_between, spread_caps
from bench.trial_file import TrialFile
from bench.trials import Deadline, Steps
from fastft.config import RunConfig
from fastft.errors import MeasureError
from fastft.hardware import detect_device
from fastft.plan import Choices, Evidence, Plan, Trial
from fastft.planning import model_shape, plan_key

CONFIG = RunConfig(model="toy-llama", batch_size=4, sequence_tokens=16, device="cpu")
MIB = 2**20
STEP_TOKENS = 4 * 16
BIG = 4096 * MIB
"""A cap that any process stays under."""


def choices(micro_batch: int, *placement: str) -> Choices:
    return Choices(
        backend="eager",
        micro_batch=micro_batch,
        accumulation=4 // micro_batch,
        placement=list(placement or ["light"] * 3),
    )


def trial(what: Choices, milliseconds: float, peak_mib: int, verdict: str = "ok") -> Trial:
    return Trial(
        choices=what, verdict=verdict, step_time_ms=[milliseconds] * 3,
        tokens_per_second=1000 * STEP_TOKENS / milliseconds, peak_bytes=peak_mib * MIB,
    )  # fmt: skip


A, B, C, D = choices(4), choices(2, "full", "full", "light"), choices(2, *["mlp"] * 3), choices(1, *["full"] * 3)
GRID = [trial(A, 10, 900), trial(B, 11, 600), trial(C, 13, 580), trial(D, 20, 400), trial(choices(1), 1, 50, "failed")]


def test_what_fits_comes_fastest_first():
    assert [one.choices for one in fitting(GRID)] == [A, B, C, D]
    assert [one.choices for one in fitting(GRID, 600 * MIB)] == [B, C, D]
    assert fitting(GRID, 399 * MIB) == []


def test_caps_lie_between_the_smallest_plan_and_the_free_one():
    assert peaks_between(GRID, noise=0.01) == (400 * MIB, 900 * MIB)
    assert peaks_between(GRID, noise=0.12) == (400 * MIB, 600 * MIB), "between equals the smaller is free's choice"
    assert spread_caps(400 * MIB, 900 * MIB) == [525 * MIB, 650 * MIB, 775 * MIB]
    assert spread_caps(400 * MIB, 402 * MIB) == [400 * MIB, 401 * MIB]
    with pytest.raises(MeasureError, match="no cap between"):
        spread_caps(400 * MIB, 400 * MIB)
    with pytest.raises(MeasureError, match="no configuration"):
        peaks_between(GRID[-1:], noise=0.01)


def plan(what: Choices, cap_bytes: int) -> Plan:
    run = CONFIG.model_copy(update={"memory_cap": f"{cap_bytes}B"})
    key = plan_key(run, model_shape(run), detect_device("cpu"))
    return Plan(key=key, choices=what, evidence=Evidence(trials=[]))


def judged(tmp_path: Path, monkeypatch, tuned: Plan | MeasureError, speeds: dict[str, Any], cap_mib: int = 2000) -> Any:
    """The result under one cap, where measuring again gives `speeds`: (milliseconds, MiB) by what was chosen."""
    measured: list[Choices] = []

    def again(config, left, file, **options):
        for what in left:
            measured.append(what)
            milliseconds, peak = speeds.get(what.model_dump_json(), (50, 450))
            file.append(trial(what, milliseconds, peak))
        return True

    monkeypatch.setattr(module, "measure_trials", again)
    header = make_header(CONFIG, model_shape(CONFIG), detect_device("cpu"), {})
    grid = Grid(header, GRID, len(GRID))
    result = compare(
        CONFIG, grid, {cap_mib * MIB: tuned}, tmp_path, turns=3, steps=Steps(), deadline=Deadline(None),
        say=lambda text: None,
    )  # fmt: skip
    assert json.loads((tmp_path / REGRET).read_text()) == json.loads(result.model_dump_json())
    counts = {measured.count(what) for what in measured}
    assert counts == {3}, "everything as often, one that stands for two things once"
    return result.caps[0]


def key(what: Choices) -> str:
    return what.model_dump_json()


def test_regret_is_against_the_fastest_that_is_measured_again(tmp_path, monkeypatch):
    # In the grid A was ahead; measured again, B is.
    found = judged(
        tmp_path, monkeypatch, plan(C, 2000 * MIB), {key(A): (12, 900), key(B): (10, 600), key(C): (10.5, 580)}
    )
    assert found.best.choices == B
    assert found.best_uniform.choices == C
    assert found.regret == pytest.approx(1 - 10 / 10.5)
    assert found.gain_over_uniform == 0
    assert found.default.tokens_per_second == pytest.approx(1000 * STEP_TOKENS / 12)
    assert found.gain_over_default == pytest.approx(12 / 10.5 - 1)
    assert not found.over_cap
    assert found.tuned.summary == C.summary()
    assert len(found.tuned.step_time_ms) == 9


def test_what_turns_out_to_exceed_the_cap_is_not_the_best_and_a_plan_that_does_has_failed(tmp_path, monkeypatch):
    found = judged(
        tmp_path, monkeypatch, plan(B, 600 * MIB), {key(B): (5, 601), key(C): (13, 580), key(D): (20, 400)}, 600
    )
    assert found.over_cap
    assert found.best.choices == C


def test_a_default_that_exceeds_the_cap_is_no_rival(tmp_path, monkeypatch):
    found = judged(tmp_path, monkeypatch, plan(B, 700 * MIB), {key(A): (5, 900), key(B): (10, 600)}, 700)
    (default,) = {found.default.choices.model_dump_json()}
    found = judged(tmp_path / "again", monkeypatch, plan(B, 700 * MIB), {default: (5, 701), key(B): (10, 600)}, 700)
    assert found.default.peak_bytes == 701 * MIB
    assert found.gain_over_default is None
    assert found.regret is not None


def test_a_plan_that_could_not_be_tuned_is_a_problem_and_no_number(tmp_path, monkeypatch):
    found = judged(tmp_path, monkeypatch, MeasureError("nothing trains under the memory cap"), {key(A): (10, 900)})
    assert found.tuned is None
    assert found.regret is found.gain_over_default is found.gain_over_uniform is None
    assert "nothing trains" in found.problem


@pytest.fixture
def tuned_files(tmp_path) -> list[Path]:
    """Plans under two caps, as files."""
    files = []
    for number, cap in enumerate((BIG, BIG + MIB)):
        path = tmp_path / f"plan-{number}.json"
        path.write_text(plan(choices(2, "full", "light", "light"), cap).to_json())
        files.append(path)
    return files


def run(*words: str) -> Any:
    return CliRunner().invoke(app, [*words], catch_exceptions=False)


FLAGS = (
    "toy-llama", "--batch-size", "4", "--seq-len", "16", "--device", "cpu", "--parts", "1", "--loss-chunks", "2048",
    "--mlp-chunks", "all", "--warmup-steps", "1", "--most-micro-batch", "2",
)  # fmt: skip


def test_the_whole_command_for_plans_in_files(tmp_path, tuned_files):
    words = ["regret", *FLAGS, "--output", str(tmp_path / "out"), "--turns", "2"]
    for file in tuned_files:
        words += ["--plan", str(file)]
    done = run(*words)
    assert done.exit_code == 0, done.output
    assert "Regret" in done.output
    result = json.loads((tmp_path / "out" / REGRET).read_text())
    assert result["grid_trials"] == result["grid_total"] == 10
    assert [one["cap_bytes"] for one in result["caps"]] == [BIG, BIG + MIB]
    for one in result["caps"]:
        assert one["problem"] == ""
        assert one["tuned"]["tokens_per_second"] > 0
        assert one["regret"] == pytest.approx(1 - one["tuned"]["tokens_per_second"] / one["best"]["tokens_per_second"])
        assert len(set(one["best_uniform"]["choices"]["placement"])) == 1
        assert one["best"]["tokens_per_second"] >= one["best_uniform"]["tokens_per_second"]
        assert not one["over_cap"]
    trials = TrialFile(tmp_path / "out" / FINALISTS).trials()
    assert {sum(1 for t in trials if t.choices == one.choices) for one in trials} == {2}

    again = run(*words)
    assert again.exit_code == 0
    assert TrialFile(tmp_path / "out" / FINALISTS).trials() == trials, "what is there is not measured again"
    assert json.loads((tmp_path / "out" / REGRET).read_text()) == result


def test_the_time_that_is_up_is_said_and_nothing_concluded(tmp_path):
    done = run("regret", *FLAGS, "--output", str(tmp_path / "out"), "--max-minutes", "0.0001")
    assert done.exit_code == 0
    assert "the time is up: 0 of 10 configurations" in done.output
    assert not (tmp_path / "out" / REGRET).exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--parts", "0"], "parts is not valid"),
        (["--loss-chunks", "many"], "--loss-chunks is not valid"),
        (["--batch-size", "0"], "batch_size is not valid"),
    ],
)
def test_bad_flags(tmp_path, words, message):
    done = run("grid", *FLAGS, "--output", str(tmp_path / "out"), *words)
    assert done.exit_code == 2
    assert message in done.output
    assert not (tmp_path / "out").exists()


def test_a_plan_without_a_cap_is_refused(tmp_path):
    file = tmp_path / "plan.json"
    free = plan_key(CONFIG, model_shape(CONFIG), detect_device("cpu"))
    file.write_text(Plan(key=free, choices=choices(2), evidence=Evidence(trials=[])).to_json())
    done = run("regret", *FLAGS, "--output", str(tmp_path / "out"), "--plan", str(file))
    assert done.exit_code == 6
    assert "no memory cap" in done.output
    assert not (tmp_path / "out").exists()


def test_a_plan_for_another_run_is_refused(tmp_path, tuned_files):
    words = ["--output", str(tmp_path / "out"), "--plan", str(tuned_files[0])]
    done = run("regret", *FLAGS, *words, "--rank", "4")
    assert done.exit_code == 6
    assert "lora_rank: plan 16, this run 4" in done.output
    assert not (tmp_path / "out").exists()
