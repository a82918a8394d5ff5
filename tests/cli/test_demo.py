"""The demo: what fits into the time, and the four phases with fast stand-ins for the slow ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.runner import Progress
from fastft import demo
from fastft.config import RunConfig
from fastft.demo import GOOD_STEPS, MIN_STEPS, ROUNDS, Pace
from fastft.plan import Plan, Trial
from fastft.plan_store import PlanStore
from fastft.record import Accuracy, Memory, Parity, Record, write_records
from fastft.training.trainer import TrainResult

Cli = Callable[..., Any]
QUICK = Pace(start=7.0, step=0.19, stock_step=0.22)
"""Two quiet cores."""


def trained_in(config: Any, seconds: float, plan_id: str | None) -> TrainResult:
    """What a training run of so many seconds returns."""
    return TrainResult(
        output=Path(config.output), steps=config.steps, loss=0.9, tokens_per_second=7000.0, seconds=seconds,
        peak_bytes=2**30, allocator_retries=0, plan_id=plan_id, message="adapter saved",
    )  # fmt: skip


def test_a_quick_machine_gets_every_repetition_and_step() -> None:
    assert QUICK.affordable(3600, 200) == (ROUNDS, 200)


def test_two_quiet_cores_learn_the_task_twice_within_six_minutes() -> None:
    left = 360 - 64 - 10 - 5  # after tuning and training, before the report
    rounds, steps = QUICK.affordable(left, 200)
    assert rounds >= 2
    assert GOOD_STEPS <= steps <= 200
    assert QUICK.seconds(rounds, steps) <= left


def test_a_slow_machine_gives_up_repetitions_first_and_never_everything() -> None:
    slow = Pace(start=15.0, step=0.5, stock_step=0.6)
    rounds, steps = slow.affordable(300, 200)
    assert rounds == 1
    assert steps >= GOOD_STEPS
    assert slow.affordable(10, 200) == (1, MIN_STEPS)


@given(st.floats(1, 60), st.floats(0.01, 10), st.floats(0.01, 10), st.floats(0, 4000), st.integers(MIN_STEPS, 400))
def test_what_is_affordable_fits_or_is_the_least(
    start: float, step: float, stock: float, seconds: float, wanted: int
) -> None:
    pace = Pace(start, step, stock)
    rounds, steps = pace.affordable(seconds, wanted)
    assert 1 <= rounds <= ROUNDS
    assert MIN_STEPS <= steps <= wanted
    # What is planned may take 15 % longer.
    assert 1.15 * pace.seconds(rounds, steps) <= seconds + 1e-6 or (rounds, steps) == (1, MIN_STEPS)


class Clock:
    """A clock that stands still until it is moved."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


