"""The runner against a fake worker: a script of a few lines that answers, crashes or hangs as it is told."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import runner, worker_process
from bench.scenarios import Scenario
from fastft.errors import BackendError, OutputError
from fastft.record import read_records
from live_processes import alive

FAKE_WORKER = """
import json, os, signal, subprocess, sys, time

request = json.load(sys.stdin)
arm, task = request["arm"], request["task"]
key = arm if task == "gate" else f"{arm}-{request['repetition']}"
with open(os.environ["FAKE_LOG"], "a") as log:
    print(json.dumps([task, key, request.get("initial_adapter"), request.get("accuracy_before"),
                      os.environ["PYTHONPATH"], os.environ.get("HF_HUB_OFFLINE")]), file=log)
behaviour = json.loads(os.environ["FAKE_BEHAVIOUR"]).get(f"{task} {key}", "ok")

if behaviour == "crash":
    sys.exit("Segmentation of the fault kind")
if behaviour == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if behaviour == "hang":
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    with open(os.environ["FAKE_LOG"] + ".pids", "w") as pids:
        print(os.getpid(), child.pid, file=pids)
    time.sleep(60)
if behaviour == "garbage":
    print("FASTFT-BENCH {half a")
    sys.exit()
if behaviour == "silent":
    print("nothing of interest")
    sys.exit()
if behaviour == "unable":
    answer = {"error": "the model is not found"}
elif task == "gate" or behaviour == "wrong kind":
    passed = behaviour != "wrong"
    answer = {"gate": {
        "parity": {"passed": passed, "max_relative_error": 0.5, "stock_max_relative_error": 0.01,
                   "tolerance": 0.6, "tensors": 2, "worst_tensor": "lora_A"},
        "reason": None if passed else "gradient of lora_A: too far",
        "setup": {"layers": 4, "whole_model": False, "batch_size": 2, "sequence_tokens": 16,
                  "dtype": "fp32", "loss": 1.0},
        "choices": {"backend": arm, "micro_batch": 2, "accumulation": 1, "placement": ["light"]},
        "plan_id": None, "device": {"kind": "cpu", "name": "fake"}, "versions": {"torch": "0"},
    }}
else:
    scenario = request["scenario"]
    seed = scenario["seeds"][request["repetition"] % len(scenario["seeds"])]
    answer = {"record": {
        "run_id": request["run_id"], "scenario": scenario["name"], "arm": arm, "backend": arm,
        "repetition": request["repetition"], "seed": seed, "status": "ok", "warmup_steps": 1,
        "step_time_ms": [9.0, 1.0], "step_tokens": [10, 10], "loss": [1.0, 0.9], "gradient_norm": [1.0, 1.0],
        "batch_sha256": ["a", "b"], "parity": request["gate"]["parity"],
        "accuracy": {"before": 0.25, "after": 0.5, "samples": 4},
    }}
print("a library's unfinished line", end="")
print("\\nFASTFT-BENCH " + json.dumps(answer))
"""

SCENARIO = Scenario(
    name="fake",
    config={"device": "cpu", "batch_size": 2},
    arms=("peft", "eager"),
    repetitions=3,
    seeds=(7, 8),
    steps=2,
    timeout_seconds=30,
)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Run the bench with the fake worker: `fake(behaviour, ...)` gives (records, requests, folder)."""
    script = tmp_path / "worker.py"
    script.write_text(FAKE_WORKER, encoding="utf-8")
    log = tmp_path / "requests.jsonl"
    monkeypatch.setattr(worker_process, "WORKER_COMMAND", (sys.executable, "-S", str(script)))
    monkeypatch.setenv("FAKE_LOG", str(log))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def run(behaviour=None, scenario=SCENARIO, output=tmp_path / "out", **options):
        monkeypatch.setenv("FAKE_BEHAVIOUR", json.dumps(behaviour or {}))
        records = runner.run_bench(scenario, output=output, **options)
        return records, [json.loads(line) for line in log.read_text().splitlines()], output

    run.log = log
    run.output = tmp_path / "out"
    return run


