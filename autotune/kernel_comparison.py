"""Comparing the launches of one bucket: what runs, what is right, what is fastest.  Measuring is somebody else's."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from fastft.kernels.launches import OPERATIONS, Bucket, Launch
from fastft.plan import KernelTrial

NOISE = 0.02
"""Times closer than this are equal: the default wins, else what is declared first, so that the same machine chooses
the same."""
FINALISTS = 3
RETIMES = 3
_WARP = 32


class Limits(NamedTuple):
    """What a program may use on a device."""

    shared_bytes: int
    threads: int


class Subject(Protocol):
    """A bucket's problem, ready to be run with any launch."""

    def check(self, launch: Launch) -> str:
        """What is wrong with its results, "" if nothing; raises what compiling and launching raise."""

    def microseconds(self, launch: Launch) -> float:
        """The time of a call."""

    def recover(self) -> None:
        """After an exception: free what it holds; raises if nothing can run any more."""


def why_not(bucket: Bucket, launch: Launch, limits: Limits) -> str:
    """Why the device cannot run a launch, as far as that shows before it is compiled; "" if nothing speaks against it.

    A pipeline of s stages holds s − 1 blocks of each tensor in shared memory; the compiler may add to that.
    """
    block_bytes = launch.block_t * launch.block_f * bucket.bits // 8
    shared = (launch.stages - 1) * block_bytes * OPERATIONS[bucket.operation].wide_inputs(bucket)
    if shared > limits.shared_bytes:
        return f"needs {shared} bytes of shared memory, the device has {limits.shared_bytes}"
    if launch.warps * _WARP > limits.threads:
        return f"needs {launch.warps * _WARP} threads, the device has {limits.threads}"
    return ""


def compare_launches(
    bucket: Bucket,
    launches: Sequence[Launch],
    subject: Subject,
    limits: Limits,
    out_of_time: Callable[[], bool],
) -> list[KernelTrial]:
    """Try `launches`, the first of which is the default, and time the best ones and the default again, interleaved.

    Where the default does not run there is nothing to compare with, and nothing else is tried.  When time is out the
    rest is left out.
    """
    trials: list[KernelTrial] = []
    for launch in launches:
        if trials and (trials[0].verdict != "ok" or out_of_time()):
            break
        trials.append(_tried(bucket, launch, subject, limits))
    finalists = _finalists(trials)
    if len(finalists) > 1:
        for turn in range(RETIMES):
            # There and back: a steady drift of the clocks favours nobody.
            for trial in finalists if turn % 2 else finalists[::-1]:
                if not out_of_time():
                    trial.microseconds.append(subject.microseconds(Launch(*trial.launch)))
    return trials


def fastest(trials: Sequence[KernelTrial]) -> KernelTrial | None:
    """Of one bucket's trials, the default's first: the winner; None if the default did not run.

    The shortest time of a launch counts, because what disturbs a measurement only ever lengthens it.
    """
    if not trials or trials[0].verdict != "ok":
        return None
    ran = [trial for trial in trials if trial.verdict == "ok"]
    best = min(min(trial.microseconds) for trial in ran)
    return next(trial for trial in ran if min(trial.microseconds) <= (1 + NOISE) * best)


def _tried(bucket: Bucket, launch: Launch, subject: Subject, limits: Limits) -> KernelTrial:
    trial = KernelTrial(bucket=bucket.name, launch=list(launch), verdict="ok")
    reason = why_not(bucket, launch, limits)
    if reason:
        return trial.model_copy(update={"verdict": "too_large", "detail": reason})
    try:
        problem = subject.check(launch)
        if problem:
            return trial.model_copy(update={"verdict": "wrong", "detail": problem})
        return trial.model_copy(update={"microseconds": [subject.microseconds(launch)]})
    except Exception as error:
        detail = f"{type(error).__name__}: {str(error)[:200]}"
    subject.recover()
    return trial.model_copy(update={"verdict": "failed", "detail": detail})


def _finalists(trials: Sequence[KernelTrial]) -> list[KernelTrial]:
    ran = [trial for trial in trials if trial.verdict == "ok"]
    best = sorted(ran, key=lambda trial: trial.microseconds[0])[:FINALISTS]
    return [trial for trial in ran if trial in best or trial is trials[0]]
