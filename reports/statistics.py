"""The statistics of a report: one number a process, medians over processes, bootstrap intervals.

A process (one `Record`) is the unit of sampling.  The steps within a process share its allocator, its clocks
and its neighbours, so they are not independent and are never resampled.

P processes, B bootstrap resamples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fastft.errors import MeasureError
from fastft.record import Record

RESAMPLES = 10_000
CONFIDENCE = 0.95
MIN_PROCESSES = 3
"""With fewer, an interval would be made up."""
NOMINAL_PROCESSES = 6
"""From here on an interval of a median can reach its nominal 95 %: see `best_coverage`."""

Verdict = Literal["higher", "lower", "equal", "ambiguous", "too few processes"]


@dataclass(frozen=True)
class Spread:
    """A value of several processes: its median and its range."""

    median: float
    low: float
    high: float
    processes: int


@dataclass(frozen=True)
class Estimate:
    """How an arm compares with the baseline in one quantity.

    `low` and `high` bound the 95 % interval; both are None where fewer than `MIN_PROCESSES` pairs exist.
    """

    value: float
    low: float | None
    high: float | None
    processes: int
    neutral: float
    """What no difference looks like: 1 for a ratio, 0 for a difference."""

    @property
    def verdict(self) -> Verdict:
        """Where the interval lies; `ambiguous` where it spans the neutral value, which a mere touch does too."""
        if self.low is None or self.high is None:
            return "too few processes"
        if self.low == self.high == self.neutral:
            return "equal"
        if self.low > self.neutral:
            return "higher"
        return "lower" if self.high < self.neutral else "ambiguous"


@dataclass(frozen=True)
class LossDeviation:
    """The largest |loss − baseline's loss| / |baseline's loss| at any step, same seed, and where it was."""

    value: float
    step: int
    """Counted from 1."""
    seed: int


def step_rates(record: Record) -> list[float]:
    """Tokens per second of each counted step; empty if the run is not ok or recorded none."""
    if record.status != "ok":
        return []
    times = record.step_time_ms[record.warmup_steps :]
    tokens = record.step_tokens[record.warmup_steps :]
    return [1000.0 * count / time for count, time in zip(tokens, times, strict=False) if time > 0]


def process_rate(record: Record) -> float | None:
    """The median of `step_rates`, in tokens per second.

    The median, because one page fault or clock change must not decide; `Record.tokens_per_second` is the mean.
    """
    rates = step_rates(record)
    return float(np.median(rates)) if rates else None


def process_step_time(record: Record) -> float | None:
    """The median time of the counted steps in ms."""
    times = record.step_time_ms[record.warmup_steps :] if record.status == "ok" else []
    return float(np.median(times)) if times else None


def spread(values_P: Sequence[float]) -> Spread | None:
    """Median and range; None of nothing."""
    if not values_P:
        return None
    return Spread(float(np.median(values_P)), min(values_P), max(values_P), len(values_P))


def mean_sd(values_P: Sequence[float]) -> tuple[float, float | None]:
    """The mean and the sample standard deviation (n − 1), which one value does not have."""
    values = np.asarray(values_P, dtype=np.float64)
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else None


def ratio_of_medians(arm_P: Sequence[float], baseline_P: Sequence[float], *, seed: int = 0) -> Estimate:
    """median(arm) / median(baseline) with a paired percentile bootstrap over processes.

    Entry i of both is the same repetition.  A resample draws P repetitions with replacement and takes the same
    ones from both arms, so what a repetition's arms share (its data, its hour) cancels instead of widening the
    interval (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 8 and 13).

    Raises:
        MeasureError: the lengths differ, are zero, or a value is not finite and above zero.
    """
    arm, baseline = _paired(arm_P, baseline_P)
    if min(arm.min(), baseline.min()) <= 0:
        raise MeasureError("a ratio needs values above zero", got=float(min(arm.min(), baseline.min())))
    value = float(np.median(arm) / np.median(baseline))
    low = high = None
    if len(arm) >= MIN_PROCESSES:
        draw_BP = _resample(len(arm), seed)
        low, high = _percentiles(np.median(arm[draw_BP], axis=1) / np.median(baseline[draw_BP], axis=1))
    return Estimate(value, low, high, len(arm), neutral=1.0)


def difference_of_means(arm_P: Sequence[float], baseline_P: Sequence[float], *, seed: int = 0) -> Estimate:
    """mean(arm) − mean(baseline), resampled in the same way.

    Raises:
        MeasureError: the lengths differ, are zero, or a value is not finite.
    """
    arm, baseline = _paired(arm_P, baseline_P)
    difference = arm - baseline
    low = high = None
    if len(arm) >= MIN_PROCESSES:
        low, high = _percentiles(difference[_resample(len(arm), seed)].mean(axis=1))
    return Estimate(float(difference.mean()), low, high, len(arm), neutral=0.0)


def median_interval(values_P: Sequence[float], *, seed: int = 0) -> tuple[float, float] | None:
    """The 95 % bootstrap interval of one arm's median; None below `MIN_PROCESSES`."""
    values = np.asarray(values_P, dtype=np.float64)
    if len(values) < MIN_PROCESSES:
        return None
    return _percentiles(np.median(values[_resample(len(values), seed)], axis=1))


def best_coverage(processes: int) -> float:
    """How often the range of `processes` values holds the true median: 1 − 2^(1 − P).

    A bootstrap interval of a median lies within that range, so it cannot cover more: 75 % at 3 processes,
    94 % at 5, 97 % at 6.
    """
    return 1.0 - 2.0 ** (1 - processes)


def loss_deviation(pairs: Sequence[tuple[Record, Record]]) -> LossDeviation | None:
    """The largest relative deviation of the loss over (arm, baseline) pairs of equal seed; None without losses."""
    worst: LossDeviation | None = None
    for arm, baseline in pairs:
        for step, (loss, reference) in enumerate(zip(arm.loss, baseline.loss, strict=False), 1):
            value = abs(loss - reference) / max(abs(reference), 1e-12)
            value = math.inf if math.isnan(value) else value
            if worst is None or value > worst.value:
                worst = LossDeviation(value, step, arm.seed)
    return worst


def _paired(arm_P: Sequence[float], baseline_P: Sequence[float]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    arm, baseline = np.asarray(arm_P, dtype=np.float64), np.asarray(baseline_P, dtype=np.float64)
    if len(arm) != len(baseline) or not len(arm):
        raise MeasureError("paired statistics need as many values of both arms", got=f"{len(arm)} and {len(baseline)}")
    if not (np.isfinite(arm).all() and np.isfinite(baseline).all()):
        raise MeasureError("a measured value is not finite", got=[*arm_P, *baseline_P])
    return arm, baseline


def _resample(processes: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(processes, size=(RESAMPLES, processes))


def _percentiles(values_B: NDArray[np.float64]) -> tuple[float, float]:
    tail = (1.0 - CONFIDENCE) / 2
    low, high = np.quantile(values_B, [tail, 1.0 - tail])
    return float(low), float(high)
