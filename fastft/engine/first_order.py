"""Backwards that are right once: a derivative of a derivative is an error, never missing without a word."""

import functools
from collections.abc import Callable
from typing import Any

import torch

_MESSAGE = (
    "fastft's fused layers have first derivatives only, and this is a derivative of one (create_graph=True, a gradient "
    "penalty, a Hessian). Run that part of the training stock: fastft.unpatch_model(model), or .undo() of the patch"
)


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates the `backward` of an autograd function that is not differentiable itself.

    PyTorch's `once_differentiable` says nothing where the incoming gradient requires none, as that of a loss does.
    """

    @functools.wraps(backward)
    def guarded(ctx: Any, *grad_outputs: Any) -> Any:
        with torch.no_grad():
            gradients = backward(ctx, *grad_outputs)
        if not torch.is_grad_enabled():
            return gradients
        together = isinstance(gradients, tuple)
        given = gradients if together else (gradients,)
        tensors = [g for g in given if isinstance(g, torch.Tensor)]
        if not tensors:
            return gradients
        like = torch.empty((), dtype=tensors[0].dtype, device=tensors[0].device, requires_grad=True)
        marked = iter(_NoSecondDerivative.apply(like, *tensors))
        result = tuple(next(marked) if isinstance(g, torch.Tensor) else g for g in given)
        return result if together else result[0]

    return guarded


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, like: torch.Tensor, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(gradient.view_as(gradient) for gradient in gradients)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        raise RuntimeError(_MESSAGE)
