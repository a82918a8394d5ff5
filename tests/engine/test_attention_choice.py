"""Which attention runs, where one was asked for and where the model's own means something else."""

import pytest
import torch

from fastft import ledger_of, patch_model
from fastft.errors import BackendError
from peft_models import on_device

TOLERANCE = 5e-5 if torch.cuda.is_available() else 1e-5  # ‖g − stock‖ / ‖stock‖ in fp32


def test_attention_that_cannot_run_is_replaced_aloud(toy, batch_of, caplog):
    model = toy()
    if next(model.parameters()).is_cuda:
        pytest.skip("flash may be able to run here")
    patch_model(model, backend="eager", attention="flash")
    model(**on_device(model, batch_of("none"))).loss.backward()
    assert ledger_of(model).counts()["attention: cpu, because flash cannot run here with causal attention"] == 3
    assert "flash cannot run" in caplog.text
    patch_model(model, backend="eager", attention="cpu")
    model(**on_device(model, batch_of("none")))
    assert not ledger_of(model).fallbacks


def test_strict_makes_replaced_attention_an_error(toy, batch_of):
    model = toy()
    if next(model.parameters()).is_cuda:
        pytest.skip("flash may be able to run here")
    patch_model(model, backend="eager", attention="flash", strict=True)
    with pytest.raises(BackendError, match=r"layers\.0\.attention.*flash cannot run"):
        model(**on_device(model, batch_of("none")))


def test_sdpa_attention_gives_the_same_gradients(toy, batch_of, step, error_of):
    for form in ("right", "left"):
        model = toy("toy-qwen2")
        _, gradients = step(model, batch_of(form))
        patch_model(model, backend="eager", attention="sdpa", placement=["keep", "mlp", "full"], strict=True)
        _, fused = step(model, batch_of(form))
        assert error_of(fused, gradients) < TOLERANCE


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"_attn_implementation": "flash_attention_2"}, "attn_implementation is flash_attention_2, not sdpa or eager"),
        ({"is_causal": False}, "attention is not causal"),
    ],
)
def test_attention_that_means_something_else_stays_stock(change, reason, toy, batch_of):
    model = toy()
    for name, value in change.items():
        setattr(model.get_base_model().config, name, value)
    ledger = patch_model(model, backend="eager")
    assert {path.reason for path in ledger.fallbacks.values()} == {reason}
    assert len(ledger.fallbacks) == 3
