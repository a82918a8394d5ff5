"""Running a probe in a spawned process, so that nothing it does can hurt the tuner.

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
from typing import IO

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
    # Files, not pipes: a grandchild that outlives the probe would hold a pipe open, and reading it would hang.
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        stdin.write(request.model_dump_json().encode())
        stdin.seek(0)
        process: subprocess.Popen[bytes] | None = None
        try:
            process = subprocess.Popen(
                list(command), stdin=stdin, stdout=stdout, stderr=stderr, env=_environment(), start_new_session=True
            )
            code = process.wait(timeout=timeout_seconds)
        except OSError as error:
            return Trial(choices=request.choices, verdict="failed", detail=f"cannot start the probe: {error}")
        except subprocess.TimeoutExpired:
            _kill_group(process)
            detail = f"no answer in {timeout_seconds:.0f} s\n{_last_lines(stderr)}".strip()
            return Trial(choices=request.choices, verdict="timeout", detail=detail)
        finally:
            # Also when the tuner is interrupted, and for children that a finished probe left behind.
            _kill_group(process)
        return _verdict(request, code, _tail(stdout), stderr)


def _verdict(request: ProbeRequest, code: int, output: str, stderr: IO[bytes]) -> Trial:
    lines = [line for line in output.splitlines() if line.startswith(MARKER)]
    if lines and code == 0:
        try:
            trial = Trial.model_validate_json(lines[-1].removeprefix(MARKER))
            if trial.choices == request.choices:
                return trial.model_copy(update={"detail": _printable(trial.detail)})
            reason = "the probe answered for other choices"
        except ValidationError as error:
            reason = f"the probe's answer is no trial: {error.errors()[0]['msg']}"
    elif code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
        hint = ", as the kernel does when memory runs out" if -code == signal.SIGKILL else ""
        reason = f"the probe was ended by {name}{hint}"
    else:
        reason = f"the probe gave no answer (exit code {code})"
    return Trial(choices=request.choices, verdict="failed", detail=f"{reason}\n{_last_lines(stderr)}".strip())


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
    return _printable("\n".join(lines[-STDERR_LINES:]))[-2000:]


def _printable(text: str) -> str:
    """Without control characters: details are shown in terminals and kept in plans that others import."""
    return "".join(letter for letter in text if letter in "\n\t" or unicodedata.category(letter) != "Cc")
