"""Running a probe, or another worker, in a spawned process, so that nothing it does can hurt the tuner.

A crash, a hang and garbage on stdout are verdicts too.  The process inherits the environment, the allocator's settings
included, so that it is measured as it will run.
"""

import contextlib
import os
import sys
import sysconfig
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

from pydantic import ValidationError

from autotune.probe import MARKER, ProbeRequest
from fastft.plan import Trial
from fastft.processes import WaitingProcess, signal_name
from fastft.siblings import ROOT

PROBE_COMMAND = (sys.executable, "-P", "-m", "autotune.probe")
TAIL_BYTES = 256 * 1024
STDERR_LINES = 8


def run_probe(
    request: ProbeRequest,
    *,
    timeout_seconds: float = 600.0,
    command: Sequence[str] = PROBE_COMMAND,
    spares: "Spares | None" = None,
) -> Trial:
    """Measure `request` in a process of its own; never raises but for an interrupt.

    Args:
        request: sent to the process's stdin as JSON.
        timeout_seconds: after it the whole process group is killed and the verdict is `timeout`.
        command: what to start.
        spares: take one of these processes instead.

    Returns:
        The trial that the process printed, or one with verdict `failed` or `timeout` and the last lines of its
        stderr.
    """
    text = request.model_dump_json()
    if spares is not None:
        ended = spares.run(text, MARKER, timeout_seconds, what="the probe")
    else:
        ended = run_worker(text, command, MARKER, timeout_seconds, what="the probe")
    if ended.timed_out:
        return Trial(choices=request.choices, verdict="timeout", detail=ended.detail)
    if not (ended.answers and ended.code == 0):
        return Trial(choices=request.choices, verdict="failed", detail=ended.detail)
    try:
        trial = Trial.model_validate_json(ended.answers[-1])
        if trial.choices == request.choices:
            return trial.model_copy(update={"detail": printable(trial.detail)})
        reason = "the probe answered for other choices"
    except ValidationError as error:
        reason = f"the probe's answer is no trial: {error.errors()[0]['msg']}"
    return Trial(choices=request.choices, verdict="failed", detail=f"{reason}\n{ended.last_words}".strip())


class Ended(NamedTuple):
    """How a worker process ended."""

    answers: list[str]
    """What it printed behind its marker, line by line."""
    code: int | None
    """Its exit code, negative for a signal; None where it did not start or did not end in time."""
    timed_out: bool
    reason: str
    last_words: str
    """The end of its stderr."""

    @property
    def detail(self) -> str:
        """Why it gave no (more) answers."""
        return f"{self.reason}\n{self.last_words}".strip()


def run_worker(request: str, command: Sequence[str], marker: str, timeout_seconds: float, *, what: str) -> Ended:
    """Start `command`, send it `request`, collect its answers; never raises but for an interrupt.

    After `timeout_seconds` the whole process group is killed.
    """
    with Spares(command) as one:
        return one.run(request, marker, timeout_seconds, what=what)


class Spares:
    """Processes that wait for their request, each for one, started a batch at a time.

    Importing takes a probe longer than many a measurement.  Those of a batch import together, while the first of them
    does too, so that later ones neither wait for it nor do it beside a measurement.
    """

    def __init__(self, command: Sequence[str] = PROBE_COMMAND, count: int = 1) -> None:
        """`count` at a time."""
        self._command, self._count = list(command), count
        self._waiting: list[WaitingProcess] = []

    def __enter__(self) -> "Spares":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._waiting:
            worker.end()
        self._waiting.clear()

    def begin(self) -> None:
        """Start a batch now, where none waits."""
        with contextlib.suppress(OSError):  # whoever asks one is told
            self._start()

    def run(self, request: str, marker: str, timeout_seconds: float, *, what: str) -> Ended:
        """As `run_worker`; the time starts with the request."""
        try:
            worker = self._take()
        except OSError as error:
            return Ended([], None, False, f"cannot start {what}: {error}", "")
        return _answer(worker, request, marker, timeout_seconds, what)

    def _take(self) -> WaitingProcess:
        while self._waiting:
            worker = self._waiting.pop(0)
            if worker.waits:
                return worker
            worker.end()
        self._start()
        return self._waiting.pop(0)

    def _start(self) -> None:
        while len(self._waiting) < self._count:
            self._waiting.append(WaitingProcess(self._command, environment=_environment()))


def _answer(process: WaitingProcess, request: str, marker: str, timeout_seconds: float, what: str) -> Ended:
    """Ask the process and end it; never raises but for an interrupt."""
    with process:  # also when the tuner is interrupted
        code = process.ask(request, timeout_seconds=timeout_seconds)
        # Only now: children that a finished worker left behind might have gone on writing.
        lines = _tail(process.stdout).splitlines()
        answers = [line.removeprefix(marker) for line in lines if line.startswith(marker)]
        reason = f"no answer in {timeout_seconds:.0f} s" if code is None else _why_silent(code, what)
        return Ended(answers, code, code is None, reason, _last_lines(process.stderr))


def _why_silent(code: int, what: str) -> str:
    if code >= 0:
        return f"{what} gave no answer (exit code {code})"
    name = signal_name(code)
    hint = ", as the kernel does when memory runs out" if name == "SIGKILL" else ""
    return f"{what} was ended by {name}{hint}"


def _environment() -> dict[str, str]:
    """This process's environment, with the folder of this fastft first where it is not installed."""
    environment = dict(os.environ)
    if ROOT not in {Path(sysconfig.get_path("purelib")).resolve(), Path(sysconfig.get_path("platlib")).resolve()}:
        others = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{others}" if others else str(ROOT)
    return environment


def _tail(stream: IO[bytes]) -> str:
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, size - TAIL_BYTES))
    return stream.read().decode(errors="replace")


def _last_lines(stderr: IO[bytes]) -> str:
    lines = [line for line in _tail(stderr).splitlines() if line.strip()]
    return printable("\n".join(lines[-STDERR_LINES:]))[-2000:]


def printable(text: str) -> str:
    """Without control characters: details are shown in terminals and kept in plans that others import."""
    return "".join(letter for letter in text if letter in "\n\t" or unicodedata.category(letter) != "Cc")
