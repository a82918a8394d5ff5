"""`fastft tune`: what it measures is faked here but for one run; what it does with it is not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autotune.probe import ProbeRequest, probe
from bench.messages import Answer, GateReply, GateRequest
from bench.worker import run_gate
from fastft.commands.gradient_gate import GradientGate
from fastft.config import RunConfig
from fastft.console import Meter
from fastft.errors import MeasureError
from fastft.hardware import detect_device
from fastft.models.shapes import SHAPES
from fastft.plan import Choices, Plan, PlanKey, Trial
from fastft.plan_store import PlanStore
from fastft.planning import plan_key, tune_command

Cli = Callable[..., Any]


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> list[ProbeRequest]:
    """Probes answer at once, faster for larger micro-batches; the requests are kept."""
    requests: list[ProbeRequest] = []

    def answer(request: ProbeRequest, **_: Any) -> Trial:
        requests.append(request)
        speed = 100.0 * request.choices.micro_batch * (1 if request.choices.backend == "eager" else 0.5)
        return Trial(
            choices=request.choices, verdict="ok", step_time_ms=[1000 * 64 / speed] * 4, tokens_per_second=speed,
            peak_bytes=2**30, model_bytes=2**29,
        )  # fmt: skip

    monkeypatch.setattr("autotune.search.run_in_process", answer)
    return requests


class GateHere:
    """In the place of a worker's process: `answer` in this one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answer: Callable[[GateRequest], Answer]) -> None:
        self.requests: list[GateRequest] = []
        self.started = self.ended = 0
        self.answer = answer
        monkeypatch.setattr("bench.worker_process.Worker", self.start)

    def start(self, **_: Any) -> "GateHere":
        self.started += 1
        return self

    def __enter__(self) -> "GateHere":
        return self

    def __exit__(self, *_: object) -> None:
        self.ended += 1

    def ask(self, request: GateRequest, **_: Any) -> Answer:
        self.requests.append(request)
        return self.answer(request)


@pytest.fixture
def gated(monkeypatch: pytest.MonkeyPatch) -> list[GateRequest]:
    """The gate runs in this process."""
    return GateHere(monkeypatch, lambda request: Answer(gate=run_gate(request))).requests


def agrees(config: RunConfig, key: PlanKey, choices: Choices) -> bool:
    with GradientGate(config, key, Meter()) as gate:
        return gate.agrees(choices)


