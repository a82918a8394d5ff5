"""Sums over tokens of products of two matrices' elements, in plain PyTorch."""

# T tokens, O columns

import torch
from torch import Tensor

_BLOCK_ELEMENTS = 2**22
"""So many elements exist in fp32 at a time."""


def column_products(x_TO: Tensor, y_TO: Tensor, offset_O: Tensor | None = None) -> Tensor:
    """`Σ_t x · (y − offset)` (O).

    Args:
        x_TO: fp64, fp32, bf16 or fp16; T may be 0.
        y_TO: x's shape and dtype.
        offset_O: what is taken off each row of y; None for nothing.

    Returns:
        The sums, fp32 at least.
    """
    T, columns = x_TO.shape
    wide = torch.promote_types(x_TO.dtype, torch.float32)
    sums_O = torch.zeros(columns, dtype=wide, device=x_TO.device)
    rows = max(1, _BLOCK_ELEMENTS // max(1, columns))
    for start in range(0, T, rows):
        # Converted first: products of 16 bits would be rounded.
        part_TO = y_TO[start : start + rows].to(wide, copy=True)
        if offset_O is not None:
            part_TO.sub_(offset_O)
        sums_O += part_TO.mul_(x_TO[start : start + rows]).sum(dim=0)
    return sums_O
