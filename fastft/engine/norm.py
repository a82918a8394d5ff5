"""The final norm as an autograd function over the backend's RMSNorm.

Legend: T tokens, D model.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from fastft.backends import Backend
from fastft.engine.parts import epsilon
from fastft.engine.state import original_forward, state_of
from fastft.engine.support import why_no_norm


class RmsNorm(torch.autograd.Function):
    """RMSNorm with a frozen weight: y = (x · rstd → dtype) × weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_D: torch.Tensor, eps: float, ops: Backend) -> torch.Tensor:
        """Normalise the last dimension; `x` is any shape that ends in D."""
        x_TD = x.reshape(-1, x.shape[-1])
        y_TD, rstd_T = ops.rms_norm(x_TD, weight_D, eps)
        if ctx.needs_input_grad[0]:
            ctx.ops = ops
            ctx.save_for_backward(x_TD, weight_D, rstd_T)
        return y_TD.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        """The input's gradient; the weight is frozen."""
        x_TD, weight_D, rstd_T = ctx.saved_tensors
        dy = grad_outputs[0]
        dx_TD = ctx.ops.rms_norm_backward(dy.reshape(x_TD.shape), x_TD, weight_D, rstd_T)
        return dx_TD.view(dy.shape), None, None, None


def norm_forward(self: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """The final norm (… × D)."""
    state = state_of(self)
    settings = state.settings
    reason = state.replaced or why_no_norm(self, settings.spec)
    if reason is None and hidden_states.dtype != self.weight.dtype:
        reason = f"its weight is {self.weight.dtype}, the activations are {hidden_states.dtype}"
    if reason is not None:
        settings.ledger.stock(state.name, "norm", reason)
        stock: torch.Tensor = original_forward(self)(hidden_states)
        return stock
    settings.ledger.fused(state.name, "norm", settings.ops.name)
    normed: torch.Tensor = RmsNorm.apply(hidden_states, self.weight, epsilon(self), settings.ops)
    return normed
