"""Records → scenarios, arms and comparisons.  Here it is decided whether a ratio may be shown at all.

A ratio needs equal work (same model, adapter, training settings and batches, step by step), a parity gate that
did not fail, and finite training.  Where one is missing the comparison carries the reason and no number.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from fastft.errors import unknown_choice
from fastft.record import Record
from reports.checks import environment_differences, plan_differences, training_problems, work_differences
from reports.numbers import clean, number, plural
from reports.statistics import (
    NOMINAL_PROCESSES,
    Estimate,
    LossDeviation,
    Spread,
    best_coverage,
    difference_of_means,
    loss_deviation,
    process_rate,
    ratio_of_medians,
    spread,
)

Pairs = Sequence[tuple[Record, Record]]


@dataclass(frozen=True)
class Arm:
    """Every record of one arm of one scenario, by repetition."""

    name: str
    backend: str
    records: tuple[Record, ...]

    @property
    def ok(self) -> tuple[Record, ...]:
        """The runs that finished."""
        return tuple(record for record in self.records if record.status == "ok")

    @property
    def gate_error(self) -> str | None:
        """Why the parity gate failed; None if it passed or did not run."""
        for record in self.records:
            parity = record.parity
            if record.status == "gate_failed":
                return clean(record.error or "the parity gate failed")
            if parity is not None and not parity.passed:
                return (
                    f"relative gradient error {number(parity.max_relative_error, 3)} is over "
                    f"{number(parity.tolerance, 3)} in {clean(parity.worst_tensor)}"
                )
        return None

    @property
    def failures(self) -> tuple[str, ...]:
        """The reasons of the runs that failed."""
        return tuple(clean(r.error or "no reason recorded") for r in self.records if r.status == "failed")

    @property
    def obstacle(self) -> str | None:
        """Why there is nothing to measure here: the gate's error, or that no run finished."""
        if self.gate_error is not None:
            return f"gate failed: {self.gate_error}"
        return None if self.ok else f"failed: {self.failures[0]}"

    def spread(self, value: Callable[[Record], float | None]) -> Spread | None:
        """Median and range of `value` over the finished processes that have it."""
        return spread(self.values(value))

    def values(self, value: Callable[[Record], float | None]) -> list[float]:
        """`value` of each finished process that has it."""
        return [found for record in self.ok if (found := value(record)) is not None]


@dataclass(frozen=True)
class Comparison:
    """One arm against the baseline of its scenario; every estimate is None where `withheld` says why."""

    scenario: str
    arm: str
    baseline: str
    processes: int
    """Repetitions that both arms finished; the estimates use these alone."""
    withheld: tuple[str, ...] = ()
    tokens_per_second: Estimate | None = None
    memory_above_model: Estimate | None = None
    peak_memory: Estimate | None = None
    accuracy: Estimate | None = None
    """Difference of exact match after training, as a fraction of 1."""
    loss_deviation: LossDeviation | None = None


@dataclass(frozen=True)
class Scenario:
    """The arms of one scenario on one device, the baseline first."""

    name: str
    baseline: str
    arms: tuple[Arm, ...]
    comparisons: tuple[Comparison, ...]
    warnings: tuple[str, ...]

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    @property
    def records(self) -> tuple[Record, ...]:
        """All records, arm by arm."""
        return tuple(record for arm in self.arms for record in arm.records)

    @property
    def fastest(self) -> Comparison | None:
        """The comparison with the highest tokens/s ratio; the first one if none has a ratio."""
        rated = [one for one in self.comparisons if one.tokens_per_second is not None]
        by_speed = lambda one: one.tokens_per_second.value  # noqa: E731
        return max(rated, key=by_speed) if rated else next(iter(self.comparisons), None)


def memory_above_model(record: Record) -> float | None:
    """Bytes on top of the loaded model."""
    return float(record.memory.above_model_bytes) if record.memory else None


def peak_memory(record: Record) -> float | None:
    """Peak bytes."""
    return float(record.memory.peak_bytes) if record.memory else None


def reserved_memory(record: Record) -> float | None:
    """Peak bytes that the GPU's allocator reserved."""
    reserved = record.memory.peak_reserved_bytes if record.memory else None
    return None if reserved is None else float(reserved)


def accuracy_after(record: Record) -> float | None:
    """Exact match after training."""
    return record.accuracy.after if record.accuracy else None


