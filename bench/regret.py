"""Regret: how much slower a tuned plan is than the best configuration that the grid has under the same memory cap.

Of each cap, everything that is compared is measured once more, in one process and in turns: the tuned plan, the
default, the fastest few of the grid and of its uniform placements.  So what drifts hits all alike, and the one that
merely had luck in the grid has to have it again.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from autotune.ranking import NOISE
from autotune.search import tune
from bench.grid import Grid, describe, free, is_uniform, make_header
from bench.results import Result, facts
from bench.trial_file import TrialFile
from bench.trials import Deadline, Steps, measure_trials
from bench.turns import speed_over_turns, still_to_measure
from fastft.config import RunConfig
from fastft.defaults import default_for
from fastft.errors import FastftError, MeasureError
from fastft.hardware import detect_device
from fastft.plan import Choices, Plan, Trial
from fastft.plan_store import PlanStore
from fastft.planning import model_shape, plan_key
from fastft.units import gib

FINALISTS, REGRET, STORE = "finalists.jsonl", "regret.json", "tuner-cache"
"""What an output folder holds beside the grid: the trials of the comparison, its result, the tuner's cache folder."""
REGRET_SCHEMA = 1

CAPS = 3
BEST, BEST_UNIFORM = 3, 2
"""How many of the grid's fastest under a cap are measured again: the first of hundreds owes some lead to luck."""

Say = Callable[[str], None]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Measured(_Frozen):
    """One configuration over all turns."""

    choices: Choices
    summary: str
    tokens_per_second: float | None
    """By the median step of all turns; None where one of them was not ok."""
    step_time_ms: list[float]
    peak_bytes: int | None
    """The highest of all turns."""
    problem: str = ""


class CapResult(_Frozen):
    """What is known under one cap; None where there is nothing to compare."""

    cap_bytes: int
    plan_id: str | None
    tuned: Measured | None
    default: Measured | None
    best: Measured | None
    """Of the grid's configurations."""
    best_uniform: Measured | None
    """Of those with one policy for all layers."""
    over_cap: bool
    """Whether the tuned plan's peak exceeds the cap: it failed, however fast it is."""
    regret: float | None
    """1 − tuned / best of the grid, in tokens/s; negative where the tuned plan is faster than all of the grid."""
    gain_over_default: float | None
    """tuned / default − 1; None where the default exceeds the cap, which its arithmetic only estimates."""
    gain_over_uniform: float | None
    """tuned / best uniform that fits − 1."""
    problem: str = ""


class Regret(Result):
    """`regret.json`."""

    regret: int = REGRET_SCHEMA
    grid_trials: int
    grid_total: int
    smallest_peak_bytes: int
    free_peak_bytes: int
    """Of the configuration that would be chosen without a cap."""
    turns: int
    caps: list[CapResult]


def fitting(trials: Iterable[Trial], cap_bytes: int | None = None) -> list[Trial]:
    """The trials that are ok and whose peak is at most `cap_bytes`, the fastest first."""
    found = [
        trial
        for trial in trials
        if trial.verdict == "ok"
        and trial.tokens_per_second is not None
        and trial.peak_bytes is not None
        and (cap_bytes is None or trial.peak_bytes <= cap_bytes)
    ]
    return sorted(found, key=lambda trial: -(trial.tokens_per_second or 0.0))


def peaks_between(trials: Iterable[Trial], noise: float) -> tuple[int, int]:
    """(the smallest peak of all, the peak of the free choice): of those that are fastest within `noise` the smallest.

    Raises:
        MeasureError: no trial is ok.
    """
    ranked = fitting(trials)
    if not ranked:
        raise MeasureError("no configuration of the grid ran", fix="see the grid's log, or a smaller batch size")
    fastest = ranked[0].tokens_per_second or 0.0
    free_peak = min(t.peak_bytes or 0 for t in ranked if (t.tokens_per_second or 0.0) >= (1 - noise) * fastest)
    return min(t.peak_bytes or 0 for t in ranked), free_peak


