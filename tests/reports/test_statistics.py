import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft.errors import MeasureError
from reports import statistics
from reports.statistics import (
    Estimate,
    best_coverage,
    difference_of_means,
    loss_deviation,
    mean_sd,
    median_interval,
    process_rate,
    process_step_time,
    ratio_of_medians,
    spread,
)

positive = st.floats(0.1, 1e9)


def test_process_rate_is_the_median_of_counted_step_rates(record):
    run = record(warmup_steps=1, step_time_ms=[9000.0, 100.0, 200.0, 50.0], step_tokens=[10, 10, 10, 10])
    assert process_rate(run) == pytest.approx(100.0)  # rates 100, 50, 200; the slow warm-up step does not count
    assert process_step_time(run) == 100.0
    assert process_rate(record(status="failed", error="no")) is None
    assert process_rate(record(warmup_steps=12)) is None


def test_ratio_is_exact_on_degenerate_data():
    found = ratio_of_medians([3.0] * 4, [2.0] * 4)
    assert (found.value, found.low, found.high, found.processes) == (1.5, 1.5, 1.5, 4)
    assert found.verdict == "higher"
    assert ratio_of_medians([2.0] * 3, [2.0] * 3).verdict == "equal"


def test_pairing_cancels_what_a_repetition_shares():
    drift = np.array([1.0, 1.3, 0.8, 1.1, 0.9, 1.2])
    found = ratio_of_medians(150 * drift, 100 * drift)
    assert found.low == pytest.approx(1.5)
    assert found.high == pytest.approx(1.5)


def test_no_interval_below_three_processes():
    for count in (1, 2):
        found = ratio_of_medians([2.0] * count, [1.0] * count)
        assert (found.value, found.low, found.high, found.verdict) == (2.0, None, None, "too few processes")
        assert median_interval([1.0] * count) is None
    assert ratio_of_medians([2.0] * 3, [1.0] * 3).low is not None


def test_ambiguous_where_the_interval_holds_the_neutral_value():
    assert ratio_of_medians([0.9, 1.0, 1.1, 1.2], [1.0] * 4).verdict == "ambiguous"
    assert difference_of_means([0.7, 0.72, 0.74], [0.72, 0.72, 0.72]).verdict == "ambiguous"
    assert difference_of_means([0.6, 0.61, 0.62], [0.7, 0.7, 0.7]).verdict == "lower"
    assert Estimate(1.1, 1.0, 1.2, 5, neutral=1.0).verdict == "ambiguous"  # touching is not beating


def test_seed_decides_the_interval_and_nothing_else_does():
    arm, baseline = np.random.default_rng(3).normal([[1.4], [1.0]], 0.1, (2, 9))
    assert ratio_of_medians(arm, baseline, seed=5) == ratio_of_medians(arm, baseline, seed=5)
    assert difference_of_means(arm, baseline, seed=1) != difference_of_means(arm, baseline, seed=2)


@settings(max_examples=25)
@given(st.lists(st.tuples(positive, positive), min_size=3, max_size=9))
def test_interval_lies_within_the_possible_and_inverts(pairs):
    arm, baseline = zip(*pairs, strict=True)
    found = ratio_of_medians(arm, baseline)
    assert min(arm) / max(baseline) * (1 - 1e-9) <= found.low <= found.high <= max(arm) / min(baseline) * (1 + 1e-9)
    if len(pairs) % 2:  # the median of an odd number of values is one of them
        assert ratio_of_medians(baseline, arm).value == pytest.approx(1 / found.value)


def test_coverage_in_simulation(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 500)
    random = np.random.default_rng(0)
    covered = {}
    for processes in (3, 10):
        hits = 0
        for trial in range(300):
            shared = random.normal(1.0, 0.02, processes)
            arm = 140 * shared * random.normal(1.0, 0.02, processes)
            baseline = 100 * shared * random.normal(1.0, 0.02, processes)
            found = ratio_of_medians(arm, baseline, seed=trial)
            hits += found.low <= 1.4 <= found.high
        covered[processes] = hits / 300
    assert 0.92 <= covered[10] <= 1.0
    assert covered[3] == pytest.approx(best_coverage(3), abs=0.08)  # what the report warns of


def test_best_coverage_reaches_the_nominal_value_at_six():
    assert best_coverage(3) == 0.75
    assert best_coverage(statistics.NOMINAL_PROCESSES - 1) < 0.95 < best_coverage(statistics.NOMINAL_PROCESSES)


@pytest.mark.parametrize(
    ("arm", "baseline"), [([], []), ([1.0], [1.0, 2.0]), ([0.0], [1.0]), ([1.0], [-1.0]), ([math.nan], [1.0])]
)
def test_ratio_refuses_what_has_none(arm, baseline):
    with pytest.raises(MeasureError):
        ratio_of_medians(arm, baseline)


def test_spread_and_mean():
    assert spread([]) is None
    found = spread([3.0, 1.0, 2.0])
    assert (found.median, found.low, found.high, found.processes) == (2.0, 1.0, 3.0, 3)
    assert mean_sd([0.5]) == (0.5, None)
    assert mean_sd([1.0, 2.0, 3.0]) == (2.0, 1.0)


def test_loss_deviation_names_step_and_seed(record):
    same = (record("eager", 0, loss=[2.0, 1.0]), record("peft", 0, loss=[2.0, 1.0]))
    other = (record("eager", 1, loss=[2.0, 1.1, 5.0]), record("peft", 1, loss=[2.0, 1.0, 5.0]))
    found = loss_deviation([same, other])
    assert (found.value, found.step, found.seed) == (pytest.approx(0.1), 2, 101)
    assert loss_deviation([]) is None
    broken = (record(loss=[math.nan]), record(loss=[1.0]))
    assert loss_deviation([broken]).value == math.inf
