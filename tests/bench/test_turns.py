"""The order of turns, and the speed over all of them."""

import pytest

from bench.turns import speed_over_turns, still_to_measure
from fastft.config import RunConfig
from fastft.plan import Choices, Trial

RUN = RunConfig(model="toy-llama", batch_size=4, sequence_tokens=16)
A, B, C = (
    Choices(backend="eager", micro_batch=size, accumulation=4 // size, placement=["light"]) for size in (4, 2, 1)
)


def trial(choices: Choices, *milliseconds: float, verdict: str = "ok") -> Trial:
    return Trial(choices=choices, verdict=verdict, step_time_ms=list(milliseconds))


def test_turns_go_there_and_back_and_on_after_an_interruption():
    everything = [A, B, C]
    assert still_to_measure(everything, 3, []) == [A, B, C, C, B, A, A, B, C]
    assert still_to_measure(everything, 3, list(map(trial, (A, B, C, C)))) == [B, A, A, B, C]
    assert still_to_measure(everything, 1, list(map(trial, (A, B, C, C)))) == []


def test_speed_is_by_the_median_step_of_all_turns():
    assert speed_over_turns([trial(A, 10, 10, 11), trial(A, 500, 500), trial(A, 9)], RUN) == pytest.approx(64 / 10.5e-3)


@pytest.mark.parametrize("bad", [[], [trial(A)], [trial(A, 10), trial(A, verdict="out_of_memory")]])
def test_what_was_not_ok_has_no_speed(bad):
    assert speed_over_turns(bad, RUN) is None
