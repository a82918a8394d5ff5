import io
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from bench import worker
from bench.arms import choices_for
from bench.messages import MARKER, Answer, GateReply, RepetitionRequest, TrialsRequest
from bench.runner import run_bench
from bench.scenarios import SCENARIOS, Scenario
from bench.trial_file import TrialFile
from bench.weights import adapter_tensors, base_checksum, load_adapter
from fastft.errors import ConfigError, MeasureError
from fastft.files import canonical_json
from fastft.plan import Choices
from fastft.record import Parity, read_records

TINY = Path(worker.__file__).parents[1] / "fastft" / "models" / "tiny"

TOY = Scenario(
    name="toy",
    config={"model": "toy-llama", "batch_size": 2, "sequence_tokens": 16, "device": "cpu", "plan": "none"},
    arms=("peft", "eager"),
    repetitions=1,
    warmup_steps=1,
    steps=2,
    data="random",
)


def request(tmp_path, scenario=TOY, arm="peft", **changes) -> RepetitionRequest:
    gate = GateReply(
        parity=Parity(
            passed=True, max_relative_error=0, stock_max_relative_error=0, tolerance=1, tensors=1, worst_tensor="a"
        ),
        reason=None,
        setup={},
        choices=Choices(backend=arm, micro_batch=1, accumulation=2, placement=["light"] * 3),
        plan_id=None,
        device={},
        versions={},
    )
    values = {"run_id": "r", "arm": arm, "repetition": 0, "initial_adapter": tmp_path / "adapter.safetensors"}
    return RepetitionRequest(scenario=scenario, gate=gate, **{**values, **changes})


def ask_main(monkeypatch, capsys, text: str) -> Answer:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert worker.main() == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(MARKER)]
    return Answer.model_validate_json(line.removeprefix(MARKER))


def test_two_arms_of_one_seed_do_the_same_work_from_the_same_start(tmp_path):
    peft = worker.run_repetition(request(tmp_path))
    assert (tmp_path / "adapter.safetensors").is_file(), "the first process of a seed writes it"
    eager = worker.run_repetition(request(tmp_path, arm="eager"))
    for record in (peft, eager):
        assert record.error is None
        assert record.status == "ok"
        assert len(record.step_time_ms) == len(record.loss) == len(record.gradient_norm) == 3
        assert record.warmup_steps == 1
        assert record.step_tokens == [32, 32, 32]
        assert record.memory is not None
        assert record.memory.peak_bytes >= record.memory.model_bytes > 0
        canonical_json(record.model_dump())
    assert peft.batch_sha256 == eager.batch_sha256
    assert len(set(peft.batch_sha256)) == 3
    assert peft.model == eager.model
    assert peft.training == eager.training
    assert peft.ledger == {"model: stock": 1}
    assert "decoder_layer: fused (eager)" in eager.ledger
    torch.testing.assert_close(torch.tensor(peft.loss), torch.tensor(eager.loss), rtol=1e-4, atol=0)

    other = worker.run_repetition(request(tmp_path, repetition=1, initial_adapter=tmp_path / "other.safetensors"))
    assert not set(other.batch_sha256) & set(peft.batch_sha256), "another seed, other batches"
    assert (tmp_path / "other.safetensors").read_bytes() != (tmp_path / "adapter.safetensors").read_bytes()


def test_whatever_goes_wrong_is_the_records_status(tmp_path, monkeypatch, capsys):
    scenario = TOY.changed(config={"model": "no-such-model"})
    answer = ask_main(monkeypatch, capsys, request(tmp_path, scenario).model_dump_json())
    assert answer.record is not None
    assert answer.record.status == "failed"
    assert "no-such-model" in answer.record.error
    assert answer.record.training["batch_size"] == 2


def test_an_adapter_of_another_model_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "adapter.safetensors")
    record = worker.run_repetition(request(tmp_path))
    assert record.status == "failed"
    assert "does not fit the model" in record.error


