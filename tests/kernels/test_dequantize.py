"""Judged by bits: bitsandbytes' own results, in every dtype."""

# O out, I in

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fastft.kernels.dequantize import FourBit, reference, triton
from fastft.models.quantized import four_bit

bitsandbytes = pytest.importorskip("bitsandbytes")

OPERATION = "dequantize"
# One row; sizes that are no multiple of a block, of a byte, or of a program; several programs.  Rows that are a
# multiple of 32 and none of the block are missing: bitsandbytes 0.50's CPU code takes the wrong blocks there.
SHAPES = [(1, 64), (63, 1000), (3, 5000), (7, 9), (129, 320)]

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")


def bits(x: Tensor) -> Tensor:
    if not x.is_cuda:
        # FP4 has two zeros.  bitsandbytes' CPU code gives the second one its sign or none, depending on the shape.
        x = x + 0.0
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def rounded(exact: Tensor, dtype: torch.dtype, kernels: ModuleType) -> Tensor:
    """fp32 to `dtype` as what runs the kernel does it: Triton's interpreter cuts off what bf16 cannot hold."""
    if dtype == torch.bfloat16 and kernels is triton and not exact.is_cuda:
        return (bits(exact) & -65536).view(torch.float32).to(dtype)
    return exact.to(dtype)


def quantize(
    shape: tuple[int, int], kind: str, device: torch.device, *, dtype: torch.dtype = torch.float32, nested: bool = True,
    blocksize: int = 64,
) -> Any:  # fmt: skip
    """A weight with every code, and with blocks of very different size, one of them zero."""
    dense_OI = torch.randn(shape) * torch.logspace(-4, 4, shape[1])
    dense_OI.view(-1)[:blocksize] = 0
    return bitsandbytes.nn.Params4bit(
        dense_OI.to(dtype), requires_grad=False, quant_type=kind, compress_statistics=nested, blocksize=blocksize
    ).to(device)


def stock(weight: Any, dtype: torch.dtype) -> Tensor:
    weight.quant_state.dtype = dtype
    return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_4_bits_are_bitsandbytes_bits(shape, kind, nested, dtype, device, kernels):
    weight = quantize(shape, kind, device, nested=nested)
    exact = stock(weight, torch.float32)
    expected = rounded(exact, dtype, kernels)
    if expected.dtype != torch.bfloat16 or kernels is reference or device.type == "cuda":
        assert torch.equal(bits(expected), bits(stock(weight, dtype))), "bitsandbytes rounds once"
    weight.quant_state.dtype = dtype
    dense = kernels.dequantize_4bit(four_bit(weight), dtype)
    assert (dense.shape, dense.dtype) == (shape, dtype)
    assert torch.equal(bits(dense), bits(expected))


@pytest.mark.parametrize("blocksize", [32, 128, 256, 4096])
def test_blocks_of_other_sizes(blocksize, device, kernels):
    weight = quantize((129, 332), "nf4", device, blocksize=blocksize)
    dense = kernels.dequantize_4bit(four_bit(weight), torch.float32)
    assert torch.equal(bits(dense), bits(stock(weight, torch.float32)))


def test_every_code_of_both_tables(device, kernels):
    for kind in ("nf4", "fp4"):
        weight = quantize((8, 64), kind, device, nested=False)
        weight.data = torch.arange(256, dtype=torch.uint8, device=device).view(-1, 1)
        dense = kernels.dequantize_4bit(four_bit(weight), torch.float32)
        assert torch.equal(bits(dense), bits(stock(weight, torch.float32)))
        assert len(dense.view(-1, 64)[-1].unique()) > 4


def test_the_second_zero_of_fp4_has_its_sign(device, kernels):
    """As bitsandbytes' CUDA kernel makes it, which applies the sign bit whatever stands behind it."""
    weight = quantize((8, 64), "fp4", device, nested=False)
    weight.data = torch.full((256, 1), 0x80, dtype=torch.uint8, device=device)
    dense = kernels.dequantize_4bit(four_bit(weight), torch.float32)
    assert not dense.any()
    assert torch.equal(torch.signbit(dense).view(-1, 2), torch.tensor([True, False], device=device).expand(256, 2))


