"""Worker processes: how one is started, asked once and gone whatever happens, and what it does on its side.

its starter    WaitingProcess(command, …).ask(request, …)
itself         die_with_parent(), preload(), read the request from stdin, answer on stdout, end_at_once(0)
"""

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from threading import Thread
from typing import IO, NoReturn

PRELOADED = ("torch", "triton.language", "transformers.models.llama.modeling_llama", "peft")
"""What every worker needs and takes longest to import.  None of it takes memory of a GPU: bitsandbytes, which PEFT
imports, asks the driver for the devices' capabilities, and that makes no context (docs/log.md)."""
UNKILLABLE_SECONDS = 30.0
"""After so long a process that was killed is left to the kernel: it hangs in a driver's call."""


class WaitingProcess:
    """A process with a session of its own that imports, and waits on stdin for its one request."""

    def __init__(self, command: Sequence[str], *, environment: Mapping[str, str], log: IO[bytes] | None = None) -> None:
        """Start it.

        Args:
            log: for its stderr; a temporary file if None.

        Raises:
            OSError: it cannot be started.
        """
        self._ended = False
        with contextlib.ExitStack() as files:
            # Files, not pipes: a grandchild that outlives the worker would hold a pipe open, and reading would hang.
            self.stdout: IO[bytes] = files.enter_context(tempfile.TemporaryFile())
            self.stderr: IO[bytes] = log if log is not None else files.enter_context(tempfile.TemporaryFile())
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=self.stdout, stderr=self.stderr, env=environment,
                start_new_session=True,
            )  # fmt: skip
            self._files = files.pop_all()

    def __enter__(self) -> "WaitingProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def waits(self) -> bool:
        """Whether it still runs."""
        return self.process.poll() is None

    def ask(
        self, request: str, *, timeout_seconds: float, while_waiting: Callable[[], None] | None = None
    ) -> int | None:
        """Send the request and wait for the end; nothing of the process is left running, also after an interrupt.

        Args:
            while_waiting: called every second.

        Returns:
            The exit code, negative for a signal; None where it did not end in time.
        """
        # The process may not have come to reading, and a pipe holds little: what waits for it must not wait here.
        sender = Thread(target=self._send, args=(request.encode(),), daemon=True)
        sender.start()
        try:
            return self._wait(timeout_seconds, while_waiting)
        finally:
            self._kill_group()
            sender.join(timeout=UNKILLABLE_SECONDS)

    def end(self) -> None:
        """Kill it and its children; what they wrote to temporary files is gone."""
        self._kill_group()
        self._close_stdin()
        self._files.close()

    def _send(self, text: bytes) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # it ended: its last words say why
            self.process.stdin.write(text)
        self._close_stdin()

    def _close_stdin(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # what it did not read is lost with it
            self.process.stdin.close()

    def _wait(self, seconds: float, while_waiting: Callable[[], None] | None) -> int | None:
        end = time.monotonic() + seconds
        while True:
            left = max(0.0, end - time.monotonic())
            try:
                return self.process.wait(timeout=left if while_waiting is None else min(1.0, left))
            except subprocess.TimeoutExpired:
                if while_waiting is None or left <= 1.0:
                    return None
                while_waiting()

    def _kill_group(self) -> None:
        if self._ended:
            return  # its number may be another's by now
        with contextlib.suppress(ProcessLookupError, PermissionError):  # nothing is left of it
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=UNKILLABLE_SECONDS)
            self._ended = True


def signal_name(code: int) -> str:
    """The signal behind a negative exit code: `SIGKILL` for −9."""
    return signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)


def die_with_parent() -> None:
    """If whoever started this process is killed, it must not go on holding the device.

    Linux only (`man 2 prctl`, PR_SET_PDEATHSIG); elsewhere nothing happens.
    """
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def preload() -> None:
    """Import `PRELOADED`, while nobody waits for it."""
    for name in PRELOADED:
        with contextlib.suppress(ImportError):  # the work will say what is missing
            importlib.import_module(name)


def end_at_once(code: int) -> NoReturn:
    """Exit without taking Python, PyTorch and a model apart, which takes seconds: nothing is left to be saved."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
