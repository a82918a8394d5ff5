"""Weights that bitsandbytes quantized, as dense matrices.

Import-light: bitsandbytes is loaded only where a quantized layer is met.
"""

import sys

import torch
from torch import nn


def is_quantized(module: nn.Module) -> bool:
    """Whether `module` is a 4-bit linear layer of bitsandbytes."""
    library = sys.modules.get("bitsandbytes")
    return library is not None and isinstance(module, library.nn.Linear4bit)


def is_packed_for_cpu(module: nn.Module) -> bool:
    """Whether bitsandbytes rearranged the weight for inference on a CPU: no dense matrix can be read from it then."""
    return is_quantized(module) and bool(getattr(module.weight.quant_state, "packing_format_for_cpu", False))  # type: ignore[union-attr]


def dense_weight(module: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """The matrix (out × in) of a linear layer in `dtype`; a 4-bit one is dequantized as bitsandbytes does it."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    if not is_quantized(module):
        return weight if weight.dtype == dtype else weight.to(dtype)
    import bitsandbytes.functional as functional

    return functional.dequantize_4bit(weight.data, weight.quant_state).to(dtype)  # type: ignore[attr-defined]
