"""Norms in Triton: one pass over memory forward, one backward.

Same names, signatures and rounding as `reference.py`.  A program holds whole rows in registers: one row,
or several where rows are narrow.
"""

# T tokens (or heads of tokens), D width of a row, R rows of one program

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastft.kernels.launch import device_guard, row_block, unit_stride, warps_for
from fastft.kernels.norm import Norm

_MIN_BLOCK_ELEMENTS = 1024
"""Narrower rows share a program, so that every thread has a full 128-bit access."""


@triton.jit
def _factor(weight_ptr, columns_D, D, KIND: tl.constexpr):
    weight_D = tl.load(weight_ptr + columns_D, mask=columns_D < D, other=0.0).to(tl.float32)
    return weight_D + 1.0 if KIND == "rms_unit_offset" else weight_D


@triton.jit
def _centred(x_RD, mask_RD, D, KIND: tl.constexpr):
    """What the statistics are taken of: x, or its distance from the row's mean; 0 outside the row."""
    if KIND == "layer":
        mean_R = tl.sum(x_RD, axis=1) / D
        x_RD = tl.where(mask_RD, x_RD - mean_R[:, None], 0.0)
    return x_RD


@triton.jit
def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, sum_ptr, y_ptr, rstd_ptr,
    T, D, x_stride, residual_stride, eps, multiplier,
    KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns_D = tl.arange(0, BLOCK_D)
    mask_RD = (rows_R < T)[:, None] & (columns_D < D)[None, :]
    out_RD = rows_R[:, None] * D + columns_D[None, :]

    x_RD = tl.load(x_ptr + rows_R[:, None] * x_stride + columns_D[None, :], mask=mask_RD, other=0.0)
    factor_D = _factor(weight_ptr, columns_D, D, KIND)
    stream = x_ptr.dtype.element_ty
    if residual_ptr is not None:
        stream = sum_ptr.dtype.element_ty
        residual_at_RD = residual_ptr + rows_R[:, None] * residual_stride + columns_D[None, :]
        residual_RD = tl.load(residual_at_RD, mask=mask_RD, other=0.0)
        x_RD = (x_RD.to(tl.float32) * multiplier + residual_RD.to(tl.float32)).to(stream)
        tl.store(sum_ptr + out_RD, x_RD, mask=mask_RD)

    x_RD = _centred(x_RD.to(tl.float32), mask_RD, D, KIND)
    rstd_R = tl.rsqrt(tl.sum(x_RD * x_RD, axis=1) / D + eps)
    tl.store(rstd_ptr + rows_R, rstd_R, mask=rows_R < T)
    y_RD = x_RD * rstd_R[:, None]
    if KIND == "rms":
        y_RD = y_RD.to(stream).to(tl.float32)
    y_RD = y_RD * factor_D[None, :]
    if bias_ptr is not None:
        y_RD += tl.load(bias_ptr + columns_D, mask=columns_D < D, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + out_RD, y_RD, mask=mask_RD)