@pytest.mark.parametrize("first", [1, 2, 3, 4])
def test_codes_may_begin_at_any_byte(first, device, kernels):
    weight = quantize((63, 1000), "nf4", device)
    expected = kernels.dequantize_4bit(four_bit(weight), torch.float32)
    storage = torch.zeros(first + weight.data.numel(), dtype=torch.uint8, device=device)
    codes = four_bit(weight).codes_P
    moved = storage[first:].copy_(codes)
    dense = kernels.dequantize_4bit(four_bit(weight)._replace(codes_P=moved), torch.float32)
    assert torch.equal(dense, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_element_is_rounded_to_the_weights_dtype_first(dtype, device, kernels):
    """As `dequantize_4bit(…).to(dtype)` does."""
    weight = quantize((63, 1000), "nf4", device)
    weight.quant_state.dtype = torch.bfloat16
    exact = stock(weight, torch.float32)
    weight.quant_state.dtype = torch.bfloat16
    dense = kernels.dequantize_4bit(four_bit(weight), dtype)
    expected = rounded(exact, torch.bfloat16, kernels).to(dtype)
    assert torch.equal(bits(dense), bits(expected))
    assert not torch.equal(dense, exact.to(dtype))


def test_a_buffer_is_written_and_nothing_behind_it(device, kernels, dtype):
    weight = quantize((7, 9), "nf4", device, dtype=dtype)
    weight.quant_state.dtype = dtype
    storage = torch.full((64,), 7.0, dtype=dtype, device=device)
    out = storage[:63].view(7, 9)
    assert kernels.dequantize_4bit(four_bit(weight), dtype, out) is out
    assert torch.equal(bits(out), bits(kernels.dequantize_4bit(four_bit(weight), dtype)))
    assert storage[63] == 7


def test_other_storage_than_bytes(device, kernels):
    weight = quantize((64, 100), "nf4", device)
    expected = kernels.dequantize_4bit(four_bit(weight), torch.float32)
    weight.data = weight.data.view(-1).view(torch.bfloat16).view(-1, 1)
    assert torch.equal(kernels.dequantize_4bit(four_bit(weight), torch.float32), expected)


@pytest.mark.parametrize("shape", [(1, 64), (63, 1000), (3, 5000)], ids=str)
def test_int8_has_the_bits_that_peft_merges_with(shape, dtype, device, kernels):
    dense_OI = torch.randn(shape, device=device) * torch.logspace(-2, 2, shape[0], device=device)[:, None]
    codes_OI, absmax_O, _ = bitsandbytes.functional.int8_vectorwise_quant(dense_OI.half())
    exact = bitsandbytes.functional.int8_vectorwise_dequant(codes_OI, absmax_O)
    dense = kernels.dequantize_int8(codes_OI, absmax_O, dtype)
    assert dense.dtype == dtype
    assert torch.equal(bits(dense), bits(rounded(exact, dtype, kernels)))
    out = torch.empty(shape, dtype=dtype, device=device)
    assert kernels.dequantize_int8(codes_OI, absmax_O, dtype, out) is out
    assert torch.equal(bits(out), bits(dense))


@pytest.mark.parametrize("stride", [200, 2**30 + 3])
def test_int8_rows_of_another_stride(stride, device, kernels):
    """Also where the last one starts past element 2³¹."""
    codes_OI = torch.randint(-127, 128, (4, 100), dtype=torch.int8, device=device)
    apart_OI = torch.empty(3 * stride + 100, dtype=torch.int8, device=device).as_strided((4, 100), (stride, 1))
    absmax_O = torch.rand(4, device=device)
    expected = kernels.dequantize_int8(codes_OI, absmax_O, torch.float32)
    assert torch.equal(kernels.dequantize_int8(apart_OI.copy_(codes_OI), absmax_O, torch.float32), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_large_matrices_on_a_gpu(kind, dtype, device):
    weight = quantize((4096, 1536), kind, device)
    expected = stock(weight, dtype)
    assert torch.equal(bits(triton.dequantize_4bit(four_bit(weight), dtype)), bits(expected))


@pytest.mark.gpu
def test_elements_past_2_to_the_31(device):
    """The last rows of one that long, against bitsandbytes' own on those rows alone."""
    rows, tail = 2**31 // 4096 + 16, 8
    weight = quantize((tail, 4096), "nf4", device, nested=False)
    weight.quant_state.dtype = torch.bfloat16
    short = four_bit(weight)
    codes_P = torch.zeros(rows * 2048, dtype=torch.uint8, device=device)
    absmax_B = torch.zeros(rows * 64, device=device)
    codes_P[-tail * 2048 :], absmax_B[-tail * 64 :] = short.codes_P, short.absmax_B
    long: FourBit = short._replace(codes_P=codes_P, absmax_B=absmax_B, shape=(rows, 4096))
    dense = triton.dequantize_4bit(long, torch.bfloat16)
    assert torch.equal(bits(dense[-tail:]), bits(stock(weight, torch.bfloat16)))
    assert not dense[:-tail].any()
