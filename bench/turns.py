"""Turns: configurations measured again and again, there and back, in one process.

So what drifts hits all alike, and what disturbs one measurement does not decide.
"""

from collections.abc import Sequence
from statistics import median

from fastft.config import RunConfig
from fastft.plan import Choices, Trial


def still_to_measure(everything: Sequence[Choices], turns: int, trials: Sequence[Trial]) -> list[Choices]:
    """What is left of `turns` turns after `trials`; every other turn goes back from the last to the first."""
    done = [trial.choices.model_dump_json() for trial in trials]
    left = []
    for turn in range(turns):
        for choices in everything if turn % 2 == 0 else reversed(everything):
            name = choices.model_dump_json()
            if name in done:
                done.remove(name)
            else:
                left.append(choices)
    return left


def speed_over_turns(trials: Sequence[Trial], config: RunConfig) -> float | None:
    """Tokens a second by the median step of all trials of one configuration; None where one of them was not ok."""
    times = [time for trial in trials for time in trial.step_time_ms]
    if not times or any(trial.verdict != "ok" for trial in trials):
        return None
    return 1000.0 * config.batch_size * config.sequence_tokens / median(times)