def made(arm: str, repetition: int, scenario: Any) -> Record:
    """A plausible record: eager takes half the time."""
    steps = scenario.total_steps
    return Record(
        run_id="run", scenario=scenario.name, arm=arm, backend=arm, repetition=repetition, seed=repetition,
        status="ok", warmup_steps=scenario.warmup_steps, step_time_ms=[100.0 if arm == "eager" else 200.0] * steps,
        step_tokens=[1000] * steps, loss=[1.0] * steps, gradient_norm=[1.0] * steps, batch_sha256=["a"] * steps,
        memory=Memory(kind="rss", model_bytes=2**29, peak_bytes=2**29 + (2**27 if arm == "eager" else 2**28)),
        parity=Parity(passed=True, max_relative_error=1e-6, stock_max_relative_error=0.0, tolerance=1e-4, tensors=56,
                      worst_tensor="q"),
        accuracy=Accuracy(before=0.02, after=0.96 if arm == "eager" else 0.95, samples=128),
    )  # fmt: skip


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch, make_plan: Callable[..., Plan]) -> dict[str, Any]:
    """A tuner, a trainer and a bench that only move the clock; the report is real."""
    clock, state = Clock(), {"round_seconds": 60.0, "tuned": [], "trained": [], "bench": []}
    monkeypatch.setattr(demo, "time", clock)
    plan = make_plan(model="tiny")

    class Tuned:
        cached = False

    Tuned.plan = plan  # type: ignore[attr-defined]

    def tune(config: Any, *_: Any, **options: Any) -> Any:
        clock.now += 60
        state["tuned"].append((config, options))
        return Tuned

    def train(config: Any) -> TrainResult:
        clock.now += 8 + 0.15 * config.steps
        state["trained"].append(config)
        Path(config.output).mkdir()
        (Path(config.output) / "adapter_config.json").write_text("{}")
        return trained_in(config, 0.15 * config.steps, plan.id)

    def bench(
        scenario: Any, *, arms: tuple[str, ...], output: Path, on_progress: Callable[[Progress], None]
    ) -> list[Record]:
        state["bench"].append((scenario, arms))
        output.mkdir()
        found: list[Record] = []
        total = len(arms) * (1 + scenario.repetitions)
        for repetition in range(scenario.repetitions):
            for arm in arms:
                on_progress(Progress(done=len(arms) + len(found), total=total, text=f"{arm} starts"))
                clock.now += state["round_seconds"] / len(arms)
                found.append(state.get("record", made)(arm, repetition, scenario))
                write_records(output / "records.jsonl", found)
                on_progress(Progress(done=len(arms) + len(found), total=total, text=f"{arm} done", record=found[-1]))
        return found

    monkeypatch.setattr(demo, "tune_verified", tune)
    monkeypatch.setattr(demo, "train_quietly", train)
    monkeypatch.setattr("bench.runner.run_bench", bench)
    monkeypatch.setattr(demo, "resolve_backend", lambda *_: "eager")
    return state


def test_the_last_line_says_where_the_report_is_and_what_it_found(
    cli: Cli, stand_ins: dict[str, Any], work: Path
) -> None:
    result = cli("demo", "--output", "first")
    assert result.exit_code == 0, result.stderr
    (last,) = result.stdout.splitlines()
    assert last.startswith("report in first/report/report.html: embedded")
    assert ": eager is 2.00× stock PEFT in tokens/s" in last
    assert "0.500× its memory above the model" in last
    assert "exact match 96.0 % vs 95.0 %" in last
    text = (work / "first" / "report" / "report.md").read_text()
    assert "96.0 %" in text
    assert "95.0 %" in text
    assert (work / "first" / "adapter" / "adapter_config.json").is_file()
    phases = [line[:3] for line in result.stderr.splitlines() if line[1:3] == "/4"]
    assert phases == ["1/4", "2/4", "3/4", "4/4"]


def test_every_phase_works_on_the_same_run(cli: Cli, stand_ins: dict[str, Any]) -> None:
    """Otherwise the plan that was tuned would be found by none of the others."""
    assert cli("demo").exit_code == 0
    ((tuned, options),), (trained,), ((scenario, arms),) = (stand_ins[name] for name in ("tuned", "trained", "bench"))
    assert options["max_minutes"] < 6 / 4
    assert trained.model_copy(update={"output": tuned.output, "steps": tuned.steps, "log_steps": 10}) == tuned
    assert scenario.config == tuned
    assert arms == ("peft", "eager")
    assert scenario.accuracy is not None
    assert scenario.repetitions == ROUNDS


def test_json_has_the_same_and_the_paths(cli: Cli, stand_ins: dict[str, Any]) -> None:
    answer = json.loads(cli("demo", "--output", "first", "--json").stdout)
    assert answer["html"] == "first/report/report.html"
    assert answer["repetitions"] == ROUNDS
    assert answer["seconds"] == pytest.approx(60 + 8 + 0.15 * stand_ins["trained"][0].steps + ROUNDS * 60)


def test_no_repetition_begins_that_would_end_too_late(cli: Cli, stand_ins: dict[str, Any], work: Path) -> None:
    stand_ins["round_seconds"] = 130.0
    result = cli("demo", "--output", "first", "--json")
    answer = json.loads(result.stdout)
    assert answer["repetitions"] == 2
    assert answer["seconds"] <= 360
    assert "2 of 3 repetitions: another would take too long" in result.stderr
    assert len((work / "first" / "bench" / "records.jsonl").read_text().splitlines()) == 4


