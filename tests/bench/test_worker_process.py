import os
import sys
import time
from pathlib import Path

import pytest

from bench import worker_process
from bench.messages import MARKER, GateRequest
from bench.scenarios import Scenario
from bench.worker_process import Worker, ask_worker
from fastft.errors import MeasureError

REQUEST = GateRequest(scenario=Scenario(name="x", config={}, steps=2), arm="peft")


def use(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr(worker_process, "WORKER_COMMAND", (sys.executable, "-S", "-c", code))


def start(tmp_path: Path) -> Worker:
    return Worker(log_file=tmp_path / "logs" / "log", environment=dict(os.environ))


def test_who_waits_may_look_on_and_the_time_limit_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "import time; time.sleep(60)")
    looks: list[float] = []
    started = time.monotonic()
    with pytest.raises(MeasureError, match="did not finish in time"):
        ask_worker(
            REQUEST, log_file=tmp_path / "log", timeout_seconds=2.5, environment=dict(os.environ),
            while_waiting=lambda: looks.append(time.monotonic() - started),
        )  # fmt: skip
    assert 2 <= len(looks) <= 3
    assert 2.4 < time.monotonic() - started < 30


def test_a_worker_that_was_started_ahead_answers_when_it_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, f"import sys; sys.stdin.read(); print('{MARKER}' + '{{\"trials\": 7}}')")
    with start(tmp_path) as worker:
        time.sleep(0.3)
        assert worker.ask(REQUEST, timeout_seconds=20).trials == 7


def test_a_worker_that_died_before_it_was_asked_is_an_error_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, "import sys; sys.exit('no such library')")
    with start(tmp_path) as worker:
        time.sleep(0.5)
        with pytest.raises(MeasureError, match="ended without an answer; got exit code 1, no such library"):
            worker.ask(REQUEST, timeout_seconds=20)