def spread_caps(smallest: int, largest: int, count: int = CAPS) -> list[int]:
    """`count` caps in bytes at equal distances between the two peaks, in whole MiB; fewer where those are the same.

    Raises:
        MeasureError: nothing lies between.
    """
    mib = 2**20
    caps = [(smallest + (largest - smallest) * part // (count + 1)) // mib * mib for part in range(1, count + 1)]
    found = sorted({cap for cap in caps if smallest <= cap < largest})
    if not found:
        raise MeasureError(
            "there is no cap between the smallest plan and the free one", got=f"{gib(smallest)} and {gib(largest)}",
            fix="choose a longer sequence or a larger batch, or give caps",
        )  # fmt: skip
    return found


def capped(config: RunConfig, cap_bytes: int) -> RunConfig:
    """The run under a cap."""
    return free(config).model_copy(update={"memory_cap": f"{cap_bytes}B"})


def tuned_plan(config: RunConfig, cap_bytes: int, store: PlanStore, say: Say) -> Plan | FastftError:
    """The plan for the run under the cap, from the store or tuned now (effort quick); or why there is none."""
    run = capped(config, cap_bytes)

    def show(progress: Any) -> None:
        if progress.trial is not None:
            say(f"  {progress.index} of up to {progress.total}: {describe(progress.trial)}")

    try:
        # No parity gate: the plan stays in this folder, and the comparison checks losses and gradients of all.
        return tune(run, store=store, on_progress=show).plan
    except FastftError as error:
        return error


@dataclass(frozen=True)
class _Contest:
    """What is compared under one cap."""

    cap_bytes: int
    plan: Plan | None
    default: Choices | None
    best: list[Choices]
    best_uniform: list[Choices]
    problem: str

    def everything(self) -> list[Choices]:
        single = [self.plan.choices if self.plan is not None else None, self.default]
        return [*(choices for choices in single if choices is not None), *self.best, *self.best_uniform]


def compare(
    config: RunConfig,
    grid: Grid,
    plans: dict[int, Plan | FastftError],
    folder: Path,
    *,
    turns: int,
    steps: Steps,
    deadline: Deadline,
    say: Say,
) -> Regret | None:
    """Measure in turns what is compared under each cap, and write `folder/regret.json`.

    Args:
        plans: cap in bytes → the tuned plan, or why there is none.
        turns: how often each configuration is measured, in an order that is reversed from turn to turn.

    Returns:
        What was written; None where the time was up before (calling again goes on from there).

    Raises:
        FastftError: as `trials.measure_trials`.
    """
    config, device = free(config), detect_device(config.device)
    shape = model_shape(config)
    contests = [_contest(config, grid, cap, plan) for cap, plan in sorted(plans.items())]
    everything = list({c.model_dump_json(): c for contest in contests for c in contest.everything()}.values())
    file = TrialFile(folder / FINALISTS)
    header = file.begin(make_header(config, shape, device, {"steps": asdict(steps)}))
    left = still_to_measure(everything, turns, file.trials())
    say(f"comparison: {len(everything)} configurations, {turns} times; {len(left)} measurements to go")
    if not measure_trials(
        config, left, file, steps=steps, deadline=deadline, on_trial=lambda trial: say(f"  {describe(trial)}")
    ):
        return None
    found = {c.model_dump_json(): _summarize(c, file.trials(), config) for c in everything}
    smallest, free_peak = peaks_between(grid.trials, NOISE[device.kind])
    result = Regret(
        **facts(config, device, header), grid_trials=len(grid.trials), grid_total=grid.total,
        smallest_peak_bytes=smallest, free_peak_bytes=free_peak, turns=turns,
        caps=[_result(contest, lambda choices: found[choices.model_dump_json()]) for contest in contests],
    )  # fmt: skip
    result.write(folder / REGRET)
    return result


def _contest(config: RunConfig, grid: Grid, cap_bytes: int, plan: Plan | FastftError) -> _Contest:
    run, device = capped(config, cap_bytes), detect_device(config.device)
    problems = [f"no plan: {plan}"] if isinstance(plan, FastftError) else []
    default = None
    try:
        default = default_for(run, model_shape(run), device).choices
    except FastftError as error:
        problems.append(f"no default: {error}")
    ranked = [trial.choices for trial in fitting(grid.trials, cap_bytes)]
    if not ranked:
        problems.append("nothing of the grid fits")
    return _Contest(
        cap_bytes,
        None if isinstance(plan, FastftError) else plan,
        default,
        ranked[:BEST],
        [choices for choices in ranked if is_uniform(choices)][:BEST_UNIFORM],
        "; ".join(problems),
    )


def _summarize(choices: Choices, trials: Sequence[Trial], config: RunConfig) -> Measured:
    mine = [trial for trial in trials if trial.choices == choices]
    bad = [trial for trial in mine if trial.verdict != "ok"]
    return Measured(
        choices=choices,
        summary=choices.summary(),
        tokens_per_second=speed_over_turns(mine, config),
        step_time_ms=[time for trial in mine for time in trial.step_time_ms],
        peak_bytes=max((trial.peak_bytes for trial in mine if trial.peak_bytes is not None), default=None),
        problem=f"{bad[0].verdict.replace('_', ' ')}: {bad[0].detail}" if bad else "",
    )


def _result(contest: _Contest, of: Callable[[Choices], Measured]) -> CapResult:
    cap = contest.cap_bytes

    def fastest(candidates: Sequence[Choices]) -> Measured | None:
        """The fastest that ran and stayed under the cap in every turn."""
        ran = [one for one in map(of, candidates) if one.tokens_per_second and (one.peak_bytes or 0) <= cap]
        return max(ran, key=lambda one: one.tokens_per_second or 0.0, default=None)

    def over(other: Measured | None) -> float | None:
        """tuned / other."""
        if tuned is None or other is None or not tuned.tokens_per_second or not other.tokens_per_second:
            return None
        return tuned.tokens_per_second / other.tokens_per_second

    tuned = of(contest.plan.choices) if contest.plan is not None else None
    default = of(contest.default) if contest.default is not None else None
    best, uniform = fastest(contest.best), fastest(contest.best_uniform)
    problems = [contest.problem, f"the tuned plan: {tuned.problem}" if tuned is not None and tuned.problem else ""]
    default_fits = default is not None and (default.peak_bytes or 0) <= cap
    against_best, against_uniform = over(best), over(uniform)
    against_default = over(default) if default_fits else None
    return CapResult(
        cap_bytes=cap,
        plan_id=contest.plan.id if contest.plan is not None else None,
        tuned=tuned,
        default=default,
        best=best,
        best_uniform=uniform,
        over_cap=tuned is not None and tuned.peak_bytes is not None and tuned.peak_bytes > cap,
        regret=None if against_best is None else 1 - against_best,
        gain_over_default=None if against_default is None else against_default - 1,
        gain_over_uniform=None if against_uniform is None else against_uniform - 1,
        problem="; ".join(filter(None, problems)),
    )


def plan_of(config: RunConfig, cap_bytes: int, store: PlanStore) -> Plan | None:
    """The stored plan for the run under the cap."""
    run = capped(config, cap_bytes)
    return store.load(plan_key(run, model_shape(run), detect_device(run.device)))
