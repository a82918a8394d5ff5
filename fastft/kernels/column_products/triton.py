"""Sums over tokens of products of two matrices' elements, in Triton.

A program owns a block of columns and walks down a share of the rows; the shares' sums are added in a fixed order, so
that they are the same in every run.
"""

# T tokens, O columns, S shares of the rows

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastft.kernels.column_products import reference
from fastft.kernels.launch import device_guard, unit_stride

_BLOCK_T, _BLOCK_O, _WARPS = 16, 256, 4
_PROGRAMS = 1024
"""About how many programs keep a large GPU busy."""
_FEWEST_ROWS = 64
"""Of a share."""


@triton.jit
def _column_products_kernel(
    x_ptr, y_ptr, offset_ptr, sums_ptr, T, width, rows_each, x_stride, y_stride,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    columns_O = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    share = tl.program_id(1).to(tl.int64)
    first = share * rows_each
    last = tl.minimum(first + rows_each, T)
    inside_O = columns_O < width
    sum_O = tl.zeros((BLOCK_O,), tl.float32)
    offset_O = tl.zeros((BLOCK_O,), tl.float32)
    if offset_ptr is not None:
        offset_O = tl.load(offset_ptr + columns_O, mask=inside_O, other=0.0).to(tl.float32)
    for start in range(first, last, BLOCK_T):
        rows_T = start + tl.arange(0, BLOCK_T).to(tl.int64)
        mask_TO = (rows_T < last)[:, None] & inside_O[None, :]
        x_TO = tl.load(x_ptr + rows_T[:, None] * x_stride + columns_O[None, :], mask=mask_TO, other=0.0)
        y_TO = tl.load(y_ptr + rows_T[:, None] * y_stride + columns_O[None, :], mask=mask_TO, other=0.0)
        sum_O += tl.sum(x_TO.to(tl.float32) * (y_TO.to(tl.float32) - offset_O[None, :]), axis=0)
    tl.store(sums_ptr + share * width + columns_O, sum_O, mask=inside_O)


def column_products(x_TO: Tensor, y_TO: Tensor, offset_O: Tensor | None = None) -> Tensor:
    """See `reference.column_products`; sums are fp32."""
    if x_TO.dtype == torch.float64 or not x_TO.numel():
        return reference.column_products(x_TO, y_TO, offset_O)
    T, columns = x_TO.shape
    x_TO, y_TO = unit_stride(x_TO), unit_stride(y_TO)
    blocks = triton.cdiv(columns, _BLOCK_O)
    shares = max(1, min(triton.cdiv(T, _FEWEST_ROWS), _PROGRAMS // blocks))
    rows_each = triton.cdiv(triton.cdiv(T, shares), _BLOCK_T) * _BLOCK_T
    sums_SO = torch.empty((triton.cdiv(T, rows_each), columns), dtype=torch.float32, device=x_TO.device)
    with device_guard(x_TO):
        _column_products_kernel[(blocks, len(sums_SO))](
            x_TO, y_TO, None if offset_O is None else offset_O.contiguous(), sums_SO,
            T, columns, rows_each, x_TO.stride(0), y_TO.stride(0),
            BLOCK_T=_BLOCK_T, BLOCK_O=_BLOCK_O, num_warps=_WARPS,
        )  # fmt: skip
    return sums_SO[0] if len(sums_SO) == 1 else sums_SO.sum(dim=0)
