"""Running a probe, or another worker, in a spawned process, so that nothing it does can hurt the tuner.

A crash, a hang and garbage on stdout are verdicts too.  The process has its own session: ending it ends its
children.  It inherits the environment, the allocator's settings included, so that it is measured as it will run.
"""

import contextlib
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

from pydantic import ValidationError

from autotune.probe import MARKER, ProbeRequest
from fastft.plan import Trial
from fastft.siblings import ROOT

PROBE_COMMAND = (sys.executable, "-P", "-m", "autotune.probe")
TAIL_BYTES = 256 * 1024
STDERR_LINES = 8


def run_probe(
    request: ProbeRequest, *, timeout_seconds: float = 600.0, command: Sequence[str] = PROBE_COMMAND
) -> Trial:
    """Measure `request` in a new process; never raises but for an interrupt.

    Args:
        request: sent to the process's stdin as JSON.
        timeout_seconds: after it the whole process group is killed and the verdict is `timeout`.
        command: what to start.

    Returns:
        The trial that the process printed, or one with verdict `failed` or `timeout` and the last lines of its
        stderr.
    """
    ended = run_worker(request.model_dump_json(), command, MARKER, timeout_seconds, what="the probe")
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
    # Files, not pipes: a grandchild that outlives the worker would hold a pipe open, and reading it would hang.
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        stdin.write(request.encode())
        stdin.seek(0)
        process: subprocess.Popen[bytes] | None = None
        code: int | None = None
        timed_out, reason = False, ""
        try:
            process = subprocess.Popen(
                list(command), stdin=stdin, stdout=stdout, stderr=stderr, env=_environment(), start_new_session=True
            )
            code = process.wait(timeout=timeout_seconds)
            reason = _why_silent(code, what)
        except OSError as error:
            reason = f"cannot start {what}: {error}"
        except subprocess.TimeoutExpired:
            timed_out, reason = True, f"no answer in {timeout_seconds:.0f} s"
        finally:
            # Also when the tuner is interrupted, and for children that a finished worker left behind.
            _kill_group(process)
        lines = _tail(stdout).splitlines()
        answers = [line.removeprefix(marker) for line in lines if line.startswith(marker)]
        return Ended(answers, code, timed_out, reason, _last_lines(stderr))


def _why_silent(code: int, what: str) -> str:
    if code >= 0:
        return f"{what} gave no answer (exit code {code})"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
    hint = ", as the kernel does when memory runs out" if -code == signal.SIGKILL else ""
    return f"{what} was ended by {name}{hint}"


def _environment() -> dict[str, str]:
    """This process's environment, with the folder of this fastft first where it is not installed."""
    environment = dict(os.environ)
    if ROOT not in {Path(sysconfig.get_path("purelib")).resolve(), Path(sysconfig.get_path("platlib")).resolve()}:
        others = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{others}" if others else str(ROOT)
    return environment


def _kill_group(process: "subprocess.Popen[bytes] | None") -> None:
    if process is None:
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=30)  # a process in an uninterruptible driver call cannot be waited for


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
