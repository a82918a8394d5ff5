"""The demo: the whole of fastft on the embedded model and data, within a few minutes on any machine.

    tune     the quick search, for the very run that follows
    train    an adapter by the cached plan; also tells how fast this machine is
    bench    stock PEFT against the best backend here, parity first, accuracy before and after
    report   HTML and Markdown of the records

How much is measured follows from the time there is: decided before the bench from the pace of the training, and between
repetitions from the clock, never from what the arms showed.  Gates and accuracy are never left out.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastft.commands.bench import require_measured
from fastft.commands.train import train_quietly
from fastft.commands.tune import tune_verified
from fastft.config import RunConfig
from fastft.console import Meter, keeping, progress, say
from fastft.defaults import resolve_backend
from fastft.errors import ConfigError
from fastft.files import new_folder
from fastft.hardware import detect_device
from fastft.plan import Plan
from fastft.record import Record, read_records
from fastft.siblings import import_sibling

MIN_MINUTES = 1.0
TUNE_SHARE, TRAIN_SHARE = 0.15, 0.05
"""How much of the time tuning and training may take."""
TRAIN_STEPS = (15, 30)
REPORT_SECONDS = 5.0

ROUNDS = 3
"""Repetitions of each arm: with fewer a report gives no interval."""
MOST_STEPS, GOOD_STEPS, MIN_STEPS = 150, 140, 60
"""The embedded model learns its task in these steps (exact match 0.1 after 60, 0.6 after 113, 0.94 after 150, 0.99
after 200): for less than the second, repetitions are given up; with less than the third, accuracy tells nothing,
however long it takes; with more than the first it gains little."""

# What costs time beside the steps of a repetition, in steps of the same arm: measured on two CPU cores.
EVALUATION_STEPS, BASE_EVALUATION_STEPS, GATE_STEPS = 10, 25, 6
START_FACTOR = 1.6
"""How much longer a worker takes to its first step than the training here, which has some libraries loaded."""
SLACK = 1.15
"""What is planned may take longer by this factor."""
TASK_SHARE = 0.5
"""A step on rows of the task over one on full rows, which are what the tuner measures."""
STOCK_SLOWNESS = 1.5
"""How much slower stock PEFT is taken to be where the tuner did not measure it."""


@dataclass(frozen=True)
class DemoResult:
    """Where everything is, and what the report says."""

    folder: Path
    html: Path
    markdown: Path
    headline: str
    """The report's own: speed, memory, accuracy of both arms."""
    plan_id: str
    repetitions: int
    steps: int
    """Optimizer steps of a repetition."""
    seconds: float


@dataclass(frozen=True)
class Pace:
    """How fast this machine is, in seconds."""

    start: float
    """Of a process until its first step."""
    step: float
    """An optimizer step by the plan."""
    stock_step: float
    """One of stock PEFT."""

    def seconds(self, rounds: int, steps: int) -> float:
        """Gates and `rounds` repetitions of both arms.

        A repetition is a process, its steps and an evaluation; each round also evaluates the untouched base once.
        """
        gates = 2 * self.start + GATE_STEPS * (self.step + self.stock_step)
        both = 2 * self.start + (steps + EVALUATION_STEPS) * (self.step + self.stock_step)
        return gates + rounds * (both + BASE_EVALUATION_STEPS * self.stock_step)

    def affordable(self, seconds: float, steps: int) -> tuple[int, int]:
        """(rounds, steps of a repetition) that end within `seconds`: up to `steps`, as many rounds as leave enough."""
        for rounds in range(ROUNDS, 0, -1):
            left = (seconds / SLACK - self.seconds(rounds, 0)) / rounds
            fitting = min(steps, int(left / (self.step + self.stock_step)))
            if fitting >= min(GOOD_STEPS, steps):
                return rounds, fitting
        return 1, max(MIN_STEPS, fitting)


