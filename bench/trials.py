"""A series of trials: configurations measured one after another in a worker, which is started again if one ends it."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

from bench.messages import TrialsRequest
from bench.trial_file import TrialFile
from bench.worker_process import ask_worker, worker_environment
from fastft.config import RunConfig
from fastft.errors import MeasureError
from fastft.plan import Choices, Trial

STALLED_SECONDS = 900.0
"""Beyond the time that there is, a worker that has not ended is killed."""
LONGEST_SECONDS = 24 * 3600.0
"""The time that there is where nobody set a limit."""

log = logging.getLogger("bench")


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Full optimizer steps of one trial."""

    warmup: int = 1
    """At least; more where a step has too few micro-batches to be warm after one (see `bench.rig`)."""
    timed: int = 3
    """At least 3."""


@dataclass(frozen=True)
class Deadline:
    """A point in time, or none."""

    at: float | None
    """Of `time.monotonic()`."""

    @classmethod
    def after(cls, minutes: float | None) -> "Deadline":
        """In so many minutes; None is never."""
        return cls(None if minutes is None else time.monotonic() + 60 * minutes)

    def left(self) -> float | None:
        """Seconds, not below 0."""
        return None if self.at is None else max(0.0, self.at - time.monotonic())

    def passed(self, expected_seconds: float = 0.0) -> bool:
        """Whether what takes so long would not end by then."""
        return self.at is not None and time.monotonic() + expected_seconds >= self.at


def numbered(say: Callable[[str], None], done: int, total: int) -> Callable[[str], None]:
    """`say`, with `[5/12] ` before each text: which of `total` it is of, after `done` others."""
    number = count(done + 1)
    return lambda text: say(f"[{next(number)}/{total}] {text}")


def measure_trials(
    config: RunConfig,
    choices: Sequence[Choices],
    file: TrialFile,
    *,
    steps: Steps,
    deadline: Deadline,
    on_trial: Callable[[Trial], None],
) -> bool:
    """Measure `choices` in this order and append each trial to `file`, which has its header.

    A configuration that ends the worker (a crash, a kill for lack of memory) gets the verdict `failed`, and a new
    worker goes on after it; so it does where a failure left the device unusable for the process.

    Returns:
        Whether all were measured; False where the time was up before.

    Raises:
        MeasureError: two workers in a row ended before they had measured anything, or one could not begin: the model
            cannot be loaded.
    """
    pending = list(choices)
    seen = len(file.trials())
    ended_early = False

    def follow() -> None:
        nonlocal seen
        for trial in file.trials()[seen:]:
            on_trial(trial)
            seen += 1

    while pending:
        if deadline.passed():
            return False
        before = seen
        request = TrialsRequest(
            config=config, choices=pending, warmup_steps=steps.warmup, timed_steps=steps.timed, file=file.path,
            seconds=deadline.left(),
        )  # fmt: skip
        try:
            answer = ask_worker(
                request, log_file=file.path.with_suffix(".log"),
                timeout_seconds=(LONGEST_SECONDS if request.seconds is None else request.seconds) + STALLED_SECONDS,
                environment=worker_environment(config), while_waiting=follow,
            )  # fmt: skip
        except MeasureError as error:
            follow()
            if seen - before == len(pending):
                return True  # it ended after its work
            if seen == before and ended_early:
                raise
            ended_early = seen == before
            log.warning("%s ended the worker, which starts again: %s", pending[seen - before].summary(), error)
            file.append(Trial(choices=pending[seen - before], verdict="failed", detail=str(error)))
            follow()
            pending = pending[seen - before :]
            continue
        follow()
        if answer.trials is None and seen == before:
            raise MeasureError(
                "the configurations could not be measured", got=answer.error,
                fix=f"see {file.path.with_suffix('.log')}",
            )  # fmt: skip
        if answer.trials is None:
            log.warning("the worker gave up and starts again: %s", answer.error)
            pending = pending[seen - before :]
            continue
        if answer.trials < len(pending):
            return False
        pending = []
    return True
