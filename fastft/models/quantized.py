"""Weights that bitsandbytes quantized, as dense matrices.

Import-light: bitsandbytes is loaded only where a quantized layer is met.
"""

import functools
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fastft.kernels.dequantize import FourBit, Nested, reference


def is_quantized(module: nn.Module) -> bool:
    """Whether `module` is a 4-bit linear layer of bitsandbytes, or an 8-bit one whose weight is stored in 8 bits."""
    return _is_4bit(module) or _is_int8(module)


def is_packed_for_cpu(module: nn.Module) -> bool:
    """Whether bitsandbytes rearranged the weight for inference on a CPU: no dense matrix can be read from it then."""
    return _is_4bit(module) and bool(getattr(module.weight.quant_state, "packing_format_for_cpu", False))  # type: ignore[union-attr]


def dense_weight(module: nn.Module, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The matrix (out × in) of a linear layer in `dtype`.

    A quantized one has the bits that bitsandbytes and PEFT make of it when they dequantize, on a GPU by one kernel.

    Args:
        module: `nn.Linear` or one like it, or quantized; 4 bits must not be packed for the CPU (`is_packed_for_cpu`).
        dtype: of the result; fp32, bf16 or fp16.
        out: where to write a dequantized matrix: contiguous, of the result's shape and dtype.  A weight that is not
            quantized is returned as it is, or converted.
    """
    weight = module.weight
    assert isinstance(weight, Tensor)
    if not is_quantized(module):
        return weight if weight.dtype == dtype else weight.to(dtype)
    kernels = _kernels_on(weight.device.type)
    dense: Tensor
    if _is_int8(module):
        dense = (kernels or reference).dequantize_int8(weight.data, _row_absmax(module), dtype, out)
    elif kernels is not None:
        dense = kernels.dequantize_4bit(four_bit(weight), dtype, out)
    else:
        import bitsandbytes.functional as functional

        dense = functional.dequantize_4bit(weight.data, weight.quant_state)  # type: ignore[attr-defined]
        dense = dense.to(dtype) if out is None else out.copy_(dense)
    return dense


def four_bit(weight: Any) -> FourBit:
    """What a `bitsandbytes.nn.Params4bit` holds; nothing is copied."""
    state = weight.quant_state
    nested = None
    if state.nested:
        nested = Nested(state.state2.code, state.state2.absmax, state.offset, state.state2.blocksize)
    # Sharded training stores the bytes under another dtype.
    codes_P = weight.data.reshape(-1).view(torch.uint8)
    table_16 = _table(state.quant_type, weight.device)
    return FourBit(codes_P, table_16, state.absmax, nested, state.blocksize, tuple(state.shape), state.dtype)


def _is_4bit(module: nn.Module) -> bool:
    library = sys.modules.get("bitsandbytes")
    return library is not None and isinstance(module, library.nn.Linear4bit)


def _is_int8(module: nn.Module) -> bool:
    library = sys.modules.get("bitsandbytes")
    # With `has_fp16_weights` the weight is dense, and quantized anew at each call.
    return library is not None and isinstance(module, library.nn.Linear8bitLt) and module.weight.dtype == torch.int8


def _row_absmax(module: Any) -> Tensor:
    """fp32 (out); it moves from the weight to the layer's state in the first forward."""
    absmax_O: Tensor = module.state.SCB if module.state.SCB is not None else module.weight.SCB
    return absmax_O.to(module.weight.device)


@functools.cache
def _table(quant_type: str, device: torch.device) -> Tensor:
    from bitsandbytes.functional import get_4bit_type

    table_16: Tensor = get_4bit_type(quant_type, device=device)
    if quant_type == "fp4":
        # bitsandbytes' table has +0 here; its CUDA kernel, which does not read it, applies the sign bit to zero too.
        table_16[8] = -0.0
    return table_16


@functools.cache
def _kernels_on(device: str) -> ModuleType | None:
    """The fused kernels, where they run."""
    if device != "cuda":
        return None
    try:
        from fastft.kernels.dequantize import triton
    except ImportError:
        return None
    return triton
