"""Rotary position embedding in Triton, in place.

Same name, signature and rounding as `reference.py`: computed in fp32, rounded once.  A program rotates
several heads of one token, so that the tables' row is loaded once for them.
"""

# T tokens, H heads, d head size, S rows of the tables, r their width, h half of it

import triton
import triton.language as tl
from torch import Tensor

from fastft.kernels.launch import device_guard, next_power_of_2, unit_stride, warps_for
from fastft.kernels.rope import rotary_width

_MAX_BLOCK_ELEMENTS = 2048
"""Of each half; 32 heads of size 128."""


@triton.jit
def _rotate_kernel(
    x_ptr, cos_ptr, sin_ptr, H, S, x_stride_T, x_stride_H, x_stride_d, cos_stride, sin_stride,
    INVERSE: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    heads_H = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    lanes_h = tl.arange(0, BLOCK_HALF)
    lanes_mask_h = lanes_h < HALF

    row = token % S
    cos_h = tl.load(cos_ptr + row * cos_stride + lanes_h, mask=lanes_mask_h, other=0.0).to(tl.float32)[None, :]
    sin_h = tl.load(sin_ptr + row * sin_stride + lanes_h, mask=lanes_mask_h, other=0.0).to(tl.float32)[None, :]
    if INVERSE:
        sin_h = -sin_h

    first_at_Hh = (
        x_ptr + token * x_stride_T + heads_H.to(tl.int64)[:, None] * x_stride_H + lanes_h[None, :] * x_stride_d
    )
    second_at_Hh = first_at_Hh + HALF * x_stride_d
    mask_Hh = (heads_H < H)[:, None] & lanes_mask_h[None, :]
    first_Hh = tl.load(first_at_Hh, mask=mask_Hh, other=0.0).to(tl.float32)
    second_Hh = tl.load(second_at_Hh, mask=mask_Hh, other=0.0).to(tl.float32)
    tl.store(first_at_Hh, first_Hh * cos_h - second_Hh * sin_h, mask=mask_Hh)
    tl.store(second_at_Hh, second_Hh * cos_h + first_Hh * sin_h, mask=mask_Hh)


def rope_(x_THd: Tensor, cos_Sr: Tensor, sin_Sr: Tensor, *, inverse: bool = False) -> Tensor:
    """Rotates and returns `x_THd`; see `reference.rope_`.

    Raises:
        ModelError: an odd r, or one over d.
    """
    half = rotary_width(x_THd, cos_Sr, sin_Sr) // 2
    T, H, _ = x_THd.shape
    if x_THd.numel() == 0 or half == 0:
        return x_THd
    cos_Sr, sin_Sr = unit_stride(cos_Sr), unit_stride(sin_Sr)
    block_half = next_power_of_2(half)
    block_heads = min(next_power_of_2(H), max(1, _MAX_BLOCK_ELEMENTS // block_half))
    with device_guard(x_THd):
        _rotate_kernel[(T, triton.cdiv(H, block_heads))](
            x_THd, cos_Sr, sin_Sr, H, len(cos_Sr), *x_THd.stride(), cos_Sr.stride(0), sin_Sr.stride(0),
            INVERSE=inverse, HALF=half, BLOCK_H=block_heads, BLOCK_HALF=block_half,
            num_warps=warps_for(block_heads * block_half),
        )  # fmt: skip
    return x_THd
