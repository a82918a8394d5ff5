"""Evaluation, generation, autocast and mixed dtypes."""

# B rows, S tokens a row, V vocabulary

from typing import Any

import pytest
import torch
from torch import Tensor

from fastft import ledger_of, patch_model
from fastft.engine.deferred import Deferred
from peft_models import on_device

TOLERANCE = 5e-5 if torch.cuda.is_available() else 1e-5  # ‖g − stock‖ / ‖stock‖ in fp32


@pytest.mark.parametrize("mode", ["eval", "no_grad"])
@pytest.mark.parametrize("form", ["right", "left"])
def test_evaluation_gives_stocks_output(mode, form, toy, batch_of):
    model = toy("toy-qwen2")
    batch = on_device(model, batch_of(form))
    if mode == "eval":
        model.eval()
    with torch.set_grad_enabled(mode == "eval"):
        expected = model(**batch)
        patch_model(model, backend="eager")
        output = model(**batch)
    assert isinstance(output.logits, Deferred) is (mode == "eval"), "without gradients all is stock's"
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", ["toy-llama", "toy-qwen2"])
def test_generation_equals_stock_token_by_token(family, training, toy, batch_of):
    model = toy(family)
    model.train(training)
    batch = on_device(model, batch_of("left", S=9))
    wanted = {
        "input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "max_new_tokens": 8,
        "do_sample": False, "pad_token_id": 0,
    }  # fmt: skip
    expected = model.generate(**wanted)
    patch_model(model, backend="eager")
    assert torch.equal(model.generate(**wanted), expected)
    assert torch.equal(model.generate(**wanted, use_cache=False), expected)
    assert not ledger_of(model).fallbacks, "generation is no fallback"


def test_under_autocast_the_head_computes_in_the_dtype_of_autocast(toy, batch_of, monkeypatch):
    """In fp32 it would be several times slower, and the loss another than stock's."""
    from fastft.engine import head

    seen = []
    original = head.linear_cross_entropy

    def spy(hidden: Tensor, head: Tensor, *rest: Any, **more: Any) -> Tensor:
        seen.append((hidden.dtype, head.dtype))
        return original(hidden, head, *rest, **more)

    monkeypatch.setattr(head, "linear_cross_entropy", spy)
    model = toy()
    patch_model(model, backend="eager")
    batch = on_device(model, batch_of("none"))
    model(**batch)
    with torch.autocast(batch["labels"].device.type, dtype=torch.bfloat16):
        model(**batch)
    assert seen == [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)]


def test_autocast_in_the_models_own_dtype_stays_fused(toy, batch_of, step, error_of):
    model = toy(base={"dtype": torch.bfloat16})
    patch_model(model, backend="eager", strict=True)
    loss, gradients = step(model, batch_of("right"))
    with torch.autocast(next(model.parameters()).device.type, dtype=torch.bfloat16):
        again, same = step(model, batch_of("right"))
    assert again == pytest.approx(loss, rel=1e-5)
    assert error_of(same, gradients) < (1e-2 if torch.cuda.is_available() else 1e-12)
