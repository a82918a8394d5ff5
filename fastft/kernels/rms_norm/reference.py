"""RMSNorm in plain PyTorch.

Source of the formula and of the rounding: `LlamaRMSNorm` in transformers' `modeling_llama.py`.  Statistics
in fp32, x·rstd rounded to x's dtype, and only then × weight.  A model that adds 1 to its weight (Gemma)
passes the sum.

A mixed-dtype operation computes in fp32 (PyTorch's type promotion) and rounds where it writes; so most
fp32 intermediates of a 16-bit tensor never exist on a GPU, and the results are the same bits.
"""

# T tokens, D model width

import torch
from torch import Tensor


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Normalise each row: `y = round(x · rstd) · weight`, `rstd = (mean(x²) + eps)^-½`.

    Args:
        x_TD: fp32, bf16 or fp16; T may be 0.
        weight_D: any of these dtypes; one other than x's is multiplied in fp32.
        eps: added to the mean of squares.

    Returns:
        `(y_TD, rstd_T)`: y in x's dtype, rstd in fp32, which the backward takes.
    """
    squares_TD = x_TD.square() if x_TD.dtype == torch.float32 else x_TD.to(torch.float32).square_()
    rstd_T = squares_TD.mean(-1).add_(eps).rsqrt_()
    y_TD = squares_TD if x_TD.dtype == torch.float32 else torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    del squares_TD
    torch.mul(x_TD, rstd_T.unsqueeze(-1), out=y_TD)
    return y_TD.mul_(weight_D), rstd_T


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Add the residual, then normalise the sum.

    Args:
        x_TD: fp32, bf16 or fp16.
        residual_TD: the residual stream, x's dtype.
        weight_D: as for `rms_norm`.
        eps: as for `rms_norm`.

    Returns:
        `(sum_TD, y_TD, rstd_T)`: `sum = x + residual`, rounded to the dtype before it is normalised, as
        Hugging Face's decoder layers do; then `rms_norm(sum)`.
    """
    sum_TD = x_TD + residual_TD
    return sum_TD, *rms_norm(sum_TD, weight_D, eps)


def rms_norm_backward(
    dy_TD: Tensor, x_TD: Tensor, weight_D: Tensor, rstd_T: Tensor, residual_TD: Tensor | None = None
) -> Tensor:
    """The gradient of `rms_norm` with respect to x; the weight is frozen and gets none.

    With `x̂ = x · rstd` and `g = dy · weight`: `dx = rstd · (g − x̂ · mean(g · x̂)) + residual`, in fp32,
    rounded once.

    Args:
        dy_TD: the gradient of y.
        x_TD: what was normalised (after `add_rms_norm`: the sum).
        weight_D: the weight.
        rstd_T: fp32, from the forward.
        residual_TD: the gradient that reaches x past the norm, added before rounding.

    Returns:
        `dx_TD` in x's dtype.
    """
    dx_TD = torch.mul(dy_TD, weight_D.to(torch.float32))  # g
    # x̂ is never built: mean(g·x̂)·x̂·rstd = x · (mean(g·x)·rstd³).
    slope_T = torch.mul(dx_TD, x_TD).mean(-1).mul_(rstd_T).mul_(rstd_T).mul_(rstd_T)
    dx_TD.mul_(rstd_T.unsqueeze(-1)).addcmul_(x_TD, slope_T.unsqueeze(-1), value=-1)
    if residual_TD is not None:
        dx_TD.add_(residual_TD)
    return dx_TD.to(x_TD.dtype)
