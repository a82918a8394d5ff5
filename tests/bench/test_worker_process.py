import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from autotune import runner as probes
from bench import worker_process
from bench.messages import MARKER, Answer, GateRequest
from bench.scenarios import Scenario
from bench.worker_process import Worker, ask_worker
from fastft.errors import MeasureError
from fastft.processes import PRELOADED

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


def test_a_request_larger_than_a_pipe_reaches_a_worker_that_is_still_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(
        monkeypatch,
        "import sys, time, json; time.sleep(1.5); arms = json.load(sys.stdin)['scenario']['description'];"
        f"print('{MARKER}' + json.dumps({{'trials': len(arms)}}))",
    )
    looks: list[None] = []
    large = REQUEST.model_copy(update={"scenario": REQUEST.scenario.changed()})
    large = large.model_copy(update={"scenario": large.scenario.model_copy(update={"description": "x" * 500_000})})
    with start(tmp_path) as worker:
        answer = worker.ask(large, timeout_seconds=30, while_waiting=lambda: looks.append(None))
    assert answer == Answer(trials=500_000)
    assert looks


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


def test_nothing_is_left_of_a_worker_that_was_never_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "import sys; sys.stdin.read()")
    with start(tmp_path) as worker:
        process = worker._process
    assert process.returncode == -signal.SIGKILL
    worker.end()  # a second time does nothing: the number may be another process's by now


@pytest.mark.gpu
def test_what_workers_import_ahead_makes_no_context_on_a_gpu() -> None:
    """A context alone takes 600 MiB, times the number of processes that wait."""
    code = (
        "import ctypes, sys; from fastft.processes import PRELOADED, preload; preload();"
        "assert set(PRELOADED) <= set(sys.modules);"
        "active, flags = ctypes.c_int(0), ctypes.c_uint(0);"
        "state = ctypes.CDLL('libcuda.so.1').cuDevicePrimaryCtxGetState(0, ctypes.byref(flags), ctypes.byref(active));"
        "assert state == 3 or (state == 0 and not active.value), (state, active.value)"  # 3: the driver is not in use
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=probes._environment(), timeout=120)


def test_what_workers_import_ahead_is_there() -> None:
    code = (
        "import sys; from fastft.processes import PRELOADED, preload; preload();"
        "missing = set(PRELOADED) - set(sys.modules) - {'triton.language'}; assert not missing, missing"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=probes._environment(), timeout=120)
    assert "torch" in PRELOADED
