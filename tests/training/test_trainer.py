"""The loop behind `fastft train`: what it counts is what transformers' own would count."""

import json
from pathlib import Path

import pytest
import transformers

from fastft.config import RunConfig
from fastft.hardware import detect_device
from fastft.plan import Choices, Evidence, Plan
from fastft.plan_store import PlanStore
from fastft.planning import model_shape, plan_key
from fastft.training.trainer import train


def test_the_floating_point_operations_are_transformers_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTFT_CACHE_DIR", str(tmp_path / "cache"))
    asked: list[int] = []
    compute_loss = transformers.Trainer.compute_loss

    def spy(self, model, inputs, *rest, **more):  # type: ignore[no-untyped-def]
        asked.append(transformers.Trainer.floating_point_ops(self, inputs))
        return compute_loss(self, model, inputs, *rest, **more)

    monkeypatch.setattr(transformers.Trainer, "compute_loss", spy)
    config = RunConfig(
        model="tiny", output=str(tmp_path / "run"), steps=2, save_steps=2, batch_size=4, micro_batch=2,
        sequence_tokens=64, plan="none", device="cpu",
    )  # fmt: skip
    train(config)
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text(encoding="utf-8"))
    assert len(asked) == 4
    assert state["total_flos"] == sum(asked) > 0


def test_every_checkpoint_and_the_adapter_name_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTFT_CACHE_DIR", str(tmp_path / "cache"))
    output = tmp_path / "run"
    config = RunConfig(
        model="tiny", output=str(output), steps=3, save_steps=1, batch_size=2, sequence_tokens=64, device="cpu"
    )
    shape = model_shape(config)
    choices = Choices(backend="eager", micro_batch=1, accumulation=2, placement=["full"] * shape.layers)
    key = plan_key(config, shape, detect_device("cpu"))
    PlanStore().save(plan := Plan(key=key, choices=choices, evidence=Evidence(trials=[])))
    train(config)
    folders = [output, *sorted(output.glob("checkpoint-*"))]
    assert [folder.name for folder in folders] == ["run", "checkpoint-1", "checkpoint-2", "checkpoint-3"]
    for folder in folders:
        facts = json.loads((folder / "fastft.json").read_text(encoding="utf-8"))
        assert (facts["plan_id"], facts["choices"]) == (plan.id, choices.model_dump())
        assert (folder / "adapter_model.safetensors").exists()
    train(config.model_copy(update={"steps": 4, "resume": True, "plan": "none"}))
    assert json.loads((output / "checkpoint-4" / "fastft.json").read_text())["plan_id"] is None
    assert json.loads((output / "checkpoint-3" / "fastft.json").read_text())["plan_id"] == plan.id
