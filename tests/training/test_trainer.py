"""The loop behind `fastft train`: what it counts is what transformers' own would count."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from fastft.config import LoraConfig, RunConfig
from fastft.engine import backbone, clipping, walks
from fastft.hardware import detect_device
from fastft.plan import Choices, Evidence, Plan
from fastft.plan_store import PlanStore
from fastft.planning import model_shape, plan_key
from fastft.training.session import Session
from fastft.training.trainer import train


def test_the_floating_point_operations_are_transformers_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTFT_CACHE_DIR", str(tmp_path / "cache"))
    asked: list[int] = []
    compute_loss = transformers.Trainer.compute_loss

    def spy(self, model, inputs, *rest, **more):  # type: ignore[no-untyped-def]
        base = self.model.get_base_model()
        counted = type(base).num_parameters(base, exclude_embeddings=True)
        asked.append(6 * inputs["input_ids"].numel() * counted)
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


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same samples in the same order, the optimizer's state, the schedule, and the dropout masks."""
    monkeypatch.setenv("FASTFT_CACHE_DIR", str(tmp_path / "cache"))
    config = RunConfig(
        model="tiny", output=str(tmp_path / "whole"), steps=4, save_steps=2, batch_size=4, micro_batch=2,
        sequence_tokens=64, lora=LoraConfig(dropout=0.1), schedule="linear", plan="none", device="cpu",
    )  # fmt: skip
    train(config)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    train(config.model_copy(update={"output": str(tmp_path / "resumed"), "resume": True}))
    whole, resumed, half = (
        load_file(tmp_path / folder / "adapter_model.safetensors")
        for folder in ("whole", "resumed", "whole/checkpoint-2")
    )
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert not any(torch.equal(half[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        ("constant", [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]),
        # ½ (1 + cos(π · k / 4)), k steps after the warm-up.
        ("cosine", [0.0, 0.5, 1.0, 0.853553, 0.5, 0.146447]),
    ],
)
def test_the_learning_rate_warms_up_and_follows_the_schedule(
    schedule: str, shares: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTFT_CACHE_DIR", str(tmp_path / "cache"))
    rates: list[float] = []

    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, *_: object, optimizer: torch.optim.Optimizer, **__: object) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    config = RunConfig.load(
        model="tiny", output=str(tmp_path / "run"), steps=6, warmup_steps=2, schedule=schedule, learning_rate=0.01,
        batch_size=1, sequence_tokens=64, plan="none", device="cpu",
    )  # fmt: skip
    train(config, callbacks=[Watch()])
    assert rates == pytest.approx([0.01 * share for share in shares], rel=1e-5)


def test_what_the_loop_is_spared_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clipping in one buffer, and no walk through all modules, against transformers' own loop."""
    monkeypatch.setenv("FASTFT_CACHE_DIR", str(tmp_path / "cache"))
    config = RunConfig(
        model="tiny", output=str(tmp_path / "ours"), steps=4, batch_size=4, micro_batch=2, sequence_tokens=64,
        learning_rate=1e-2, max_gradient_norm=0.05, plan="none", device="cpu",
    )  # fmt: skip
    train(config)
    monkeypatch.setattr(walks, "install", lambda model: None)
    monkeypatch.setattr(clipping, "clip_gradients_", torch.nn.utils.clip_grad_norm_)
    train(config.model_copy(update={"output": str(tmp_path / "theirs")}))
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    apart = torch.cat([(ours[name] - theirs[name]).abs().flatten() for name in ours])
    # Adam divides a gradient by its size, so an element that is all rounding may go anywhere; steps are of 0.01.  With
    # other clipping nine tenths are further apart than this.
    assert (apart > 1e-4).double().mean() < 1e-3


def test_packed_rows_are_trained_without_asking_where_documents_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTFT_CACHE_DIR", str(tmp_path / "cache"))
    asked, read = [], backbone.documents_of
    monkeypatch.setattr(backbone, "documents_of", lambda ids: asked.append(tuple(ids.shape)) or read(ids))
    config = RunConfig(
        model="tiny", output=str(tmp_path / "told"), steps=4, batch_size=4, micro_batch=2, sequence_tokens=128,
        packing=True, learning_rate=1e-2, plan="none", device="cpu",
    )  # fmt: skip
    train(config)
    assert asked == []
    monkeypatch.setattr(Session, "told", lambda self, batch: dict(batch))
    train(config.model_copy(update={"output": str(tmp_path / "not-told")}))
    assert len(asked) == 8
    told, not_told = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("told", "not-told"))
    assert all(torch.equal(told[name], not_told[name]) for name in not_told)
