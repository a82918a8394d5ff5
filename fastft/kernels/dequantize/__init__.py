"""Weights that bitsandbytes quantized, to dense matrices."""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Nested(NamedTuple):
    """Double quantization: a block's absmax is `table[code] · absmax + offset`, in fp32."""

    table_256: "Tensor"
    """fp32."""
    absmax_G: "Tensor"
    """fp32, one for `blocksize` codes."""
    offset: "Tensor"
    """fp32, no dimensions."""
    blocksize: int


class FourBit(NamedTuple):
    """A matrix of 4-bit codes, row by row: each element is `table[code] · absmax` of its block."""

    codes_P: "Tensor"
    """uint8; two codes a byte, the first in its upper half."""
    table_16: "Tensor"
    """fp32."""
    absmax_B: "Tensor"
    """Of `blocksize` elements, the last of fewer: fp32, or their uint8 codes where `nested` says what those mean."""
    nested: Nested | None
    blocksize: int
    """A power of two, 32 to 4096."""
    shape: tuple[int, int]
    """(out, in)."""
    dtype: "torch.dtype"
    """What an element is rounded to: fp32, bf16 or fp16."""