def test_a_gate_that_cannot_run_and_a_request_that_is_none_are_answered(monkeypatch, capsys):
    scenario = TOY.changed(config={"model": "no-such-model"})
    text = json.dumps({"task": "gate", "arm": "peft", "scenario": scenario.model_dump(mode="json")})
    assert "no-such-model" in str(ask_main(monkeypatch, capsys, text).error)
    assert ask_main(monkeypatch, capsys, "{}").error


@pytest.mark.parametrize(("seconds", "count"), [(None, 3), (0.0, 0)])
def test_a_series_of_trials_is_appended_one_by_one_while_there_is_time(seconds, count, tmp_path, monkeypatch, capsys):
    once = Choices(backend="eager", micro_batch=1, accumulation=2, placement=["full"] * 3)
    twice = once.model_copy(update={"micro_batch": 2, "accumulation": 1})
    file = TrialFile(tmp_path / "trials.jsonl")
    file.path.write_text("a header\n")
    asked = TrialsRequest(
        config=TOY.config, choices=[twice, once, twice], warmup_steps=1, timed_steps=3, file=file.path, seconds=seconds
    )
    monkeypatch.setattr("gc.freeze", lambda: None)  # here the process is everybody's
    assert ask_main(monkeypatch, capsys, asked.model_dump_json()).trials == count
    assert [trial.choices for trial in file.trials()] == [twice, once, twice][:count]
    assert all(trial.verdict == "ok" and len(trial.step_time_ms) == 3 for trial in file.trials())


def test_a_gate_reports_what_its_repetitions_will_do(monkeypatch, capsys):
    text = json.dumps({"task": "gate", "arm": "eager", "scenario": TOY.model_dump(mode="json")})
    answer = ask_main(monkeypatch, capsys, text)
    assert answer.gate is not None
    assert answer.gate.parity.passed
    assert answer.gate.choices.backend == "eager"
    assert answer.gate.device["kind"] == "cpu"
    assert answer.gate.versions["torch"] != "none"


BEFORE = {"a": torch.zeros(2), "b": torch.zeros(2)}
AFTER = {"a": torch.ones(2), "b": torch.ones(2)}


def test_a_run_that_trains_is_accepted():
    worker.require_training([1.0, 0.5], [1.0, 0.5], BEFORE, AFTER)


@pytest.mark.parametrize(
    ("loss", "norms", "after", "message"),
    [
        ([1.0, math.nan], [1.0, 1.0], AFTER, "loss of step 2 is not finite"),
        ([1.0, 1.0], [math.inf, 1.0], AFTER, "gradient norm of step 1 is not finite"),
        ([1.0, 1.0], [1.0, 0.0], AFTER, "gradient norm 0 in step 2"),
        ([], [], AFTER, "does not train"),
        ([1.0, 1.0], [1.0, 1.0], {"a": torch.ones(2), "b": torch.zeros(2)}, "1 of 2 tensors unchanged, among them b"),
    ],
)
def test_a_run_that_does_not_train_is_refused(loss, norms, after, message):
    with pytest.raises(MeasureError, match=message):
        worker.require_training(loss, norms, BEFORE, after)


def test_an_error_becomes_one_line():
    assert worker.one_line(ValueError("a\n  b" + "x" * 1000)).startswith("ValueError: a b")
    assert len(worker.one_line(ValueError("x" * 1000))) == 500
    assert worker.one_line(ConfigError("wrong", got="x")) == "wrong; got x"


