"""Clipping the buffer of all gradients, against PyTorch's clipping of each."""

import math

import pytest
import torch

from fastft import patch_model
from fastft.engine.clipping import clip_gradients_


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("max_norm", [1e-3, 0.5, 1e6, math.inf])
@pytest.mark.parametrize("patched", [True, False])
def test_norm_and_gradients_are_pytorchs(patched, max_norm, toy, batch_of, step):
    model = toy("toy-qwen2")
    if patched:
        patch_model(model, backend="eager")
    step(model, batch_of("right"), 2)
    stock = [torch.nn.Parameter(p.detach().clone()) for p in trained(model)]
    for ours, theirs in zip(trained(model), stock, strict=True):
        theirs.grad = ours.grad.clone()
    storages = {p.grad.untyped_storage().data_ptr() for p in trained(model)}
    assert (len(storages) == 1) is patched
    expected = torch.nn.utils.clip_grad_norm_(stock, max_norm)
    torch.testing.assert_close(clip_gradients_(trained(model), max_norm), expected, rtol=1e-5, atol=0)
    for ours, theirs in zip(trained(model), stock, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-12)
    assert {p.grad.untyped_storage().data_ptr() for p in trained(model)} == storages, "the optimizer needs them there"


def test_all_that_is_given_counts_and_nothing_else(toy, batch_of, step):
    """A parameter beside the adapters, or only some of them, goes PyTorch's way."""
    model = toy()
    patch_model(model, backend="eager")
    step(model, batch_of("none"))
    gradients = [p.grad.clone() for p in trained(model)]
    beside = torch.nn.Parameter(torch.ones(3, device=gradients[0].device))
    beside.grad = torch.full_like(beside, 2.0)
    whole = torch.stack([g.norm() for g in gradients]).norm()
    torch.testing.assert_close(clip_gradients_([*trained(model), beside], math.inf), (whole**2 + 12).sqrt())
    torch.testing.assert_close(clip_gradients_(trained(model)[:1], math.inf), gradients[0].norm())


def test_no_gradient_is_no_norm(toy):
    assert clip_gradients_(trained(toy()), 1.0) == 0


def test_a_norm_of_zero_divides_nothing(toy, batch_of, step):
    model = toy()
    patch_model(model, backend="eager")
    step(model, batch_of("none"))
    for p in trained(model):
        p.grad.zero_()
    assert clip_gradients_(trained(model), 1.0) == 0
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in trained(model))