def test_a_plan_is_measured_checked_and_kept(
    cli: Cli, probed: list[ProbeRequest], gated: list[GateRequest], store: PlanStore, toy: list[str]
) -> None:
    result = cli("tune", *toy, "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    (plan,) = store.entries()
    first, second, third = result.stdout.splitlines()
    assert first == f"plan {plan.id}: {plan.choices.summary()}"
    assert second.startswith(f"tuned in {plan.evidence.seconds:,.0f} s, {len(probed)} measurements; ")
    assert third.startswith(f"kept in {store.path(plan.key)}; ")
    assert len(gated) == 1
    assert "gradients agree with stock PEFT's: relative error " in result.stderr
    for trial in plan.evidence.trials:
        assert f"{trial.choices.summary()}: {trial.tokens_per_second:,.0f} tokens/s, peak 1.00 GiB" in result.stderr


def test_the_second_call_is_the_cache(cli: Cli, probed: list[ProbeRequest], saved_plan: Plan, toy: list[str]) -> None:
    result = cli("tune", *toy, "--device", "cpu")
    assert result.stdout.splitlines()[:2] == [
        f"plan {saved_plan.id}: eager, 2×2 sequences, placement 2×full + 1×keep",
        "from the cache, tuned 3 days ago; 2,000 tokens/s, 2.00× the default; peak 0.50 GiB",
    ]
    assert probed == []
    answer = json.loads(cli("tune", *toy, "--device", "cpu", "--json").stdout)
    assert (answer["cached"], answer["id"]) == (True, saved_plan.id)
    assert Plan.model_validate(answer["plan"]) == saved_plan


def test_force_measures_again(
    cli: Cli, probed: list[ProbeRequest], saved_plan: Plan, toy: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GradientGate, "agrees", lambda *_: True)
    answer = json.loads(cli("tune", *toy, "--device", "cpu", "--force", "--json").stdout)
    assert answer["cached"] is False
    assert probed


def test_a_plan_whose_gradients_differ_is_refused(
    cli: Cli, probed: list[ProbeRequest], gated: list[GateRequest], monkeypatch: pytest.MonkeyPatch, toy: list[str]
) -> None:
    """The real gate, given one gradient that is a tenth too large."""
    import bench.parity

    backward = bench.parity._backward

    def wrong(session: Any, batch: Any) -> Any:
        done = backward(session, batch)
        if session.choices.backend == "eager" and session.choices.micro_batch == 4:
            done.gradients[next(iter(done.gradients))].mul_(1.1)
        return done

    monkeypatch.setattr(bench.parity, "_backward", wrong)
    result = cli("tune", *toy, "--device", "cpu", "--json")
    plan = Plan.model_validate(json.loads(result.stdout)["plan"])
    assert "eager, 4×1 sequences, placement 3×light is refused: gradient of " in result.stderr
    assert plan.choices.micro_batch != 4 or plan.choices.backend != "eager"
    refused = [trial for trial in plan.evidence.trials if trial.verdict == "parity_failed"]
    assert {(t.choices.backend, t.choices.micro_batch) for t in refused} == {("eager", 4)}


def test_a_gate_without_a_verdict_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, make_plan: Callable[..., Plan], capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make_plan()
    config = RunConfig(model="toy-llama", sequence_tokens=16, batch_size=4, device="cpu")

    def killed(_: GateRequest) -> Answer:
        raise MeasureError("the worker was killed", got="SIGKILL, often for lack of memory")

    GateHere(monkeypatch, killed)
    assert agrees(config, plan.key, plan.choices)
    assert capsys.readouterr().err == (
        "warning: the gradients of the plan could not be compared with stock PEFT's: "
        "the worker was killed; got SIGKILL, often for lack of memory\n"
    )
    GateHere(monkeypatch, lambda _: Answer(error="OutOfMemoryError: 32 GiB"))
    assert agrees(config, plan.key, plan.choices)
    assert "OutOfMemoryError: 32 GiB" in capsys.readouterr().err


def test_the_gate_looks_at_the_candidate_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixed placement and micro-batches as they are, the depth cut to one layer a policy."""
    replies: list[GateReply] = []
    GateHere(monkeypatch, lambda request: Answer(gate=replies.append(run_gate(request)) or replies[-1]))
    config = RunConfig(model="toy-llama", sequence_tokens=16, batch_size=4, device="cpu", memory_cap="8GiB")
    shape, device = SHAPES["toy-llama"], detect_device("cpu")
    choices = Choices(backend="eager", micro_batch=1, accumulation=4, placement=["mlp", "keep", "full"])
    assert agrees(config, plan_key(config, shape, device), choices)
    assert replies[0].choices == choices
    assert replies[0].parity.passed


def test_a_gate_that_was_begun_ahead_is_asked_once_and_always_ended(
    monkeypatch: pytest.MonkeyPatch, make_plan: Callable[..., Plan]
) -> None:
    plan = make_plan()
    config = RunConfig(model="toy-llama", sequence_tokens=16, batch_size=4, device="cpu")
    processes = GateHere(monkeypatch, lambda request: Answer(gate=run_gate(request)))
    with GradientGate(config, plan.key, Meter()) as gate:
        gate.begin()
        gate.begin()
        assert (processes.started, len(processes.requests)) == (1, 0)
        assert gate.agrees(plan.choices)
        assert (processes.started, len(processes.requests)) == (1, 1)
        assert gate.agrees(plan.choices)  # the next plan gets a process of its own
        gate.begin()
        assert (processes.started, len(processes.requests)) == (3, 2)
    assert processes.ended == 3


def test_a_dry_run_lists_and_measures_nothing(
    cli: Cli, probed: list[ProbeRequest], store: PlanStore, toy: list[str]
) -> None:
    result = cli("tune", *toy, "--device", "cpu", "--dry-run")
    lines = result.stdout.splitlines()
    assert lines[0] == "  1. eager, 4×1 sequences, placement 3×light (the default)"
    assert lines[-2].startswith("at most 11 measurements, ")
    assert "of 10 s each (assumed, none was measured here yet)" in lines[-2]
    assert lines[-1] == "it ends after 2 min 15 s at most; nothing was measured now"
    cost = json.loads(cli("tune", *toy, "--device", "cpu", "--dry-run", "--json").stdout)
    assert len(cost["candidates"]) == len(lines) - 3 >= 2  # stock PEFT among them
    assert (cost["probes"], cost["probe_seconds"], cost["probe_seconds_measured"]) == (11, 10.0, False)
    assert probed == []
    assert not store.cache.exists()


def test_other_memory_caps_are_explained(
    cli: Cli, probed: list[ProbeRequest], saved_plan: Plan, toy: list[str]
) -> None:
    result = cli("tune", *toy, "--device", "cpu", "--explain")
    assert result.exit_code == 0, result.stderr
    first, columns, *rows = result.stdout.splitlines()
    assert first == f"plan {saved_plan.id}: {saved_plan.choices.summary()}"
    assert columns.split() == ["from", "a", "cap", "of", "tokens/s", "peak", "basis", "choices"]
    measured = [row for row in rows if "measured" in row]
    assert any(row.startswith("0.50 GiB") and saved_plan.choices.summary() in row for row in measured)
    assert ("predicted" in result.stderr) == any("predicted" in row for row in rows)
    rungs = json.loads(cli("tune", *toy, "--device", "cpu", "--explain", "--json").stdout)
    assert len(rungs) == len(rows)
    assert {rung["basis"] for rung in rungs} <= {"measured", "predicted"}
    assert saved_plan.choices.model_dump() in [rung["choices"] for rung in rungs]
    assert probed == []


def test_without_a_plan_there_is_nothing_to_explain(cli: Cli, probed: list[ProbeRequest], toy: list[str]) -> None:
    result = cli("tune", *toy, "--device", "cpu", "--explain")
    assert result.exit_code == 6
    assert result.stderr.startswith(
        "error: there is no plan to explain; got none for this run; fix: tune it: fastft tune "
    )
    assert probed == []


def test_a_second_cap_says_what_it_took_from_the_first(
    cli: Cli, probed: list[ProbeRequest], toy: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GradientGate, "agrees", lambda *_: True)
    assert cli("tune", *toy, "--device", "cpu").exit_code == 0
    first = len(probed)
    result = cli("tune", *toy, "--device", "cpu", "--memory-cap", "2GiB")
    assert f"{len(probed) - first} measurements, " in result.stdout
    assert " more from tuning under other memory caps; " in result.stdout
    assert " are judged again" in result.stderr


def test_the_model_may_be_a_flag_as_in_train(cli: Cli, saved_plan: Plan, toy: list[str]) -> None:
    flagged = cli("tune", "--model", *toy, "--device", "cpu")
    assert flagged.exit_code == 0
    assert flagged.stdout == cli("tune", *toy, "--device", "cpu").stdout
    both = cli("tune", *toy, "--model", "tiny")
    assert both.exit_code == 2
    assert "got toy-llama and --model tiny" in both.stderr


@pytest.mark.parametrize(
    "run",
    [
        {"model": "toy-llama"},
        {"model": "toy-qwen2", "packing": True, "sequence_tokens": 64, "rank": 4, "targets": ("q_proj", "v_proj")},
        {"model": "toy-llama", "memory_cap": "20 GiB", "dtype": "bf16", "optimizer": "adamw_8bit", "dropout": 0.1},
        {"model": "toy-llama", "device": "cpu", "offline": False, "batch_size": 6},
    ],
)
def test_the_command_that_a_run_prints_tunes_that_run(
    run: dict[str, Any], cli: Cli, make_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    import shlex

    config = RunConfig.load(**run)
    seen: list[RunConfig] = []

    def stop(config: RunConfig, *_: Any, **__: Any) -> Any:
        seen.append(config)
        raise MeasureError("stopped")

    monkeypatch.setattr("fastft.commands.tune.tune_verified", stop)
    cli(*shlex.split(tune_command(config))[1:])
    assert seen == [config]


def test_a_real_measurement(
    cli: Cli, gated: list[GateRequest], monkeypatch: pytest.MonkeyPatch, store: PlanStore, toy: list[str], work: Path
) -> None:
    """The probe and the gate in this process, everything else as always; no time for more than the default."""
    monkeypatch.setattr("autotune.search.run_in_process", lambda request, **_: probe(request))
    result = cli("tune", *toy, "--device", "cpu", "--max-minutes", "0.001")
    assert result.exit_code == 0, result.stderr
    (plan,) = store.entries()
    (trial,) = plan.evidence.trials
    assert (trial.verdict, trial.choices, trial.choices.backend) == ("ok", plan.choices, "eager")
    assert ", which is what the default does; peak " in result.stdout
    assert list(work.iterdir()) == []
