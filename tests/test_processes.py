import os
import signal
import subprocess
import sys
import time

import pytest

from fastft.processes import PRELOADED, WaitingProcess, signal_name
from fastft.siblings import ROOT
from live_processes import alive, gone

WITH_FASTFT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}

CHILD = """
import time
from fastft.processes import die_with_parent
die_with_parent()
print("up", flush=True)
time.sleep(60)
"""
PARENT = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}], stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""


def start(code: str) -> WaitingProcess:
    return WaitingProcess([sys.executable, "-S", "-c", code], environment=dict(os.environ))


def test_a_request_larger_than_a_pipe_reaches_a_process_that_is_still_busy() -> None:
    looks: list[float] = []
    code = "import sys, time; time.sleep(1.5); print(len(sys.stdin.read())); sys.exit(3)"
    with start(code) as process:
        assert process.waits
        ended = process.ask("x" * 500_000, timeout_seconds=30, while_waiting=lambda: looks.append(time.monotonic()))
        assert ended == 3
        process.stdout.seek(0)
        assert process.stdout.read() == b"500000\n"
    assert looks


def test_what_does_not_end_in_time_is_killed_with_its_children_though_it_reads_nothing() -> None:
    code = (
        "import subprocess, sys, time;"
        "print(subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)']).pid, flush=True);"
        "time.sleep(60)"
    )
    with start(code) as process:
        assert process.ask("x" * 500_000, timeout_seconds=2.0) is None
        process.stdout.seek(0)
        child = int(process.stdout.read())
        time.sleep(0.1)
        assert not process.waits
        assert not alive(child)


def test_nothing_is_left_of_a_process_that_was_never_asked() -> None:
    with start("import sys; sys.stdin.read()") as process:
        pass
    assert process.process.returncode == -signal.SIGKILL


def test_what_ended_is_not_killed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number may be another process's by now."""
    with start("import sys; sys.stdin.read()") as process:
        assert process.ask("", timeout_seconds=20) == 0

        def refuse(pid: int, number: int) -> None:
            raise AssertionError(f"{number} to {pid}")

        monkeypatch.setattr(os, "killpg", refuse)


def test_an_interrupt_while_waiting_leaves_nothing() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with start("import time; time.sleep(60)") as process:
        with pytest.raises(KeyboardInterrupt):
            process.ask("", timeout_seconds=30, while_waiting=interrupt)
        assert not process.waits


def test_what_cannot_be_started_is_an_error() -> None:
    with pytest.raises(OSError, match="no/such/program"):
        WaitingProcess(["/no/such/program"], environment={})


def test_signals_have_names_if_they_have() -> None:
    assert signal_name(-9) == "SIGKILL"
    assert signal_name(-int(signal.SIGRTMAX) - 1) == str(int(signal.SIGRTMAX) + 1)


def test_what_is_imported_ahead_is_there() -> None:
    code = (
        "import sys; from fastft.processes import PRELOADED, preload; preload();"
        "missing = set(PRELOADED) - set(sys.modules) - {'triton.language'}; assert not missing, missing"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=WITH_FASTFT, timeout=120)
    assert "torch" in PRELOADED


def test_the_end_at_once_keeps_what_was_printed() -> None:
    code = (
        "import atexit, sys; from fastft.processes import end_at_once; atexit.register(print, 'taken apart');"
        "print('said', end=''); print('logged', end='', file=sys.stderr); end_at_once(5)"
    )
    ended = subprocess.run([sys.executable, "-c", code], env=WITH_FASTFT, timeout=60, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (5, "said", "logged")


@pytest.mark.gpu
def test_what_is_imported_ahead_makes_no_context_on_a_gpu() -> None:
    """A context alone takes 600 MiB, times the number of processes that wait."""
    code = (
        "import ctypes, sys; from fastft.processes import PRELOADED, preload; preload();"
        "assert set(PRELOADED) <= set(sys.modules);"
        "active, flags = ctypes.c_int(0), ctypes.c_uint(0);"
        "state = ctypes.CDLL('libcuda.so.1').cuDevicePrimaryCtxGetState(0, ctypes.byref(flags), ctypes.byref(active));"
        "assert state == 3 or (state == 0 and not active.value), (state, active.value)"  # 3: the driver is not in use
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=WITH_FASTFT, timeout=120)


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_a_worker_ends_when_what_started_it_is_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    os.kill(child, 0)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    if not gone(child):
        os.kill(child, signal.SIGKILL)
        pytest.fail("the worker went on")
