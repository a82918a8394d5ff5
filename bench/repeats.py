"""Repeatability: the same run tuned several times; does the tuner choose the same again?

Where it chose something else, that is a tie if the two are as fast as each other within the noise that the tuner itself
reckons with: between equals it may choose either.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from autotune.ranking import NOISE, Standings
from autotune.search import tune
from bench.regret import STORE
from bench.results import Result, facts
from bench.trials import Deadline
from fastft.config import RunConfig
from fastft.errors import PlanError
from fastft.files import canonical_json, write_atomically
from fastft.hardware import Device, detect_device
from fastft.plan import Choices, Plan
from fastft.plan_store import PlanStore, read_plan
from fastft.planning import model_shape, plan_key

REPEATS, FOLDER = "repeats.json", "repeats"
"""What an output folder holds: the result, and the plans; beside them is the tuner's cache folder."""
REPEATS_SCHEMA = 1


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Repetition(_Frozen):
    """One tuning."""

    plan_id: str
    summary: str
    tokens_per_second: float | None
    """Of what it chose."""
    usual_tokens_per_second: float | None
    """Of the usual choice: in this tuning where it was tried, else in the first that chose it."""
    verdict: Literal["same", "tie", "other"]


class Repeats(Result):
    """`repeats.json`."""

    repeats: int = REPEATS_SCHEMA
    noise: float
    """Speeds closer than this fraction are equal."""
    usual: str
    """What was chosen most often, the first of equals."""
    repetitions: list[Repetition]

    @property
    def agreeing(self) -> int:
        """Tunings that chose the usual, or as good."""
        return sum(one.verdict != "other" for one in self.repetitions)


def repeat_tuning(
    config: RunConfig, folder: Path, *, times: int, deadline: Deadline, say: Callable[[str], None]
) -> Repeats | None:
    """Tune `times` times from the start, keep each plan, and write `folder/repeats.json`.

    Returns:
        What was written; None where the time was up before (calling again goes on from there).

    Raises:
        FastftError: as `autotune.search.tune`.
    """
    device = detect_device(config.device)
    config = config.model_copy(update={"backend": "auto", "micro_batch": None, "placement": None, "plan": "none"})
    key = plan_key(config, model_shape(config), device)
    plans: list[Plan] = []
    for number in range(1, times + 1):
        path = folder / FOLDER / f"{key.digest}-{number}.json"
        plan = _kept(path)
        if plan is None:
            longest = max((one.evidence.seconds for one in plans), default=0.0)
            if deadline.passed(longest):
                return None
            plan = tune(config, force=True, store=PlanStore(folder / STORE)).plan
            write_atomically(path, plan.to_json())
        plans.append(plan)
        speed = plan.evidence.best_tokens_per_second or 0.0
        say(f"tuning {number} of {times}: {plan.choices.summary()}, {speed:,.0f} tokens/s")
    result = judge_repeats(config, plans, device)
    result.write(folder / REPEATS)
    return result


def judge_repeats(config: RunConfig, plans: Sequence[Plan], device: Device) -> Repeats:
    """Which of `plans`, at least one, made the usual choice, or one as good."""
    noise = NOISE[device.kind]
    names = [canonical_json(plan.choices.model_dump()) for plan in plans]
    usual = plans[names.index(Counter(names).most_common(1)[0][0])]
    return Repeats(
        **facts(config, device),
        noise=noise,
        usual=usual.choices.summary(),
        repetitions=[_judge(plan, usual, noise) for plan in plans],
    )


def _judge(plan: Plan, usual: Plan, noise: float) -> Repetition:
    mine = _speed(plan, plan.choices)
    theirs = _speed(plan, usual.choices) or _speed(usual, usual.choices)
    if plan.choices == usual.choices:
        verdict: Literal["same", "tie", "other"] = "same"
    else:
        close = mine is not None and theirs is not None and abs(mine - theirs) <= noise * max(mine, theirs)
        verdict = "tie" if close else "other"
    return Repetition(
        plan_id=plan.id, summary=plan.choices.summary(), tokens_per_second=mine, usual_tokens_per_second=theirs,
        verdict=verdict,
    )  # fmt: skip


def _speed(plan: Plan, choices: Choices) -> float | None:
    """Tokens a second of `choices` in the tuning that made `plan`."""
    step_tokens = plan.key.global_batch * plan.key.sequence_tokens
    return Standings(plan.evidence.trials, step_tokens).speed(choices)


def _kept(path: Path) -> Plan | None:
    try:
        return read_plan(path)
    except PlanError:
        return None