def test_gates_run_first_and_repetitions_are_interleaved(fake):
    records, requests, folder = fake()
    assert [key for task, key, *_ in requests if task == "gate"] == ["peft", "eager"]
    assert [task for task, *_ in requests[:2]] == ["gate", "gate"]
    order = [key for _, key, *_ in requests[2:]]
    assert order == ["peft-0", "eager-0", "eager-1", "peft-1", "peft-2", "eager-2"]
    assert [f"{record.arm}-{record.repetition}" for record in records] == order
    assert read_records(folder) == records
    assert {record.run_id for record in records} == {records[0].run_id}
    assert [record.tokens_per_second() for record in records] == [10_000.0] * 6


def test_all_arms_of_a_seed_share_adapter_base_accuracy_and_environment(fake):
    _, requests, folder = fake()
    adapter = {key: path for task, key, path, *_ in requests if task == "repetition"}
    assert (
        adapter["peft-0"]
        == adapter["eager-0"]
        == adapter["peft-2"]
        == str(folder / "initial-adapter-seed7.safetensors")
    )
    assert adapter["peft-1"] == adapter["eager-1"] == str(folder / "initial-adapter-seed8.safetensors")
    known = {key: before for task, key, _, before, *_ in requests if task == "repetition"}
    assert known == {"peft-0": None, "eager-0": 0.25, "eager-1": None, "peft-1": 0.25, "peft-2": 0.25, "eager-2": 0.25}
    ((path, offline),) = {(path, offline) for *_, path, offline in requests}
    assert path.split(os.pathsep)[0] == str(Path(runner.__file__).parents[1])
    assert offline == "1"


@given(st.lists(st.text(max_size=3), min_size=1, max_size=6, unique=True), st.integers(0, 50))
def test_every_arm_is_first_equally_often(arms, start):
    orders = [runner.repetition_order(tuple(arms), start + repetition) for repetition in range(len(arms))]
    assert all(sorted(order) == sorted(arms) for order in orders)
    assert sorted(order[0] for order in orders) == sorted(arms)


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("crash", "exit code 1, Segmentation of the fault kind"),
        ("killed", "SIGKILL, often for lack of memory"),
        ("garbage", "answer cannot be read"),
        ("silent", "without an answer"),
        ("wrong kind", "something else than a record"),
        ("unable", "the model is not found"),
    ],
)
def test_a_worker_that_fails_costs_one_repetition(fake, behaviour, message):
    records, _, folder = fake({"repetition eager-1": behaviour})
    assert len(records) == 6
    (failed,) = [record for record in records if record.status != "ok"]
    assert (failed.arm, failed.repetition, failed.seed, failed.status) == ("eager", 1, 8, "failed")
    assert message in failed.error
    assert failed.step_time_ms == []
    assert failed.tokens_per_second() is None
    assert failed.parity is not None
    assert failed.training["parity_gate"] == {"layers": 4, "whole_model": False, "batch_size": 2, "sequence_tokens": 16}
    assert read_records(folder) == records


def test_a_worker_that_hangs_is_stopped_with_its_children(fake):
    scenario = SCENARIO.model_copy(update={"timeout_seconds": 1.0, "repetitions": 1})
    records, _, _ = fake({"repetition eager-0": "hang"}, scenario)
    assert [record.status for record in records] == ["ok", "failed"]
    assert "did not finish in time; got 1 s" in records[1].error
    pids = [int(pid) for pid in Path(f"{fake.log}.pids").read_text().split()]
    time.sleep(0.1)
    assert len(pids) == 2
    assert not any(map(alive, pids))


def test_an_arm_that_fails_its_gate_is_not_timed(fake):
    records, requests, folder = fake({"gate eager": "wrong"})
    assert not any(task == "repetition" and key.startswith("eager") for task, key, *_ in requests)
    gated = [record for record in records if record.arm == "eager"]
    assert [(record.repetition, record.status, record.step_time_ms) for record in gated] == [
        (repetition, "gate_failed", []) for repetition in range(3)
    ]
    assert "gradient of lora_A: too far" in gated[0].error
    assert not gated[0].parity.passed
    assert [record.status for record in records if record.arm == "peft"] == ["ok"] * 3
    assert json.loads((folder / "gates.json").read_text())["eager"]["reason"] == "gradient of lora_A: too far"