def run_demo(output: Path, *, minutes: float = 6.0) -> DemoResult:
    """Tune, train, bench and report the embedded run; everything goes into the new folder `output`.

    Raises:
        ConfigError: fewer than one minute.
        OutputError: `output` holds something, or cannot be written.
        FastftError: whatever the phases raise.
    """
    if not minutes >= MIN_MINUTES:
        raise ConfigError("--minutes is not valid", got=minutes, allowed=f"{MIN_MINUTES:g} and more", fix="take 6")
    started = time.monotonic()
    deadline = started + 60 * minutes
    folder = new_folder(output, what="demo")
    with keeping(lambda: f"what was finished is in {folder}"), _removed_if_empty(folder):
        scenarios = import_sibling("bench.scenarios")
        scenario = scenarios.load_scenario("embedded")
        config: RunConfig = scenario.config
        device = detect_device(config.device)
        say(f"1/4 tune: the embedded model on {device.name}, {device.cores} cores")
        with progress() as meter:
            plan = tune_verified(config, meter, max_minutes=TUNE_SHARE * minutes).plan
        say(f"plan {plan.id}: {plan.choices.summary()}")

        say("2/4 train: an adapter by that plan")
        pace = _train(config, plan, folder / "adapter", seconds=TRAIN_SHARE * 60 * minutes)

        backend = resolve_backend(config, device)
        left = deadline - time.monotonic() - REPORT_SECONDS
        rounds, steps = pace.affordable(left, min(MOST_STEPS, scenario.total_steps))
        scenario = _fitting(scenario, rounds, steps)
        say(f"3/4 bench: stock PEFT against {backend}, parity first, then {rounds} × {steps} steps and accuracy each")
        with progress() as meter:
            records = _bench(scenario, ("peft", backend), folder / "bench", deadline - REPORT_SECONDS, meter)

        say("4/4 report")
        built = import_sibling("reports").build_report(
            [folder / "bench"], folder / "report", title="fastft demo: the embedded model on this machine"
        )
    require_measured(records)
    return DemoResult(
        folder=folder, html=built.html, markdown=built.markdown, headline=built.headline, plan_id=plan.id,
        repetitions=min(sum(r.arm == arm for r in records) for arm in ("peft", backend)), steps=scenario.total_steps,
        seconds=time.monotonic() - started,
    )  # fmt: skip


@contextmanager
def _removed_if_empty(folder: Path) -> Iterator[None]:
    """Leave no empty folder behind when nothing came to an end."""
    try:
        yield
    finally:
        with suppress(OSError):  # it holds something
            folder.rmdir()


def _train(config: RunConfig, plan: Plan, output: Path, *, seconds: float) -> Pace:
    """Train for about `seconds`, save the adapter, and tell the pace."""
    tuned, stock = _shortest_step(plan, plan.choices.backend), _shortest_step(plan, "peft")
    fewest, most = TRAIN_STEPS
    steps = max(fewest, min(most, int(seconds / tuned) if tuned else fewest))
    began = time.monotonic()
    result = train_quietly(config.model_copy(update={"output": str(output), "steps": steps, "log_steps": steps}))
    start = time.monotonic() - began - result.seconds
    say(result.message)
    # Other work on the machine comes and goes: it is not taken to slow everything down by more than half.
    step = min(result.seconds / max(result.steps, 1), 2 * tuned if tuned else math.inf)
    slowness = stock / tuned if stock and tuned else STOCK_SLOWNESS
    return Pace(start=START_FACTOR * start, step=step, stock_step=step * slowness)


def _shortest_step(plan: Plan, backend: str) -> float | None:
    """Seconds of the shortest step that the tuner saw `backend` make, scaled to rows of the task."""
    times = [ms for trial in plan.evidence.trials if trial.choices.backend == backend for ms in trial.step_time_ms]
    return TASK_SHARE * min(times) / 1000 if times else None


def _fitting(scenario: Any, rounds: int, steps: int) -> Any:
    """`scenario` with so many repetitions and steps; a shorter one gets a name of its own: it is another experiment."""
    update: dict[str, Any] = {"repetitions": rounds}
    if steps < scenario.total_steps:
        warmup = min(scenario.warmup_steps, steps // 5)
        update |= {"name": f"{scenario.name}, {steps} steps", "warmup_steps": warmup, "steps": steps - warmup}
    return scenario.model_copy(update=update)


class _TimeIsUpError(Exception):
    """Ends a bench between two rounds."""


def _bench(scenario: Any, arms: tuple[str, ...], output: Path, deadline: float, meter: Meter) -> list[Record]:
    """Rounds of all arms until the scenario's repetitions are done or another one would end after `deadline`."""
    runner = import_sibling("bench.runner")
    round_began = time.monotonic()
    made = 0

    def show(event: Any) -> None:
        nonlocal made, round_began
        now = time.monotonic()
        meter.update(event.text, event.done, event.total)
        meter.line(event.text)
        if event.record is None:
            if made == 0:
                round_began = now  # the last time before the first record: its start
            return
        made += 1
        if made % len(arms) == 0 and event.done < event.total:
            length, round_began = now - round_began, now
            if now + length > deadline:
                raise _TimeIsUpError

    try:
        records: list[Record] = runner.run_bench(scenario, arms=arms, output=output, on_progress=show)
        return records
    except _TimeIsUpError:
        meter.line(f"{made // len(arms)} of {scenario.repetitions} repetitions: another would take too long")
        return read_records(output / runner.RECORDS)
