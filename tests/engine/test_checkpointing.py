"""Gradient checkpointing of a patched model: the placement, and what Hugging Face's switches make of it."""

from typing import Any

import pytest
import torch

from fastft import ledger_of, patch_model, unpatch_model
from fastft.engine.patch import placement_of
from fastft.engine.state import Placed

TOLERANCE = 5e-5 if torch.cuda.is_available() else 1e-5  # ‖g − stock‖ / ‖stock‖ in fp32


def _enable(model: Any, method: str, **more: Any) -> None:
    if not hasattr(model.get_base_model(), method):
        pytest.skip(f"this transformers has no {method}")
    getattr(model, method)(**more)


METHODS = [("gradient_checkpointing_enable", "gradient_checkpointing_disable"),
           ("activation_checkpointing_enable", "activation_checkpointing_disable")]  # fmt: skip


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize(("enable", "disable"), METHODS)
def test_gradient_checkpointing_becomes_the_placement(enable, disable, before, toy, batch_of, step, error_of):
    """Enabled before the patch, as `prepare_model_for_kbit_training` does, or after, as trainers do."""
    batch = batch_of("right")
    model = toy()
    loss, gradients = step(model, batch)
    if before:
        _enable(model, enable)
    patch_model(model, backend="eager")
    if not before:
        assert placement_of(model) == ["light"] * 3
        _enable(model, enable)
    assert placement_of(model) == ["full"] * 3
    assert model.is_gradient_checkpointing
    fused_loss, fused = step(model, batch)
    assert fused_loss == pytest.approx(loss, rel=1e-5)
    assert error_of(fused, gradients) < TOLERANCE
    assert not ledger_of(model).fallbacks
    getattr(model, disable)()
    assert placement_of(model) == ["light"] * 3
    assert error_of(step(model, batch)[1], gradients) < TOLERANCE


@pytest.mark.parametrize(("enable", "_disable"), METHODS)
def test_every_nth_layer(enable, _disable, toy):
    model = toy()
    patch_model(model, backend="eager")
    if enable.startswith("gradient"):
        model.get_base_model().gradient_checkpointing_enable(every_n_layers=2)
    else:
        _enable(model, enable, every_n_layers=2)
    assert placement_of(model) == ["full", "light", "full"]


def test_checkpointing_outlives_the_patch(toy, batch_of, step, error_of):
    """Whoever asked for it still wants it when the model is stock again."""
    model = toy()
    batch = batch_of("right")
    _, gradients = step(model, batch)
    patch_model(model, backend="eager")
    model.gradient_checkpointing_enable()
    unpatch_model(model)
    assert model.is_gradient_checkpointing
    assert error_of(step(model, batch)[1], gradients) < TOLERANCE


@pytest.mark.parametrize("placement", ["keep", ["light", "full", "keep"]], ids=str)
def test_a_placement_that_was_chosen_stays(placement, toy):
    model = toy()
    patch_model(model, backend="eager", placement=placement)
    wanted = placement_of(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert placement_of(model) == wanted


@pytest.mark.parametrize("how", ["full", "offload", "enabled", "enabled before"])
def test_a_stock_layer_honours_the_placement(how, toy, batch_of, step, error_of):
    model = toy()
    batch = batch_of("left")
    runs = []
    hook = model.get_base_model().model.layers[1].self_attn.register_forward_hook(lambda *_: runs.append(1))
    _, gradients = step(model, batch)
    assert len(runs) == 1
    if how == "enabled before":
        model.gradient_checkpointing_enable()
    patch_model(model, backend="eager", placement=None if how.startswith("enabled") else how)
    if how == "enabled":
        model.gradient_checkpointing_enable()
    runs.clear()
    _, fused = step(model, batch)
    assert len(runs) == 2, "once forward, once more for the backward (which stops before the MLP ends)"
    assert error_of(fused, gradients) < TOLERANCE
    hook.remove()


def test_the_placement_may_depend_on_the_batch(toy, batch_of, step):
    model = toy()
    asked = []

    def choose(rows: int, tokens: int) -> Placed:
        asked.append((rows, tokens))
        return Placed(["full" if tokens > 64 else "keep"] * 3, 512)

    patch_model(model, backend="eager", placement=choose)
    step(model, batch_of("none", S=65))
    assert placement_of(model) == ["full"] * 3
    step(model, batch_of("none", S=9), 2)
    assert placement_of(model) == ["keep"] * 3
    step(model, batch_of("none", S=70))
    assert placement_of(model) == ["full"] * 3
    assert asked == [(4, 128), (2, 64)], "asked once a size, and ragged batches share one"


def test_the_layers_run_as_one_with_checkpointing_on(toy, batch_of, step, error_of, runs):
    """In TRL's scripts it is on unless somebody says otherwise."""
    model = toy()
    batch = batch_of("none")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    _, gradients = step(model, batch)
    patch_model(model, backend="eager")
    _, fused = step(model, batch)
    assert [call.policy for call in runs[0].calls] == ["full"] * 3
    assert error_of(fused, gradients) < TOLERANCE