def compare(records: Sequence[Record], *, baseline: str, seed: int = 0) -> list[Scenario]:
    """Group `records` by scenario and device and compare every arm with `baseline`.

    Identical records (a file given twice) count once.  The order of `records` does not matter.

    Raises:
        ConfigError: several arms are there and none of them is the baseline.
    """
    unique = list({record.model_dump_json(): record for record in records}.values())
    groups: dict[str, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in unique:
        groups[record.scenario][str(record.device.get("name", ""))].append(record)
    for devices in groups.values():
        if len(devices) == 2 and "" in devices:  # a run that died before it could name its device
            devices[max(devices)] += devices.pop("")
    names = {clean(record.arm, 60) for record in unique}
    if len(names) > 1 and baseline not in names:
        raise unknown_choice("baseline arm", baseline, names)
    scenarios = []
    for name, devices in sorted(groups.items()):
        for device, found in sorted(devices.items()):
            title = clean(f"{name} on {device or 'an unnamed device'}" if len(devices) > 1 else name, 120)
            scenarios.append(_scenario(title, found, baseline, seed))
    return scenarios


def _scenario(name: str, records: list[Record], baseline: str, seed: int) -> Scenario:
    by_arm: dict[str, list[Record]] = defaultdict(list)
    for record in sorted(records, key=lambda r: (r.repetition, r.seed, r.started_at, r.run_id)):
        by_arm[clean(record.arm, 60)].append(record)
    order = sorted(by_arm, key=lambda arm: (arm != baseline, arm))
    arms = tuple(Arm(arm, by_arm[arm][0].backend, tuple(by_arm[arm])) for arm in order)
    warnings = environment_differences(records)
    for arm in arms:
        warnings += plan_differences(arm.name, arm.ok)
        if arm.failures and arm.ok:
            warnings.append(
                f"{arm.name}: {len(arm.failures)} of {plural(len(arm.records), 'process')} failed "
                f"({arm.failures[0]}); its numbers come from the others"
            )
        if arm.ok and arm.gate_error is None and not any(record.parity for record in arm.records):
            warnings.append(f"{arm.name}: the parity gate did not run, so its gradients were not checked")
    reference = arms[0] if arms[0].name == baseline else None
    comparisons = () if reference is None else tuple(compare_arms(name, arm, reference, seed) for arm in arms[1:])
    if reference is None:
        warnings.append(f"The baseline {baseline} did not run here: there is nothing to compare with.")
    counts = {one.processes for one in comparisons if one.tokens_per_second and one.tokens_per_second.low is not None}
    if counts and min(counts) < NOMINAL_PROCESSES:
        warnings.append(
            f"With {plural(min(counts), 'process')} an arm, a nominal 95 % interval of a median can cover the truth "
            f"in at most {100 * best_coverage(min(counts)):.0f} % of cases; run {NOMINAL_PROCESSES} or more for 95 %."
        )
    return Scenario(name, baseline, arms, comparisons, tuple(warnings))


def compare_arms(scenario: str, arm: Arm, baseline: Arm, seed: int) -> Comparison:
    """The arm against the baseline, over the repetitions that both finished; or why nothing can be said."""
    pairs = _pair(arm, baseline)
    reasons = [
        f"{side.name} {side.obstacle}" for side in (arm, baseline) if side.obstacle is not None
    ] or work_differences(pairs)
    reasons += [problem for side in (arm, baseline) for problem in training_problems(side.name, side.ok)]
    if reasons:
        return Comparison(scenario, arm.name, baseline.name, len(pairs), withheld=tuple(dict.fromkeys(reasons)))

    def ratio(value: Callable[[Record], float | None]) -> Estimate | None:
        values = _both(pairs, value)
        return ratio_of_medians(*values, seed=seed) if values and min(map(min, values)) > 0 else None

    def memory_ratio(value: Callable[[Record], float | None]) -> Estimate | None:
        kinds = {record.memory.kind for pair in pairs for record in pair if record.memory}
        return ratio(value) if len(kinds) == 1 else None

    accuracies = _both(pairs, accuracy_after)
    return Comparison(
        scenario,
        arm.name,
        baseline.name,
        len(pairs),
        tokens_per_second=ratio(process_rate),
        memory_above_model=memory_ratio(memory_above_model),
        peak_memory=memory_ratio(peak_memory),
        accuracy=difference_of_means(*accuracies, seed=seed) if accuracies else None,
        loss_deviation=loss_deviation(pairs),
    )


def _pair(arm: Arm, baseline: Arm) -> Pairs:
    """The runs that both arms finished with the same repetition and seed, n-th with n-th where it occurs twice."""

    def keyed(records: Iterable[Record]) -> dict[tuple[int, int, int], Record]:
        seen: dict[tuple[int, int], int] = defaultdict(int)
        found = {}
        for record in records:
            key = (record.repetition, record.seed)
            found[(*key, seen[key])] = record
            seen[key] += 1
        return found

    mine, theirs = keyed(arm.ok), keyed(baseline.ok)
    return [(mine[key], theirs[key]) for key in mine if key in theirs]


def _both(pairs: Pairs, value: Callable[[Record], float | None]) -> tuple[list[float], list[float]] | None:
    """`value` of both sides of each pair that has it on both; None if no pair has."""
    found = [(mine, theirs) for a, b in pairs if _usable(mine := value(a)) and _usable(theirs := value(b))]
    return ([mine for mine, _ in found], [theirs for _, theirs in found]) if found else None


def _usable(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)
