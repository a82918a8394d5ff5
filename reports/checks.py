"""What must hold before two runs are compared: equal work, real training, the same environment.

Each check returns its findings as sentences, none when all is well.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from fastft.record import Record
from reports.numbers import clean


def work_differences(pairs: Sequence[tuple[Record, Record]]) -> list[str]:
    """Why the two sides did not do the same work; empty if they provably did."""
    if not pairs:
        return ["no repetition was finished by both arms with the same seed"]
    reasons = []
    for arm, baseline in pairs:
        where = f"repetition {arm.repetition} (seed {arm.seed})"
        if not arm.batch_sha256 or not baseline.batch_sha256:
            reasons.append(f"unequal work: {where} recorded no batch hashes, so equal work cannot be shown")
        elif len(arm.batch_sha256) != len(baseline.batch_sha256):
            counts = f"{len(arm.batch_sha256)} and {len(baseline.batch_sha256)}"
            reasons.append(f"unequal work: {where} ran {counts} steps")
        elif arm.batch_sha256 != baseline.batch_sha256:
            both = zip(arm.batch_sha256, baseline.batch_sha256, strict=True)
            step = next(step for step, (mine, theirs) in enumerate(both, 1) if mine != theirs)
            reasons.append(f"unequal work: {where} saw different batches from step {step} on")
        if arm.warmup_steps != baseline.warmup_steps:
            reasons.append(
                f"unequal work: {where} counted from steps {arm.warmup_steps} and {baseline.warmup_steps} on"
            )
        for field in ("model", "lora", "training"):
            mine, theirs = flatten(getattr(arm, field)), flatten(getattr(baseline, field))
            for key in sorted(mine.keys() | theirs.keys()):
                if mine.get(key) != theirs.get(key):
                    values = f"{mine.get(key, 'nothing')} and {theirs.get(key, 'nothing')}"
                    reasons.append(f"unequal work: {field}.{clean(key)} is {clean(values)}")
    return reasons


def training_problems(name: str, records: Iterable[Record]) -> list[str]:
    """Signs that an arm did not train: a loss or gradient that is not finite, or gradients that are all zero."""
    problems = []
    for record in records:
        values = [*record.loss, *record.gradient_norm]
        if not all(map(math.isfinite, values)):
            problems.append(f"{name} has a loss or gradient norm that is not finite (seed {record.seed})")
        if record.gradient_norm and not any(record.gradient_norm):
            problems.append(f"{name} did not train: every gradient norm is 0 (seed {record.seed})")
    return problems


def environment_differences(records: Sequence[Record]) -> list[str]:
    """What differs between the records of one scenario besides the arm: device, versions, commit.

    Only what a record states is compared: a run that died early states little.
    """
    values: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for record in records:
        stated = {f"Device {key}": value for key, value in flatten(record.device).items()}
        stated |= {f"Version of {key}": value for key, value in record.versions.items()}
        stated |= {"Git commit": record.git_commit} if record.git_commit else {}
        for key, value in stated.items():
            values[clean(key, 60)][clean(value, 60)].add(clean(record.arm, 60))
    return [
        f"{key} differs: "
        + "; ".join(f"{value} ({', '.join(sorted(users))})" for value, users in sorted(found.items()))
        for key, found in sorted(values.items())
        if len(found) > 1
    ]


def plan_differences(name: str, records: Iterable[Record]) -> list[str]:
    """Whether the processes of one arm followed different plans."""
    plans = {repr(sorted(flatten(record.choices).items())) for record in records}
    return [f"{name} followed different plans in different processes"] if len(plans) > 1 else []


def flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, dict):
            flat.update(flatten(inner, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = inner
    return flat
