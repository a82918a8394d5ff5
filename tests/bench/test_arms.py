"""What the arms do that follow no plan."""

from typing import Any

import pytest

from bench.arms import choices_for
from devices import GPU
from fastft import defaults, planning
from fastft.config import RunConfig
from fastft.memory.model import estimate_peak_bytes
from fastft.models.shapes import SHAPES

CONFIG = RunConfig(model="llama-3-8b", quantization="nf4", batch_size=4, sequence_tokens=2048, dtype="bf16")


@pytest.fixture(autouse=True)
def _on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastft.hardware.detect_device", lambda *_: GPU)
    for module in (defaults, planning):
        monkeypatch.setattr(module, "require_backend", lambda *_: None)


def test_the_default_arm_keeps_to_the_cap_and_looks_for_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("it asked for a plan")

    monkeypatch.setattr(planning, "resolve", refuse)
    choices, plan = choices_for("triton+default", CONFIG)
    assert plan is None
    assert (choices.backend, choices.micro_batch, choices.placement) == ("triton", 4, ["light"] * 32)
    capped = CONFIG.model_copy(update={"memory_cap": "7.8GiB"})
    choices, plan = choices_for("triton+default", capped)
    assert plan is None
    assert estimate_peak_bytes(SHAPES["llama-3-8b"], choices, capped, device=GPU) <= 7.8 * 2**30
    with pytest.raises(AssertionError, match="asked for a plan"):
        choices_for("triton", capped)