@triton.jit
def _backward_kernel(
    dy_ptr, x_ptr, weight_ptr, rstd_ptr, residual_ptr, dx_ptr,
    T, D, dy_stride, x_stride, residual_stride,
    KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns_D = tl.arange(0, BLOCK_D)
    mask_RD = (rows_R < T)[:, None] & (columns_D < D)[None, :]

    dy_RD = tl.load(dy_ptr + rows_R[:, None] * dy_stride + columns_D[None, :], mask=mask_RD, other=0.0)
    x_RD = tl.load(x_ptr + rows_R[:, None] * x_stride + columns_D[None, :], mask=mask_RD, other=0.0)
    rstd_R = tl.load(rstd_ptr + rows_R, mask=rows_R < T, other=0.0)

    g_RD = dy_RD.to(tl.float32) * _factor(weight_ptr, columns_D, D, KIND)[None, :]
    normalised_RD = _centred(x_RD.to(tl.float32), mask_RD, D, KIND) * rstd_R[:, None]
    slope_R = tl.sum(g_RD * normalised_RD, axis=1) / D
    if KIND == "layer":
        g_RD = g_RD - (tl.sum(g_RD, axis=1) / D)[:, None]
    dx_RD = rstd_R[:, None] * (g_RD - normalised_RD * slope_R[:, None])
    if residual_ptr is not None:
        residual_at_RD = residual_ptr + rows_R[:, None] * residual_stride + columns_D[None, :]
        dx_RD += tl.load(residual_at_RD, mask=mask_RD, other=0.0).to(tl.float32)
    tl.store(dx_ptr + rows_R[:, None] * D + columns_D[None, :], dx_RD, mask=mask_RD)


def _configuration(T: int, D: int) -> tuple[tuple[int], dict[str, int]]:
    """The grid and the kernel's constants for T rows of D elements."""
    block = row_block(D)
    rows = max(1, _MIN_BLOCK_ELEMENTS // block)
    return (triton.cdiv(T, rows),), {"ROWS": rows, "BLOCK_D": block, "num_warps": warps_for(rows * block)}


def _forward(
    x_TD: Tensor, residual_TD: Tensor | None, norm: Norm, multiplier: float
) -> tuple[Tensor | None, Tensor, Tensor]:
    T, D = x_TD.shape
    x_TD = unit_stride(x_TD)
    bias_D = None if norm.bias_D is None else norm.bias_D.contiguous()
    sum_TD = None
    if residual_TD is not None:
        residual_TD = unit_stride(residual_TD)
        sum_TD = torch.empty((T, D), dtype=residual_TD.dtype, device=x_TD.device)
    stream = x_TD if sum_TD is None else sum_TD
    y_TD = torch.empty((T, D), dtype=norm.dtype or stream.dtype, device=x_TD.device)
    rstd_T = torch.empty((T,), dtype=torch.float32, device=x_TD.device)
    if T:
        grid, constants = _configuration(T, D)
        with device_guard(x_TD):
            _forward_kernel[grid](
                x_TD, residual_TD, norm.weight_D.contiguous(), bias_D, sum_TD, y_TD, rstd_T,
                T, D, x_TD.stride(0), 0 if residual_TD is None else residual_TD.stride(0), norm.eps, multiplier,
                KIND=norm.kind, **constants,
            )  # fmt: skip
    return sum_TD, y_TD, rstd_T


def normalise(x_TD: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """`(y_TD, rstd_T)`; see `reference.normalise`.

    Raises:
        BackendError: D is over `MAX_ROW_ELEMENTS`.
    """
    _, y_TD, rstd_T = _forward(x_TD, None, norm, 1.0)
    return y_TD, rstd_T


def add_and_normalise(
    x_TD: Tensor, residual_TD: Tensor, norm: Norm, multiplier: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """`(sum_TD, y_TD, rstd_T)`; see `reference.add_and_normalise`.

    Raises:
        BackendError: D is over `MAX_ROW_ELEMENTS`.
    """
    sum_TD, y_TD, rstd_T = _forward(x_TD, residual_TD, norm, multiplier)
    assert sum_TD is not None
    return sum_TD, y_TD, rstd_T


def normalise_backward(
    dy_TD: Tensor, x_TD: Tensor, norm: Norm, rstd_T: Tensor, residual_TD: Tensor | None = None
) -> Tensor:
    """`dx_TD`; see `reference.normalise_backward`.

    Raises:
        BackendError: D is over `MAX_ROW_ELEMENTS`.
    """
    T, D = x_TD.shape
    dy_TD, x_TD, rstd_T = unit_stride(dy_TD), unit_stride(x_TD), rstd_T.contiguous()
    if residual_TD is not None:
        residual_TD = unit_stride(residual_TD)
    dx_TD = torch.empty((T, D), dtype=x_TD.dtype, device=x_TD.device)
    if T:
        grid, constants = _configuration(T, D)
        with device_guard(x_TD):
            _backward_kernel[grid](
                dy_TD, x_TD, norm.weight_D.contiguous(), rstd_T, residual_TD, dx_TD,
                T, D, dy_TD.stride(0), x_TD.stride(0), 0 if residual_TD is None else residual_TD.stride(0),
                KIND=norm.kind, **constants,
            )  # fmt: skip
    return dx_TD
