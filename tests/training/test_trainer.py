"""The loop behind `fastft train`: what it counts is what transformers' own would count."""

import json
from pathlib import Path

import pytest
import transformers

from fastft.config import RunConfig
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
