"""Norms in plain PyTorch; the formulas and their rounding are in `fastft.kernels.norm.Norm`.

A mixed-dtype operation computes in fp32 (PyTorch's type promotion) and rounds where it writes; so most
fp32 intermediates of a 16-bit tensor never exist on a GPU, and the results are the same bits.
"""

# T tokens (or heads of tokens), D width of a row

import torch
from torch import Tensor

from fastft.kernels.norm import Norm


def normalise(x_TD: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """Normalise each row.

    Args:
        x_TD: fp32, bf16 or fp16; T may be 0.
        norm: which norm, and its weights.

    Returns:
        `(y_TD, rstd_T)`: y in the norm's dtype, or x's; rstd in fp32, which the backward takes.
    """
    centred_TD = _centred(x_TD, norm)
    squares_TD = centred_TD.square() if centred_TD.dtype == torch.float32 else centred_TD.to(torch.float32).square_()
    rstd_T = squares_TD.mean(-1).add_(norm.eps).rsqrt_()
    rounds_first = norm.kind == "rms" and x_TD.dtype != torch.float32
    y_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device) if rounds_first else squares_TD
    del squares_TD
    torch.mul(centred_TD, rstd_T.unsqueeze(-1), out=y_TD)
    y_TD.mul_(_factor(norm))
    if norm.bias_D is not None:
        y_TD.add_(norm.bias_D)
    return y_TD.to(norm.dtype or x_TD.dtype), rstd_T


def add_and_normalise(
    x_TD: Tensor, residual_TD: Tensor, norm: Norm, multiplier: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Add to the residual stream, then normalise the sum.

    Args:
        x_TD: fp32, bf16 or fp16.
        residual_TD: the residual stream, x's dtype or a wider one.
        norm: as for `normalise`.
        multiplier: of x.

    Returns:
        `(sum_TD, y_TD, rstd_T)`: `sum = multiplier · x + residual`, rounded to the residual stream's dtype before it is
        normalised, as Hugging Face's decoder layers do; then `normalise(sum)`.
    """
    sum_TD = torch.add(residual_TD, x_TD, alpha=multiplier)
    return sum_TD, *normalise(sum_TD, norm)


def normalise_backward(
    dy_TD: Tensor, x_TD: Tensor, norm: Norm, rstd_T: Tensor, residual_TD: Tensor | None = None
) -> Tensor:
    """The gradient of `normalise` with respect to x; weight and bias are frozen and get none.

    With `x̂` the normalised row and `g = dy · weight` (or 1 + weight): `dx = rstd · (g − x̂ · mean(g · x̂)) + residual`,
    for `layer` minus `rstd · mean(g)`, in fp32, rounded once.

    Args:
        dy_TD: the gradient of y.
        x_TD: what was normalised (after `add_and_normalise`: the sum).
        norm: as in the forward.
        rstd_T: fp32, from the forward.
        residual_TD: the gradient that reaches x past the norm, added before rounding.

    Returns:
        `dx_TD` in x's dtype.
    """
    centred_TD = _centred(x_TD, norm)
    dx_TD = torch.mul(dy_TD, _factor(norm).to(torch.float32))  # g
    # x̂ is never built: mean(g·x̂)·x̂·rstd = x · (mean(g·x)·rstd³).
    slope_T = torch.mul(dx_TD, centred_TD).mean(-1).mul_(rstd_T).mul_(rstd_T).mul_(rstd_T)
    if norm.kind == "layer":
        dx_TD.sub_(dx_TD.mean(-1, keepdim=True))
    dx_TD.mul_(rstd_T.unsqueeze(-1)).addcmul_(centred_TD, slope_T.unsqueeze(-1), value=-1)
    if residual_TD is not None:
        dx_TD.add_(residual_TD)
    return dx_TD.to(x_TD.dtype)


def _centred(x_TD: Tensor, norm: Norm) -> Tensor:
    """What the statistics are taken of: x, or its distance from the row's mean in fp32."""
    if norm.kind != "layer":
        return x_TD
    wide_TD = x_TD.to(torch.float32)
    return wide_TD - wide_TD.mean(-1, keepdim=True)


def _factor(norm: Norm) -> Tensor:
    return norm.weight_D.to(torch.float32) + 1.0 if norm.kind == "rms_unit_offset" else norm.weight_D