class Half(torch.nn.Module):
    """A frozen and a trainable tensor."""

    def __init__(self, frozen: torch.Tensor) -> None:
        super().__init__()
        self.frozen = torch.nn.Parameter(frozen, requires_grad=False)
        self.lora = torch.nn.Parameter(torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_the_checksum_covers_the_frozen_tensors_bytes(dtype):
    value = torch.arange(6).reshape(2, 3).to(dtype)
    checksum = base_checksum(Half(value))
    assert checksum == base_checksum(Half(value.clone()))
    changed = value.clone()
    changed[1, 2] += 1
    assert checksum != base_checksum(Half(changed))
    trained = Half(value.clone())
    trained.lora.data += 1
    assert checksum == base_checksum(trained)
    assert base_checksum(Half(torch.tensor(1.5)))


def test_an_adapter_is_copied_not_shared():
    model = Half(torch.zeros(1))
    saved = adapter_tensors(model)
    with torch.no_grad():
        model.lora += 1
    assert not saved["lora"].any()
    load_adapter(model, saved)
    assert not model.lora.any()
    for wrong in ({}, {"lora": torch.zeros(4)}, {"lora": torch.zeros(3), "more": torch.zeros(1)}):
        with pytest.raises(MeasureError, match="does not fit"):
            load_adapter(model, wrong)


def test_stock_arms_take_the_whole_batch_and_never_a_plan():
    config = TOY.config.model_copy(update={"plan": "auto"})
    plain, plain_plan = choices_for("peft", config)
    checkpointed, _ = choices_for("peft+checkpointing", config)
    assert plain_plan is None
    assert (plain.micro_batch, plain.accumulation, plain.placement) == (2, 1, ["light"] * 3)
    assert checkpointed.placement == ["full"] * 3
    split, _ = choices_for("peft", config.model_copy(update={"micro_batch": 1}))
    assert (split.micro_batch, split.accumulation) == (1, 2)


def test_a_plan_for_another_backend_is_not_claimed(tmp_path, monkeypatch):
    from fastft.hardware import detect_device
    from fastft.plan import Evidence, Plan
    from fastft.plan_store import PlanStore
    from fastft.planning import model_shape, plan_key

    monkeypatch.setenv("FASTFT_CACHE_DIR", str(tmp_path))
    config = TOY.config.model_copy(update={"plan": "auto"})
    choices = Choices(backend="eager", micro_batch=1, accumulation=2, placement=["keep", "mlp", "full"])
    key = plan_key(config, model_shape(config), detect_device("cpu"))
    plan = Plan(key=key, choices=choices, evidence=Evidence(trials=[]))
    PlanStore().save(plan)
    assert choices_for("eager", config) == (choices, plan.id)

    PlanStore().save(plan.model_copy(update={"choices": choices.model_copy(update={"backend": "peft"})}))
    default, plan_id = choices_for("eager", config)
    assert plan_id is None
    assert default.backend == "eager"
    assert default.placement != choices.placement


@pytest.mark.slow
def test_the_bench_end_to_end_in_real_processes(tmp_path):
    records = run_bench(TOY, output=tmp_path / "out")
    assert [(record.arm, record.status, record.error) for record in records] == [
        ("peft", "ok", None),
        ("eager", "ok", None),
    ]
    assert all(record.parity.passed for record in records)
    assert records[0].batch_sha256 == records[1].batch_sha256
    assert records[0].model["frozen_checksum"] == records[1].model["frozen_checksum"]
    assert read_records(tmp_path / "out") == records


@pytest.mark.slow
@pytest.mark.skipif(not (TINY / "config.json").is_file(), reason="the embedded model is not built")
def test_the_embedded_scenario_end_to_end(tmp_path):
    scenario = SCENARIOS["embedded-quick"].model_copy(
        update={"accuracy": SCENARIOS["embedded"].accuracy.model_copy(update={"rows": 4, "max_new_tokens": 4})}
    )
    records = run_bench(scenario, arms=["peft", "eager"], output=tmp_path / "out", config_overrides={"device": "cpu"})
    assert [record.status for record in records] == ["ok"] * 4, [record.error for record in records]
    assert all(0 <= record.accuracy.after <= 1 and record.accuracy.samples == 4 for record in records)
    assert records[0].accuracy.before == records[1].accuracy.before