@pytest.mark.parametrize(("behaviour", "message"), [("unable", "model is not found"), ("crash", "exit code 1")])
def test_a_gate_without_a_verdict_is_no_pass(fake, behaviour, message):
    records, requests, _ = fake({"gate eager": behaviour, "gate peft": behaviour})
    assert [task for task, *_ in requests] == ["gate", "gate"]
    assert [record.status for record in records] == ["failed"] * 6
    assert all("no verdict" in record.error and message in record.error for record in records)


def test_records_are_on_disk_after_each_step_and_progress_counts_up(fake):
    seen = []

    def on_progress(progress):
        seen.append(progress)
        if progress.record is not None:
            assert read_records(fake.output)[-1] == progress.record

    records, _, _ = fake({"gate eager": "wrong"}, on_progress=on_progress)
    assert [progress.record for progress in seen if progress.record is not None] == records
    assert [progress.done for progress in seen] == sorted(progress.done for progress in seen)
    assert seen[-1].done == seen[-1].total == 2 + 6


def test_an_interrupt_keeps_what_was_measured_and_stops_the_worker(fake, monkeypatch):
    class Interrupted(subprocess.Popen):
        """Ctrl-C while the worker hangs."""

        def wait(self, timeout=None):
            pids = Path(f"{fake.log}.pids")
            while timeout is not None and not (pids.exists() and pids.read_text()):
                if self.poll() is not None:
                    return self.returncode
                time.sleep(0.01)
            if timeout is not None:
                raise KeyboardInterrupt
            return super().wait(timeout)

    monkeypatch.setattr("fastft.processes.subprocess.Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        fake({"repetition eager-1": "hang"})
    assert [f"{record.arm}-{record.repetition}" for record in read_records(fake.output)] == ["peft-0", "eager-0"]
    pids = [int(pid) for pid in Path(f"{fake.log}.pids").read_text().split()]
    time.sleep(0.1)
    assert not any(map(alive, pids))


def test_an_output_folder_with_something_in_it_is_left_alone(fake):
    fake.output.mkdir()
    (fake.output / "records.jsonl").write_text("precious\n")
    with pytest.raises(OutputError, match="not empty"):
        fake()
    assert (fake.output / "records.jsonl").read_text() == "precious\n"
    assert not fake.log.exists(), "no worker was started"


def test_an_arm_that_cannot_run_is_skipped_aloud_or_refused_when_asked_for(fake, caplog):
    scenario = SCENARIO.model_copy(update={"arms": ("peft", "triton"), "repetitions": 1})
    with pytest.raises(BackendError, match="triton"):
        fake(scenario=scenario, arms=["peft", "triton"])
    with caplog.at_level(logging.WARNING, logger="fastft"):
        records, _, _ = fake(scenario=scenario)
    assert [record.arm for record in records] == ["peft"]
    assert "arm triton is skipped" in caplog.text
    with pytest.raises(BackendError, match="no arm of scenario fake"):
        fake(scenario=scenario.model_copy(update={"arms": ("triton",)}))


def test_arms_repetitions_and_configuration_can_be_overridden(fake):
    records, _, _ = fake(arms=["eager"], repetitions=1, config_overrides={"rank": 4}, behaviour={"gate eager": "wrong"})
    assert [(record.arm, record.repetition) for record in records] == [("eager", 0)]
    assert records[0].lora["rank"] == 4


def test_a_signal_without_a_name_still_makes_a_message(tmp_path):
    log = tmp_path / "log"
    log.write_text("")
    with pytest.raises(runner.MeasureError, match="killed"):
        worker_process._read_answer("", -int(signal.SIGRTMAX) - 1, log)


def test_the_runner_needs_no_torch():
    code = "import sys, bench.runner; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": str(Path(runner.__file__).parents[1])}
    subprocess.run([sys.executable, "-P", "-c", code], check=True, env=environment)
