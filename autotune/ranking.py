"""Who leads: speeds of what was tried, finalists and winner.  Pure functions of the trials."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from fastft.plan import Choices, Trial

NOISE = {"cuda": 0.01, "cpu": 0.05}
"""Speeds closer than this are equal: the default wins, else what needs the least memory.  On a CPU the same candidate
varies by 5 % from process to process."""
MEASURED = ("ok", "over_cap")
"""Verdicts of trials that ran to the end: their times and peaks count."""
FINALIST_SPREAD = 0.03
"""Candidates this close to the best are timed again."""


@dataclass(frozen=True)
class Standings:
    """A view of the trials so far, the default's first; it follows the list as that grows."""

    trials: Sequence[Trial]
    step_tokens: int
    """Tokens of one optimizer step: the same for every candidate."""
    noise: float = NOISE["cuda"]

    def order(self) -> list[Choices]:
        """What was tried, in the order of trying."""
        found: list[Choices] = []
        for trial in self.trials:
            if trial.choices not in found:
                found.append(trial.choices)
        return found

    def speed(self, choices: Choices) -> float | None:
        """Tokens a second by the median step of its fastest trial; None if any of its trials was not ok.

        The fastest, because what disturbs a measurement (another program, a hot GPU) only ever slows it.  What an
        earlier tuning measured counts only where this one measured nothing.
        """
        trials = [trial for trial in self.trials if trial.choices == choices]
        if not trials or any(trial.verdict != "ok" or not trial.step_time_ms for trial in trials):
            return None
        trials = [trial for trial in trials if not trial.reused] or trials
        return 1000.0 * self.step_tokens / min(median(trial.step_time_ms) for trial in trials)

    def best(self) -> Trial | None:
        """The first trial of the fastest; None if nothing ran."""
        ranked = self._ranked()
        return None if not ranked else next(trial for trial in self.trials if trial.choices == ranked[0][1])

    def finalists(self, count: int) -> list[Choices]:
        """Up to `count` candidates close to the best, the fastest first, and the default.

        The default is timed again however far behind it is, because the plan's gain is stated against it.
        """
        ranked = self._ranked()
        close = [choices for speed, choices in ranked if speed >= (1 - FINALIST_SPREAD) * ranked[0][0]][:count]
        default = self.trials[0].choices if self.trials else None
        if default is None or default in close or self.speed(default) is None:
            return close
        return [*close[: max(1, count - 1)], default]

    def winner(self, among: Sequence[Choices] | None = None) -> Choices | None:
        """Of those whose speed is the best within the noise, the default, else the smallest; None if nothing ran.

        Args:
            among: nothing else is looked at; None for all that was tried.
        """
        ranked = [(speed, choices) for speed, choices in self._ranked() if among is None or choices in among]
        fast = [choices for speed, choices in ranked if speed >= (1 - self.noise) * ranked[0][0]]
        if not fast:
            return None
        default = self.trials[0].choices
        if default in fast:
            return default
        # `min` takes the earlier of equals, so the same measurements always choose the same.
        return min((choices for choices in self.order() if choices in fast), key=self.peak)

    def peak(self, choices: Choices) -> int:
        """The highest peak of its trials, in bytes; 0 where none was measured."""
        return max((trial.peak_bytes or 0 for trial in self.trials if trial.choices == choices), default=0)

    def _ranked(self) -> list[tuple[float, Choices]]:
        speeds = [(speed, choices) for choices in self.order() if (speed := self.speed(choices)) is not None]
        return sorted(speeds, key=lambda pair: -pair[0])
