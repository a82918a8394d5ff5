"""Evaluation, generation, autocast and mixed dtypes."""

# B rows, S tokens a row, V vocabulary

import copy
import logging
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


def test_autocast_over_fp32_weights_runs_stock_aloud(toy, batch_of, step, caplog):
    model = toy()
    batch = batch_of("right")
    _, exact = step(model, batch)
    device = next(model.parameters()).device
    with torch.autocast(device.type, dtype=torch.bfloat16):
        stock_loss, stock = step(model, batch)
        patch_model(model, backend="eager")
        with caplog.at_level(logging.WARNING):
            loss, fused = step(model, batch)
    assert "computes in torch.bfloat16 on torch.float32 weights" in caplog.text
    assert all(ledger_of(model).paths[f"layers.{index}"].path == "stock" for index in range(3))
    assert loss == pytest.approx(stock_loss, rel=1e-3)

    def error(gradients: dict[str, Tensor]) -> float:
        flat, flat_exact = (torch.cat([g[name].flatten() for name in exact]) for g in (gradients, exact))
        return float((flat - flat_exact).norm() / flat_exact.norm())

    assert 1e-4 < error(fused) <= 1.5 * error(stock)


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


def test_fp32_norms_over_bf16_weights_run_stock_aloud(toy, batch_of, step):
    """`prepare_model_for_kbit_training` leaves such models; their linears and norms still run fused."""
    model = toy(base={"dtype": torch.bfloat16})
    for name, parameter in model.named_parameters():
        if "norm" in name or "embed" in name:
            parameter.data = parameter.data.float()
    stock = copy.deepcopy(model)
    batch = batch_of("right")
    _, exact = step(copy.deepcopy(model).float(), batch)
    with torch.autocast(next(model.parameters()).device.type, dtype=torch.bfloat16):
        loss, gradients = step(stock, batch)
        patch_model(model, backend="eager")
        fused_loss, fused = step(model, batch)
    assert "layers.1" in ledger_of(model).fallbacks
    assert fused_loss == pytest.approx(loss, rel=1e-3)
    flat, flat_stock, flat_exact = (
        torch.cat([g[name].flatten().double() for name in exact]) for g in (fused, gradients, exact)
    )
    assert 1e-4 < (flat - flat_exact).norm() <= 1.5 * (flat_stock - flat_exact).norm()
