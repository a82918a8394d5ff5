"""SwiGLU in Triton: one pass over memory forward, one backward.

Same names and signatures as `reference.py`, and the same rounding forward.  Backward, dgate is computed in
fp32 and rounded once, where eager PyTorch also rounds `dact · up`.
"""

# T tokens, F feed-forward width

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastft.kernels.launch import device_guard, unit_stride

# Two 128-bit accesses of a 16-bit type per thread and tensor.  There is no reduction, so small programs do.
_BLOCK_F = 2048
_NUM_WARPS = 4


@triton.jit
def _tile(blocks_per_row, F, BLOCK_F: tl.constexpr):
    """The row, the columns and their mask of this program; int64, as T·F may pass 2³¹."""
    program = tl.program_id(0)
    row = (program // blocks_per_row).to(tl.int64)
    columns_F = (program % blocks_per_row).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    return row, columns_F, columns_F < F


@triton.jit
def _forward_kernel(gate_ptr, up_ptr, act_ptr, blocks_per_row, F, gate_stride, up_stride, BLOCK_F: tl.constexpr):
    row, columns_F, mask_F = _tile(blocks_per_row, F, BLOCK_F)
    gate_F = tl.load(gate_ptr + row * gate_stride + columns_F, mask=mask_F, other=0.0).to(tl.float32)
    up_F = tl.load(up_ptr + row * up_stride + columns_F, mask=mask_F, other=0.0).to(tl.float32)
    silu_F = (gate_F * tl.sigmoid(gate_F)).to(act_ptr.dtype.element_ty).to(tl.float32)
    tl.store(act_ptr + row * F + columns_F, silu_F * up_F, mask=mask_F)


@triton.jit
def _backward_kernel(
    dact_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, act_ptr,
    blocks_per_row, F, dact_stride, gate_stride, up_stride,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    row, columns_F, mask_F = _tile(blocks_per_row, F, BLOCK_F)
    dact_F = tl.load(dact_ptr + row * dact_stride + columns_F, mask=mask_F, other=0.0).to(tl.float32)
    gate_F = tl.load(gate_ptr + row * gate_stride + columns_F, mask=mask_F, other=0.0).to(tl.float32)
    up_F = tl.load(up_ptr + row * up_stride + columns_F, mask=mask_F, other=0.0).to(tl.float32)
    sigmoid_F = tl.sigmoid(gate_F)
    silu_F = (gate_F * sigmoid_F).to(act_ptr.dtype.element_ty).to(tl.float32)
    dgate_F = dact_F * up_F * sigmoid_F * (1.0 + gate_F * (1.0 - sigmoid_F))
    out_F = row * F + columns_F
    tl.store(dgate_ptr + out_F, dgate_F, mask=mask_F)
    tl.store(dup_ptr + out_F, dact_F * silu_F, mask=mask_F)
    tl.store(act_ptr + out_F, silu_F * up_F, mask=mask_F)


def _rows(*tensors_TF: Tensor) -> tuple[int, int, list[Tensor], list[int]]:
    """How to walk the tensors: rows, their width, the tensors, their row strides.

    Contiguous tensors are one long row: no program is partly empty, and an F that is no multiple of the
    vector width costs nothing.  A strided one (half of a packed gate_up projection) keeps its rows.
    """
    T, F = tensors_TF[0].shape
    tensors_TF = tuple(unit_stride(x_TF) for x_TF in tensors_TF)
    if all(x_TF.is_contiguous() for x_TF in tensors_TF):
        return 1, T * F, list(tensors_TF), [0] * len(tensors_TF)
    return T, F, list(tensors_TF), [x_TF.stride(0) for x_TF in tensors_TF]


def swiglu(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """`act_TF`; see `reference.swiglu`."""
    act_TF = torch.empty(gate_TF.shape, dtype=gate_TF.dtype, device=gate_TF.device)
    if act_TF.numel():
        rows, width, inputs, strides = _rows(gate_TF, up_TF)
        blocks_per_row = triton.cdiv(width, _BLOCK_F)
        with device_guard(gate_TF):
            _forward_kernel[(rows * blocks_per_row,)](
                *inputs, act_TF, blocks_per_row, width, *strides, BLOCK_F=_BLOCK_F, num_warps=_NUM_WARPS
            )
    return act_TF


def swiglu_backward(dact_TF: Tensor, gate_TF: Tensor, up_TF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`(dgate_TF, dup_TF, act_TF)`; see `reference.swiglu_backward`."""
    dgate_TF = torch.empty(gate_TF.shape, dtype=gate_TF.dtype, device=gate_TF.device)
    dup_TF = torch.empty(gate_TF.shape, dtype=gate_TF.dtype, device=gate_TF.device)
    act_TF = torch.empty(gate_TF.shape, dtype=gate_TF.dtype, device=gate_TF.device)
    if act_TF.numel():
        rows, width, inputs, strides = _rows(dact_TF, gate_TF, up_TF)
        blocks_per_row = triton.cdiv(width, _BLOCK_F)
        with device_guard(gate_TF):
            _backward_kernel[(rows * blocks_per_row,)](
                *inputs, dgate_TF, dup_TF, act_TF, blocks_per_row, width, *strides,
                BLOCK_F=_BLOCK_F, num_warps=_NUM_WARPS,
            )  # fmt: skip
    return dgate_TF, dup_TF, act_TF
