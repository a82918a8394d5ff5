import pytest

from autotune.memory import fit_peaks, predicted_too_large
from uniform_trials import trial


def test_a_line_is_recovered() -> None:
    trials = [trial("light", size, 1500 + 7 * size * 100) for size in (1, 2, 4)]
    fit = fit_peaks(trials, 100)["eager", "light"]
    assert fit.base_bytes == pytest.approx(1500)
    assert fit.bytes_per_token == pytest.approx(7)
    assert fit.predict(800) == pytest.approx(1500 + 5600)


def test_one_point_starts_at_the_model() -> None:
    fit = fit_peaks([trial("full", 2, 1400)], 100)["eager", "full"]
    assert (fit.base_bytes, fit.bytes_per_token, fit.points) == (1000, 2.0, 1)


def test_only_what_ran_counts_and_the_slope_is_not_negative() -> None:
    trials = [trial("light", 1, 2000), trial("light", 2, 1900), trial("light", 4, 9000, "out_of_memory")]
    assert fit_peaks(trials, 100)["eager", "light"].bytes_per_token == 0
    assert fit_peaks([trial("mlp", 1, None)], 100) == {}


def test_prediction_needs_two_points_and_a_clear_excess() -> None:
    one = [trial("light", 1, 2000)]
    two = [*one, trial("light", 2, 3000)]
    large = trial("light", 8, None).choices  # 9000 by the line
    assert not predicted_too_large(large, one, 100, 2500)
    assert predicted_too_large(large, two, 100, 8500)
    assert not predicted_too_large(large, two, 100, 8900)
    assert not predicted_too_large(trial("full", 8, None).choices, two, 100, 10)
