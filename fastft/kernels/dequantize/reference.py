"""Dequantization in plain PyTorch.

Source of the formulas and of their roundings: bitsandbytes.  4 bits: `_dequantize_4bit_compute` in
`backends/default/ops.py` and `kDequantizeBlockwise` in `csrc/kernels.cu` (table × absmax in fp32, rounded once), with
`functional.dequantize_4bit` for the nested absmax (table × absmax in fp32, rounded, then + offset).  8 bits:
`int8_vectorwise_dequant` in `_ops.py`, which PEFT merges with.
"""

# O out, I in

import torch
from torch import Tensor

from fastft.kernels.dequantize import FourBit

INT8_STEP = 7.874015718698502e-3
"""1/127 as bitsandbytes writes it."""


def dequantize_4bit(weight: FourBit, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The dense matrix.

    Args:
        weight: any shape; in · out may be odd, the last byte then has a code to spare.
        dtype: of the result.  An element is rounded to `weight.dtype` first, as bitsandbytes does.
        out: a contiguous tensor of the result's shape and dtype to write to; a new one if None.

    Returns:
        `dense_OI` in `dtype`: `out` where it was given.
    """
    size_out, size_in = weight.shape
    elements = size_out * size_in
    absmax_B = weight.absmax_B
    if weight.nested is not None:
        nested = weight.nested
        scale_B = nested.absmax_G.repeat_interleave(nested.blocksize)[: len(absmax_B)]
        absmax_B = nested.table_256[absmax_B.long()] * scale_B + nested.offset
    codes_P2 = torch.stack((weight.codes_P >> 4, weight.codes_P & 15), dim=1)
    value_E = weight.table_16[codes_P2.flatten()[:elements].long()]
    value_E = value_E * absmax_B.repeat_interleave(weight.blocksize)[:elements]
    return _result(value_E.view(weight.shape).to(weight.dtype), dtype, out)


def dequantize_int8(codes_OI: Tensor, absmax_O: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """`code · absmax / 127`, in fp32 and rounded once.

    Args:
        codes_OI: int8.
        absmax_O: fp32, a row's.
        dtype: of the result.
        out: as in `dequantize_4bit`.

    Returns:
        `dense_OI` in `dtype`: `out` where it was given.
    """
    return _result(codes_OI * absmax_O[:, None] * INT8_STEP, dtype, out)


def _result(dense_OI: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    return dense_OI.to(dtype) if out is None else out.copy_(dense_OI)
