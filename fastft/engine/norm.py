"""The final norm as an autograd function over the backend's.

Legend: T tokens, D model.
"""

from typing import Any

import torch
from torch import nn

from fastft.backends import Backend
from fastft.engine.attach import STATE
from fastft.engine.first_order import first_order, path_to
from fastft.engine.parts import read_norm
from fastft.engine.state import ModuleState, call_original, why_not_differentiated
from fastft.engine.support import why_no_norm
from fastft.kernels.norm import Norm


class FrozenNorm(torch.autograd.Function):
    """A norm (`fastft.kernels.norm.Norm`) with frozen weights."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, norm: Norm, ops: Backend) -> torch.Tensor:
        """Normalise the last dimension; `x` is any shape that ends in D."""
        x_TD = x.reshape(-1, x.shape[-1])
        y_TD, rstd_T = ops.normalise(x_TD, norm)
        if ctx.needs_input_grad[0]:
            ctx.ops, ctx.kind, ctx.eps = ops, norm.kind, norm.eps
            kept = (x, None) if x.is_contiguous() else (x_TD, path_to(x))
            ctx.save_for_backward(*kept, rstd_T, norm.weight_D, norm.bias_D)
        # Autograd forbids changing in place what a function returns as a view, and models do such things.
        return torch.ops.aten._unsafe_view(y_TD, x.shape)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        """The input's gradient; the weights are frozen."""
        x, _, rstd_T, weight_D, bias_D = ctx.saved_tensors
        x_TD, dy = x.reshape(-1, x.shape[-1]), grad_outputs[0]
        norm = Norm(ctx.kind, weight_D, bias_D, ctx.eps)
        dx_TD = ctx.ops.normalise_backward(dy.reshape(x_TD.shape), x_TD, norm, rstd_T)
        return dx_TD.view(dy.shape), None, None


def norm_forward(self: nn.Module, hidden_states: torch.Tensor) -> Any:
    """The final norm (… × D)."""
    state: ModuleState | None = self.__dict__.get(STATE)
    if state is None or state.settings.is_off:
        return call_original(self, (hidden_states,), {})
    settings = state.settings
    reason = state.replaced or why_not_differentiated() or why_no_norm(self, settings.spec)
    if reason is None and hidden_states.dtype != self.weight.dtype:
        reason = f"its weight is {self.weight.dtype}, the activations are {hidden_states.dtype}"
    if reason is not None:
        settings.ledger.stock(state.name, "norm", reason)
        return call_original(self, (hidden_states,), {})
    settings.ledger.fused(state.name, "norm", settings.ops.name)
    return FrozenNorm.apply(hidden_states, read_norm(self, settings.spec), settings.ops)
