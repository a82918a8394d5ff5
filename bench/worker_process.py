"""A `bench.worker` in a process of its own: started, asked once, and gone whatever happens."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import Thread

from pydantic import BaseModel, ValidationError

from bench.messages import MARKER, Answer
from fastft.config import RunConfig
from fastft.errors import MeasureError
from fastft.siblings import ROOT

WORKER_COMMAND: tuple[str, ...] = (sys.executable, "-P", "-m", "bench.worker")
"""`-P` keeps a user's own `bench` folder in the current directory from being imported instead."""


class Worker:
    """A worker that imports what it needs and waits for its one request."""

    def __init__(self, *, log_file: Path, environment: dict[str, str]) -> None:
        """Start it, in its own process group.

        Args:
            log_file: for its stderr.
        """
        log_file.parent.mkdir(parents=True, exist_ok=True)
        self._log_file, self._ended = log_file, False
        # Files instead of pipes: a pipe that nobody reads fills up, and a grandchild that keeps one open blocks.
        with ExitStack() as files:
            self._stdout = files.enter_context(tempfile.TemporaryFile())
            stderr = files.enter_context(log_file.open("wb"))
            self._process = subprocess.Popen(
                WORKER_COMMAND, stdin=subprocess.PIPE, stdout=self._stdout, stderr=stderr, env=environment,
                start_new_session=True,
            )  # fmt: skip
            self._files = files.pop_all()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def ask(
        self, request: BaseModel, *, timeout_seconds: float, while_waiting: Callable[[], None] | None = None
    ) -> Answer:
        """Hand it `request` and read its answer.

        Whatever ends this call, nothing of the worker is left running.  `while_waiting` is called every second.

        Raises:
            MeasureError: the worker was killed, timed out, or answered nothing that can be read.
        """
        # The worker may not have come to reading, and a pipe holds little: what waits for it must not wait here.
        sender = Thread(target=self._send, args=(request.model_dump_json().encode(),), daemon=True)
        sender.start()
        try:
            self._wait(timeout_seconds, while_waiting)
        except subprocess.TimeoutExpired:
            raise MeasureError(
                "the worker did not finish in time", got=f"{timeout_seconds:g} s",
                fix="raise the scenario's timeout_seconds",
            ) from None  # fmt: skip
        finally:
            self._end_group()
            sender.join()
        self._stdout.seek(0)
        return _read_answer(self._stdout.read().decode(errors="replace"), self._process.returncode, self._log_file)

    def end(self) -> None:
        """Kill it, if it still runs; what it wrote to stdout is gone."""
        self._end_group()
        self._close_stdin()
        self._files.close()

    def _send(self, text: bytes) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):  # it ended: its last words say why
            self._process.stdin.write(text)
        self._close_stdin()

    def _close_stdin(self) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):  # what it did not read is lost with it
            self._process.stdin.close()

    def _wait(self, seconds: float, while_waiting: Callable[[], None] | None) -> None:
        """`subprocess.TimeoutExpired` after `seconds`."""
        if while_waiting is None:
            self._process.wait(timeout=seconds)
            return
        end = time.monotonic() + seconds
        while True:
            left = end - time.monotonic()
            try:
                self._process.wait(timeout=max(0.0, min(1.0, left)))
                return
            except subprocess.TimeoutExpired:
                if left <= 1.0:
                    raise
                while_waiting()

    def _end_group(self) -> None:
        """Kill what is left of the worker's process group and reap the worker."""
        if self._ended:
            return  # its number may be another's by now
        with suppress(ProcessLookupError, PermissionError):  # nothing is left of it
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._ended = True


def ask_worker(
    request: BaseModel,
    *,
    log_file: Path,
    timeout_seconds: float,
    environment: dict[str, str],
    while_waiting: Callable[[], None] | None = None,
) -> Answer:
    """Start a worker, ask it, and see it gone; see `Worker`."""
    with Worker(log_file=log_file, environment=environment) as worker:
        return worker.ask(request, timeout_seconds=timeout_seconds, while_waiting=while_waiting)


def worker_environment(config: RunConfig) -> dict[str, str]:
    """The environment of every worker of a run, the same for all arms."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0", "TOKENIZERS_PARALLELISM": "false"}
    if config.offline:
        environment["HF_HUB_OFFLINE"] = "1"
    return environment


def _read_answer(printed: str, code: int, log_file: Path) -> Answer:
    lines = [line for line in printed.splitlines() if line.startswith(MARKER)]
    if lines:
        try:
            return Answer.model_validate_json(lines[-1].removeprefix(MARKER))
        except ValidationError as error:
            first = error.errors()[0]
            raise MeasureError(
                "the worker's answer cannot be read", got=f"{'.'.join(map(str, first['loc']))}: {first['msg']}",
                fix=f"see {log_file}",
            ) from error  # fmt: skip
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
        hint = ", often for lack of memory" if name == "SIGKILL" else ""
        raise MeasureError("the worker was killed", got=f"{name}{hint}", fix=f"see {log_file}")
    raise MeasureError("the worker ended without an answer", got=_last_words(log_file, code), fix=f"see {log_file}")


def _last_words(log_file: Path, code: int) -> str:
    """The exit code and the last line of stderr."""
    lines = log_file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"exit code {code}" + (f", {lines[-1].strip()[:200]}" if lines else "")
