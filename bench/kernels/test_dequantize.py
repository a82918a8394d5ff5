"""Bandwidth of dequantization, beside bitsandbytes' own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastft.models.quantized import four_bit

pytestmark = pytest.mark.gpu

SHAPES = [(14336, 4096), (4096, 4096), (8960, 1536)]


def _random(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("implementation", ["triton", "bitsandbytes", "reference"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_dequantize_4bit(
    kind: str,
    implementation: str,
    shape: tuple[int, int],
    measure_bandwidth: Callable[[str, Callable[[], Any]], None],
) -> None:
    """Reads half a byte an element and a byte a block of 64, writes bf16."""
    import bitsandbytes

    from fastft.kernels.dequantize import reference, triton

    def make() -> tuple[Callable[[], Any], int]:
        weight = bitsandbytes.nn.Params4bit(_random(shape), requires_grad=False, quant_type=kind).cuda()
        state, packed = weight.quant_state, four_bit(weight)
        moved = packed.codes_P.nbytes + packed.absmax_B.nbytes + 2 * shape[0] * shape[1]
        if implementation == "bitsandbytes":
            return lambda: bitsandbytes.functional.dequantize_4bit(weight.data, state), moved
        kernels = triton if implementation == "triton" else reference
        return lambda: kernels.dequantize_4bit(packed, torch.bfloat16), moved

    measure_bandwidth(f"dequantize {kind} {implementation} {shape[0]}x{shape[1]}", make)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_dequantize_int8(
    implementation: str, shape: tuple[int, int], measure_bandwidth: Callable[[str, Callable[[], Any]], None]
) -> None:
    """Reads a byte an element and an fp32 a row, writes bf16; the reference is what PEFT does."""
    from bitsandbytes.functional import int8_vectorwise_quant

    from fastft.kernels.dequantize import reference, triton

    kernels = triton if implementation == "triton" else reference

    def make() -> tuple[Callable[[], Any], int]:
        codes, absmax, _ = int8_vectorwise_quant(_random(shape).half())
        moved = 3 * codes.nbytes + absmax.nbytes
        return lambda: kernels.dequantize_int8(codes, absmax, torch.bfloat16), moved

    measure_bandwidth(f"dequantize int8 {implementation} {shape[0]}x{shape[1]}", make)