def test_the_first_repetition_is_never_given_up(cli: Cli, stand_ins: dict[str, Any]) -> None:
    stand_ins["round_seconds"] = 1000.0
    answer = json.loads(cli("demo", "--output", "first", "--json").stdout)
    assert answer["repetitions"] == 1


def test_a_failed_arm_is_reported_and_is_an_error(cli: Cli, stand_ins: dict[str, Any], work: Path) -> None:
    def failing(arm: str, repetition: int, scenario: Any) -> Record:
        record = made(arm, repetition, scenario)
        return record if arm == "peft" else record.model_copy(update={"status": "failed", "error": "no luck"})

    stand_ins["record"] = failing
    result = cli("demo", "--output", "first")
    assert result.exit_code == 8
    assert result.stderr.splitlines()[-1].startswith("error: arm eager was not measured; got no luck")
    assert (work / "first" / "report" / "report.html").is_file()


def test_an_interrupt_says_what_is_there_and_leaves_no_empty_folder(
    cli: Cli, stand_ins: dict[str, Any], monkeypatch: pytest.MonkeyPatch, work: Path
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt("what was measured is kept")

    monkeypatch.setattr("bench.runner.run_bench", interrupted)
    result = cli("demo", "--output", "first")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "interrupted; what was measured is kept; what was finished is in first"
    monkeypatch.setattr(demo, "tune_verified", interrupted)
    assert cli("demo", "--output", "second").exit_code == 130
    assert not (work / "second").exists()


def test_a_folder_in_use_is_refused_before_anything_is_measured(
    cli: Cli, stand_ins: dict[str, Any], work: Path, store: PlanStore
) -> None:
    (work / "first").mkdir()
    (work / "first" / "mine").write_text("precious")
    result = cli("demo", "--output", "first")
    assert result.exit_code == 7
    assert stand_ins["tuned"] == []
    assert [path.name for path in (work / "first").iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("trials", "trained", "pace"),
    [
        ([("eager", [500.0, 400.0]), ("peft", [600.0])], 0.3, Pace(8.0 * demo.START_FACTOR, 0.3, 0.45)),
        ([("eager", [500.0, 400.0]), ("peft", [600.0])], 3.0, Pace(8.0 * demo.START_FACTOR, 0.4, 0.6)),
        ([("eager", [5000.0]), ("peft", [6000.0])], 0.3, Pace(8.0 * demo.START_FACTOR, 0.3, 0.36)),
        ([("eager", [400.0])], 0.3, Pace(8.0 * demo.START_FACTOR, 0.3, 0.45)),
        ([("peft", [400.0])], 0.3, Pace(8.0 * demo.START_FACTOR, 0.3, 0.3)),
        ([], 0.3, Pace(8.0 * demo.START_FACTOR, 0.3, 0.45)),
    ],
)
def test_the_pace_is_that_of_training_unless_something_disturbed_it(
    trials: list[tuple[str, list[float]]],
    trained: float,
    pace: Pace,
    stand_ins: dict[str, Any],
    make_plan: Callable[..., Plan],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = demo.time

    def train(config: Any) -> TrainResult:
        clock.now += 8 + trained * config.steps  # type: ignore[attr-defined]
        return trained_in(config, trained * config.steps, None)

    monkeypatch.setattr(demo, "train_quietly", train)
    plan = make_plan()
    backend = trials[0][0] if len(trials) == 1 else "eager"
    made_of = [
        Trial(choices=plan.choices.model_copy(update={"backend": name}), verdict="ok", step_time_ms=times)
        for name, times in trials
    ]
    plan = plan.model_copy(
        update={
            "choices": plan.choices.model_copy(update={"backend": backend}),
            "evidence": plan.evidence.model_copy(update={"trials": made_of}),
        }
    )
    found = demo._train(RunConfig(), plan, Path("adapter"), seconds=10.0)
    assert (found.start, found.step, found.stock_step) == pytest.approx((pace.start, pace.step, pace.stock_step))
