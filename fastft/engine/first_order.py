"""Backwards that are right once and for one gradient at a time: all else is an error, never missing without a word."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._C import _functorch

_STOCK = "Run that part of the training stock: fastft.unpatch_model(model), or .undo() of the patch"
_SECOND = (
    "fastft's fused layers have first derivatives only, and this is a derivative of one (create_graph=True, a gradient "
    f"penalty, a Hessian). {_STOCK}"
)
_BATCHED = (
    "fastft's fused layers take one gradient at a time, and this is a batch of them (is_grads_batched=True, "
    f"vectorize=True, torch.vmap over a backward). {_STOCK}"
)


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates the `backward` of an autograd function that is not differentiable itself.

    PyTorch's `once_differentiable` says nothing where the incoming gradient requires none, as that of a loss does.
    Where a graph of the backward is made, its results are functions of what it was given and of what it saved, so the
    function has to save each of its inputs that the results depend on, or `path_to` it.
    """

    @functools.wraps(backward)
    def guarded(ctx: Any, *grad_outputs: Any) -> Any:
        if any(map(_is_batched, grad_outputs)):
            raise RuntimeError(_BATCHED)
        with torch.no_grad():
            gradients = backward(ctx, *grad_outputs)
        if not torch.is_grad_enabled():
            return gradients
        together = isinstance(gradients, tuple)
        given = gradients if together else (gradients,)
        tensors = [g for g in given if isinstance(g, torch.Tensor)]
        if not tensors:
            return gradients
        made_of = [t for t in (*grad_outputs, *ctx.saved_tensors) if t is not None and t.requires_grad]
        marked = iter(_NoSecondDerivative.apply(tensors, *made_of))
        result = tuple(next(marked) if isinstance(g, torch.Tensor) else g for g in given)
        return result if together else result[0]

    return guarded


def path_to(x: torch.Tensor) -> torch.Tensor | None:
    """Nothing, as a function of `x`: who saves it is on the way to `x` without keeping it.  None where nobody asks."""
    if not x.requires_grad:
        return None
    with torch.enable_grad():
        return x.narrow(0, 0, 0).clone()


def _is_batched(gradient: Any) -> bool:
    # `torch.autograd` still has a vmap of its own beside that of `torch.func`.
    return isinstance(gradient, torch.Tensor) and (
        _functorch.is_legacy_batchedtensor(gradient) or _functorch.is_batchedtensor(gradient)
    )


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradients: Sequence[torch.Tensor], *made_of: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # Copies, as they may be views of one buffer, and autograd forbids changing such results in place.
        return tuple(gradient.clone() for gradient in gradients)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        raise RuntimeError(_SECOND)
