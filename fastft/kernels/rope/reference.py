"""Rotary position embedding in plain PyTorch.

Source of the formula: `apply_rotary_pos_emb` in transformers' `modeling_llama.py`, `x·cos + rotate_half(x)·sin`,
where the halves of cos and of sin are equal; so only their first halves are read.  Tables narrower than the heads
rotate the first part of each head, as in `modeling_phi3.py`.  Transformers rounds each product to the activations'
dtype; here the rotation is computed in fp32 and rounded once.
"""

# T tokens, H heads, d head size, S rows of the tables, r their width, h half of it

import torch
from torch import Tensor

from fastft.kernels.rope import rotary_width


def _rows_for(table_Sr: Tensor, T: int, half: int) -> Tensor:
    """The first half of the table's rows as fp32, one per token, broadcast over heads: T×1×h."""
    table_Sh = table_Sr[:T, :half].to(torch.float32)
    S = len(table_Sh)
    if T > S:
        table_Sh = table_Sh.repeat(-(-T // S), 1)[:T]
    return table_Sh.unsqueeze(1)


def rope_(x_THd: Tensor, cos_Sr: Tensor, sin_Sr: Tensor, *, inverse: bool = False) -> Tensor:
    """Rotate every head of every token, in place; token t uses the tables' row t mod S.

    Args:
        x_THd: fp32, bf16 or fp16; any strides, so a view of a packed qkv projection is rotated where it lies.
        cos_Sr: cosines, both halves equal; r is at most d, and what is past it in each head stays.
        sin_Sr: sines, both halves equal.
        inverse: rotate back, which is the gradient.

    Returns:
        `x_THd` itself.

    Raises:
        ModelError: an odd r, or one over d.
    """
    half = rotary_width(x_THd, cos_Sr, sin_Sr) // 2
    T = len(x_THd)
    cos_T1h, sin_T1h = _rows_for(cos_Sr, T, half), _rows_for(sin_Sr, T, half)
    sign = -1 if inverse else 1
    first_THh, second_THh = x_THd[..., :half], x_THd[..., half : 2 * half]
    # Each product is rounded by itself, as transformers' are: fused to one operation, the sum would have other bits.
    rotated_THh = torch.mul(first_THh, cos_T1h).sub_(torch.mul(second_THh, sin_T1h), alpha=sign)
    second_rotated_THh = torch.mul(second_THh, cos_T1h).add_(torch.mul(first_THh, sin_T1h), alpha=sign)
    first_THh.copy_(rotated_THh)
    second_THh.copy_(second_rotated_THh)
    return x_THd
