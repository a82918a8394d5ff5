"""Why a plan chose what it chose: each choice beside what the tuner measured with others in its place."""

import itertools
from collections import Counter
from typing import Any

from fastft.plan import Choices, Plan, Trial

_MOST_OTHERS = 4
"""Values of a choice that are named beside the chosen one, the fastest first."""


def reasons(plan: Plan) -> list[tuple[str, str, str]]:
    """(choice, value, because), one for each choice and one for each kernel whose launch was chosen.

    A value's speed is that of the fastest trial that had it, whatever its other choices were: what stands there is the
    best that could be done with the value, as far as it was tried.
    """
    names = [name for name in Choices.model_fields if name != "kernels"]
    rows = [(name, shown(getattr(plan.choices, name)), _because(plan, name)) for name in names]
    for bucket, launch in plan.choices.kernels.items():
        rows.append((f"kernels.{bucket}", shown_launch(launch), _because_of_launch(plan, bucket, launch)))
    return rows


def shown(value: Any) -> str:
    """A value of a choice for people; runs in a list are counted: `2×full, keep`."""
    if isinstance(value, list):
        counted = [(item, len(list(run))) for item, run in itertools.groupby(value)]
        return ", ".join(str(item) if count == 1 else f"{count}×{item}" for item, count in counted)
    return str(value)


def _because(plan: Plan, name: str) -> str:
    if name == "accumulation":
        return f"global batch {plan.key.global_batch} / micro_batch {plan.choices.micro_batch}"
    tried: dict[str, list[Trial]] = {}
    for trial in plan.evidence.trials:
        tried.setdefault(shown(getattr(trial.choices, name)), []).append(trial)
    own = tried.pop(shown(getattr(plan.choices, name)), [])
    if not own:
        return "no trial says"
    if not tried:
        return "nothing else was tried"
    order = sorted(tried, key=lambda value: _speed(tried[value]) or 0, reverse=True)
    others = [f"{_label(name, value)}: {_outcome(tried[value])}" for value in order[:_MOST_OTHERS]]
    left = [f"and {len(order) - _MOST_OTHERS} more"] if len(order) > _MOST_OTHERS else []
    return "; ".join([_outcome(own), *others, *left])


def _because_of_launch(plan: Plan, bucket: str, launch: list[int]) -> str:
    timed = [trial for trial in plan.evidence.kernels if trial.bucket == bucket and trial.microseconds]
    own = [min(trial.microseconds) for trial in timed if trial.launch == launch]
    if not own:
        return "no trial says"
    default = timed[0]  # by the order of `Evidence.kernels`
    if default.launch == launch:
        return f"{own[0]:,.1f} µs"
    return f"{own[0]:,.1f} µs; the default {shown_launch(default.launch)}: {min(default.microseconds):,.1f} µs"


def _speed(trials: list[Trial]) -> float | None:
    """Tokens/s of the fastest that ran."""
    return max((t.tokens_per_second for t in trials if t.verdict == "ok" and t.tokens_per_second), default=None)


def _outcome(trials: list[Trial]) -> str:
    speed = _speed(trials)
    if speed is not None:
        return f"{speed:,.0f} tokens/s"
    return Counter(trial.verdict for trial in trials).most_common(1)[0][0].replace("_", " ")


def _label(name: str, value: str) -> str:
    return "peft (stock)" if name == "backend" and value == "peft" else value


def shown_launch(launch: list[int]) -> str:
    """A kernel's launch for people: its fields."""
    return " ".join(map(str, launch))
