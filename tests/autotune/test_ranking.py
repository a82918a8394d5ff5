import pytest

from autotune.ranking import Standings
from fastft.plan import Choices, Trial


def choices(number: int) -> Choices:
    return Choices(backend="eager", micro_batch=number, accumulation=1, placement=["light"])


def trial(number: int, *times: float, verdict: str = "ok") -> Trial:
    return Trial.model_validate({"choices": choices(number), "verdict": verdict, "step_time_ms": times})


def test_speed_is_the_median_of_the_fastest_trial() -> None:
    standings = Standings([trial(1, 10, 10, 99), trial(1, 20, 30, 40), trial(2, 5)], step_tokens=100)
    assert standings.speed(choices(1)) == pytest.approx(100 * 1000 / 10)
    assert standings.speed(choices(3)) is None


def test_what_another_tuning_measured_counts_only_where_this_one_measured_nothing() -> None:
    before = trial(1, 5).model_copy(update={"reused": True})
    assert Standings([before], step_tokens=1).speed(choices(1)) == pytest.approx(1000 / 5)
    assert Standings([before, trial(1, 10)], step_tokens=1).speed(choices(1)) == pytest.approx(1000 / 10)


def test_one_bad_trial_disqualifies() -> None:
    standings = Standings([trial(1, 10), trial(2, 1), trial(2, verdict="out_of_memory")], step_tokens=1)
    assert standings.speed(choices(2)) is None
    assert standings.winner() == choices(1)


def test_the_earlier_wins_within_the_noise_and_the_faster_beyond_it() -> None:
    assert Standings([trial(1, 100.0), trial(2, 99.5)], 1).winner() == choices(1)
    assert Standings([trial(1, 100.0), trial(2, 98.0)], 1).winner() == choices(2)
    assert Standings([trial(1, 102.0), trial(2, 100.0), trial(3, 99.5)], 1).winner() == choices(2)


def test_finalists_are_the_close_ones_and_the_default() -> None:
    trials = [trial(1, 200.0), trial(2, 100.0), trial(3, 101.0), trial(4, 102.0), trial(5, 110.0)]
    standings = Standings(trials, 1)
    assert standings.finalists(4) == [choices(2), choices(3), choices(4), choices(1)]
    assert standings.finalists(2) == [choices(2), choices(1)]
    assert standings.finalists(1) == [choices(2), choices(1)]
    assert Standings([trial(1, 100.0), trial(2, 200.0)], 1).finalists(3) == [choices(1)]
    assert Standings([trial(1, verdict="timeout"), trial(2, 200.0)], 1).finalists(3) == [choices(2)]


def test_nothing_ran() -> None:
    for trials in ([], [trial(1, verdict="failed")]):
        standings = Standings(trials, 1)
        assert standings.best() is None
        assert standings.winner() is None
        assert standings.finalists(3) == []
