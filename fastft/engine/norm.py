"""The final norm as an autograd function over the backend's RMSNorm.

Legend: T tokens, D model.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fastft.backends import Backend


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
