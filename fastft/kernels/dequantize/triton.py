"""Dequantization in Triton: one pass over memory, with nested statistics on the way.

Same names, signatures and bits as `reference.py`.  bitsandbytes needs three launches for a nested 4-bit weight, and
PyTorch two fp32 matrices for an 8-bit one.
"""

# O out, I in; W words of 8 codes, E elements

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from fastft.kernels.dequantize import FourBit
from fastft.kernels.dequantize.reference import INT8_STEP
from fastft.kernels.launch import device_guard, unit_stride

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_WARPS = 4
_PARTS = 4  # as many loads in flight, and fewer programs to start
_BLOCK_I = 1024  # 8 of a thread: one 64-bit load, one 128-bit store of a 16-bit type


@triton.jit
def _rounded(x, NAME: tl.constexpr):
    if NAME == "bf16":
        x = x.to(tl.bfloat16)
    elif NAME == "fp16":
        x = x.to(tl.float16)
    return x


@triton.jit
def _element(words_W, absmax_W, table_ptr, INDEX: tl.constexpr):
    """Element INDEX of each word; the first of a byte is in its upper half."""
    codes_W = (words_W >> ((4 * INDEX) ^ 4)) & 15
    return tl.load(table_ptr + codes_W) * absmax_W


@triton.jit
def _dequantize_4bit_kernel(
    words_ptr, table_ptr, absmax_ptr, nested_table_ptr, nested_absmax_ptr, offset_ptr, out_ptr, words, elements,
    BLOCKSIZE: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr, DTYPE: tl.constexpr, W: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    offset = 0.0
    if offset_ptr is not None:
        offset = tl.load(offset_ptr)
    columns_W, columns_E = tl.arange(0, W), tl.arange(0, 8 * W)
    for part in tl.static_range(PARTS):
        # Only the part's place is 64 bits wide; within a part 32 do.
        first = (tl.program_id(0).to(tl.int64) * PARTS + part) * W
        mask_W = columns_W < words - first
        words_W = tl.load(words_ptr + first + columns_W, mask=mask_W, other=0)
        blocks_W = first * 8 // BLOCKSIZE + columns_W * 8 // BLOCKSIZE
        absmax_W = tl.load(absmax_ptr + blocks_W, mask=mask_W, other=0)
        if nested_table_ptr is not None:
            scale_W = tl.load(nested_absmax_ptr + blocks_W // NESTED_BLOCKSIZE, mask=mask_W, other=0.0)
            absmax_W = tl.load(nested_table_ptr + absmax_W.to(tl.int32)) * scale_W + offset
        # A thread has a whole word, so its elements are neighbours: one wide store, and nothing to exchange.
        even_E = tl.interleave(
            tl.interleave(_element(words_W, absmax_W, table_ptr, 0), _element(words_W, absmax_W, table_ptr, 4)),
            tl.interleave(_element(words_W, absmax_W, table_ptr, 2), _element(words_W, absmax_W, table_ptr, 6)),
        )
        odd_E = tl.interleave(
            tl.interleave(_element(words_W, absmax_W, table_ptr, 1), _element(words_W, absmax_W, table_ptr, 5)),
            tl.interleave(_element(words_W, absmax_W, table_ptr, 3), _element(words_W, absmax_W, table_ptr, 7)),
        )
        dense_E = _rounded(tl.interleave(even_E, odd_E), DTYPE)
        tl.store(out_ptr + 8 * first + columns_E, dense_E, mask=columns_E < elements - 8 * first)


@triton.jit
def _dequantize_int8_kernel(
    codes_ptr, absmax_ptr, out_ptr, blocks_per_row, width, stride, STEP: tl.constexpr, BLOCK_I: tl.constexpr
):
    program = tl.program_id(0)
    row = (program // blocks_per_row).to(tl.int64)
    columns_I = (program % blocks_per_row) * BLOCK_I + tl.arange(0, BLOCK_I)
    mask_I = columns_I < width
    codes_I = tl.load(codes_ptr + row * stride + columns_I, mask=mask_I, other=0).to(tl.float32)
    tl.store(out_ptr + row * width + columns_I, codes_I * tl.load(absmax_ptr + row) * STEP, mask=mask_I)


def dequantize_4bit(weight: FourBit, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """`dense_OI`; see `reference.dequantize_4bit`.

    bitsandbytes' CUDA kernels give the same bits, but for results under fp32's smallest normal number (1.2e-38): they
    are compiled to flush those to zero.
    """
    words_W, nested = _words(weight.codes_P), weight.nested
    if out is None:
        out = torch.empty(weight.shape, dtype=dtype, device=words_W.device)
    width = 32 * _WARPS
    with device_guard(words_W):
        _dequantize_4bit_kernel[(triton.cdiv(len(words_W), width * _PARTS),)](
            words_W, weight.table_16, weight.absmax_B,
            *((nested.table_256, nested.absmax_G, nested.offset) if nested is not None else (None, None, None)),
            out, len(words_W), out.numel(),
            BLOCKSIZE=weight.blocksize, NESTED_BLOCKSIZE=nested.blocksize if nested is not None else 1,
            DTYPE=_NAMES[weight.dtype], W=width, PARTS=_PARTS, num_warps=_WARPS,
            # table · absmax is rounded before the offset is added.
            enable_fp_fusion=False,
        )  # fmt: skip
    return out


def _words(codes_P: Tensor) -> Tensor:
    """The bytes as int32; copied only where they make no whole words."""
    if len(codes_P) % 4 or codes_P.storage_offset() % 4:
        codes_P = functional.pad(codes_P, (0, -len(codes_P) % 4))
    return codes_P.view(torch.int32)


def dequantize_int8(codes_OI: Tensor, absmax_O: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """`dense_OI`; see `reference.dequantize_int8`."""
    size_out, size_in = codes_OI.shape
    codes_OI = unit_stride(codes_OI)
    if out is None:
        out = torch.empty((size_out, size_in), dtype=dtype, device=codes_OI.device)
    blocks_per_row = triton.cdiv(size_in, _BLOCK_I)
    with device_guard(codes_OI):
        _dequantize_int8_kernel[(size_out * blocks_per_row,)](
            codes_OI, absmax_O.contiguous(), out, blocks_per_row, size_in, codes_OI.stride(0),
            STEP=INT8_STEP, BLOCK_I=_BLOCK_I, num_warps=_WARPS,
        )  # fmt: skip
    return out
