"""A `bench.worker` in a process of its own: started, asked once, and gone whatever happens."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, ValidationError

from bench.messages import MARKER, Answer
from fastft.config import RunConfig
from fastft.errors import MeasureError
from fastft.processes import WaitingProcess, signal_name
from fastft.siblings import ROOT

WORKER_COMMAND: tuple[str, ...] = (sys.executable, "-P", "-m", "bench.worker")
"""`-P` keeps a user's own `bench` folder in the current directory from being imported instead."""


class Worker:
    """A worker that imports what it needs and waits for its one request."""

    def __init__(self, *, log_file: Path, environment: dict[str, str]) -> None:
        """Start it; its stderr goes to `log_file`."""
        log_file.parent.mkdir(parents=True, exist_ok=True)
        self._log_file = log_file
        with log_file.open("wb") as log:
            self._process = WaitingProcess(WORKER_COMMAND, environment=environment, log=log)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.end()

    def ask(
        self, request: BaseModel, *, timeout_seconds: float, while_waiting: Callable[[], None] | None = None
    ) -> Answer:
        """Hand it `request` and read its answer.

        Whatever ends this call, nothing of the worker is left running.  `while_waiting` is called every second.

        Raises:
            MeasureError: the worker was killed, timed out, or answered nothing that can be read.
        """
        code = self._process.ask(
            request.model_dump_json(), timeout_seconds=timeout_seconds, while_waiting=while_waiting
        )  # fmt: skip
        if code is None:
            raise MeasureError(
                "the worker did not finish in time", got=f"{timeout_seconds:g} s",
                fix="raise the scenario's timeout_seconds",
            )  # fmt: skip
        self._process.stdout.seek(0)
        return _read_answer(self._process.stdout.read().decode(errors="replace"), code, self._log_file)


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
        name = signal_name(code)
        hint = ", often for lack of memory" if name == "SIGKILL" else ""
        raise MeasureError("the worker was killed", got=f"{name}{hint}", fix=f"see {log_file}")
    raise MeasureError("the worker ended without an answer", got=last_words(log_file, code), fix=f"see {log_file}")


def last_words(log_file: Path, code: int) -> str:
    """The exit code, or the signal, and the last line of stderr."""
    lines = log_file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    died = signal_name(code) if code < 0 else f"exit code {code}"
    return died + (f", {lines[-1].strip()[:200]}" if lines else "")
