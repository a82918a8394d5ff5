import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from autotune import runner
from autotune.probe import MARKER, ProbeRequest
from autotune.runner import Spares, run_probe
from fastft.config import RunConfig
from fastft.plan import Choices, Trial
from live_processes import gone

CHOICES = Choices(backend="eager", micro_batch=4, accumulation=4, placement=["light"] * 3)
REQUEST = ProbeRequest(config=RunConfig(model="toy-llama", sequence_tokens=16), choices=CHOICES)
ANSWER = MARKER + Trial(choices=CHOICES, verdict="ok", step_time_ms=[1.0], detail="fine\x1b[31m").model_dump_json()


def run(code: str, timeout_seconds: float = 20.0) -> Trial:
    return run_probe(REQUEST, timeout_seconds=timeout_seconds, command=[sys.executable, "-P", "-S", "-c", code])


def test_the_answer_is_the_last_marked_line_among_noise() -> None:
    old = MARKER + Trial(choices=CHOICES, verdict="failed").model_dump_json()
    trial = run(f"print('loading'); print({old!r}); print({ANSWER!r}); print('bye')")
    assert trial.verdict == "ok"
    assert trial.step_time_ms == [1.0]
    assert trial.detail == "fine[31m", "control characters are taken out"


def test_the_request_arrives_on_stdin() -> None:
    code = f"import sys, json; r = json.load(sys.stdin); assert r['config']['model'] == 'toy-llama'; print({ANSWER!r})"
    assert run(code).verdict == "ok"


def test_a_hang_is_a_timeout_with_the_last_words() -> None:
    started = time.monotonic()
    trial = run("import sys, time; print('was busy', file=sys.stderr, flush=True); time.sleep(60)", timeout_seconds=0.7)
    assert trial.verdict == "timeout"
    assert "was busy" in trial.detail
    assert time.monotonic() - started < 10


def test_a_kill_is_named() -> None:
    trial = run("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert trial.verdict == "failed"
    assert "SIGKILL" in trial.detail
    assert "memory" in trial.detail


@pytest.mark.parametrize(
    ("code", "detail"),
    [
        ("print('nothing')", "gave no answer (exit code 0)"),
        ("import sys; sys.exit(3)", "exit code 3"),
        ("raise ValueError('broken here')", "broken here"),
        (f"print({MARKER!r} + '{{')", "no trial"),
        (f"print({MARKER!r} + '{{}}')", "no trial"),
        (f"import sys; sys.stdout.buffer.write(bytes(range(256)) * 9 + {MARKER!r}.encode() + b'{{')", "gave no answer"),
        (f"import sys; print({ANSWER!r}); sys.exit(1)", "exit code 1"),
    ],
)  # fmt: skip
def test_garbage_is_a_failure(code: str, detail: str) -> None:
    trial = run(code)
    assert trial.verdict == "failed"
    assert trial.choices == CHOICES
    assert detail in trial.detail


def test_an_answer_for_other_choices_is_refused() -> None:
    other = CHOICES.model_copy(update={"micro_batch": 2, "accumulation": 8})
    answer = MARKER + Trial(choices=other, verdict="ok").model_dump_json()
    assert "other choices" in run(f"print({answer!r})").detail


def test_much_output_is_no_obstacle() -> None:
    trial = run(f"import sys; sys.stderr.write('x' * 3_000_000); print('y' * 3_000_000); print({ANSWER!r})")
    assert trial.verdict == "ok"


def test_children_of_a_probe_end_with_it(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    code = (
        "import subprocess, sys; child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)']);"
        f"open({str(pid_file)!r}, 'w').write(str(child.pid)); print({ANSWER!r})"
    )
    assert run(code).verdict == "ok"
    assert gone(int(pid_file.read_text()))


def test_a_command_that_cannot_start_is_a_failure() -> None:
    trial = run_probe(REQUEST, command=["/no/such/program"])
    assert trial.verdict == "failed"
    assert "cannot start" in trial.detail


def test_an_interrupt_ends_the_probe_and_is_passed_on(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    code = f"""
import sys
from tests_request import REQUEST
from autotune.runner import Spares, run_probe
try:
    run_probe(REQUEST, command=[sys.executable, "-S", "-c",
        "import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(60)"])
except KeyboardInterrupt:
    print("interrupted")
"""
    (tmp_path / "tests_request.py").write_text(
        "from autotune.probe import ProbeRequest\n"
        f"REQUEST = ProbeRequest.model_validate_json({REQUEST.model_dump_json()!r})\n"
    )
    environment = dict(os.environ) | {"PYTHONPATH": f"{runner.ROOT}{os.pathsep}{tmp_path}"}
    tuner = subprocess.Popen(
        [sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        for _ in range(600):  # where files are slow to read, the imports take most of it
            if pid_file.exists() and pid_file.read_text():
                break
            time.sleep(0.1)
        else:
            pytest.fail("the probe did not start")
        tuner.send_signal(signal.SIGINT)
        output, _ = tuner.communicate(timeout=20)
    finally:
        tuner.kill()
    assert "interrupted" in output
    assert gone(int(pid_file.read_text()))


ECHO = "import os, sys; request = sys.stdin.read(); print('> ' + request + ' ' + str(os.getpid()))"


def test_spares_are_started_together_and_serve_one_request_each() -> None:
    with Spares([sys.executable, "-S", "-c", ECHO], count=3) as spares:
        answers = [spares.run(f"request {n}", "> ", 20.0, what="it").answers for n in range(2)]
        assert [answer[0].split()[:2] for answer in answers] == [["request", "0"], ["request", "1"]]
        (last,) = spares._waiting
        assert last.waits
        spares.run("", "> ", 20.0, what="it")
        assert spares._waiting == []
        spares.run("", "> ", 20.0, what="it")
        left = [worker.process.pid for worker in spares._waiting]
        assert len(left) == 2
    assert all(map(gone, left)), "nobody waits for a tuner that is gone"


def test_a_batch_may_begin_before_anybody_asks() -> None:
    with Spares([sys.executable, "-S", "-c", ECHO], count=2) as spares:
        spares.begin()
        spares.begin()
        waiting = [worker.process.pid for worker in spares._waiting]
        assert len(waiting) == 2
        answer = spares.run("request", "> ", 20.0, what="it").answers[0]
        assert answer.split() == ["request", str(waiting[0])]
    with Spares(["/no/such/program"], count=2) as spares:
        spares.begin()
        assert spares.run("", "> ", 20.0, what="it").detail.startswith("cannot start it")


def test_a_spare_that_died_while_it_waited_is_not_asked() -> None:
    with Spares([sys.executable, "-S", "-c", ECHO], count=2) as spares:
        spares.run("", "> ", 20.0, what="it")
        (spare,) = spares._waiting
        spare.process.kill()
        spare.process.wait()
        assert spares.run("again", "> ", 20.0, what="it").answers[0].startswith("again")


def test_the_time_of_a_spare_starts_with_its_request() -> None:
    code = "import sys, time; sys.stdin.read(); time.sleep(60)"
    with Spares([sys.executable, "-S", "-c", code], count=2) as spares:
        for _ in range(2):
            started = time.monotonic()
            assert spares.run("", "> ", 0.5, what="it").timed_out
            assert 0.4 < time.monotonic() - started < 10


def test_the_probe_finds_the_fastft_that_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    environment = runner._environment()
    assert environment["PYTHONPATH"].split(os.pathsep) == [str(runner.ROOT), "/elsewhere"]
    assert environment["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
