"""The MLP's activation in Triton: one pass over memory forward, one backward.

Same names and signatures as `reference.py`, and the same rounding forward.  Backward, dgate is computed in
fp32 and rounded once, where eager PyTorch also rounds `dact · up`.
"""

# T tokens, F feed-forward width

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastft.kernels.activation import ActivationKind
from fastft.kernels.launch import device_guard, optional_unit_stride, place_of, unit_stride

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
def activation_and_slope(x_F, KIND: tl.constexpr):
    """The activation of x, and its derivative."""
    if KIND == "gelu":
        share_F = 0.5 * (1.0 + tl.math.erf(x_F * 0.7071067811865476))
        slope_F = 0.3989422804014327 * tl.exp(-0.5 * x_F * x_F)  # φ(x)
    else:
        # ½(1 + tanh(u)) = sigmoid(2u): the approximation of GELU is a silu of another argument.
        argument_F, inner_F = x_F, 1.0
        if KIND == "gelu_tanh":
            argument_F = 1.5957691216057308 * x_F * (1.0 + 0.044715 * x_F * x_F)
            inner_F = 1.5957691216057308 * (1.0 + 0.134145 * x_F * x_F)
        share_F = tl.sigmoid(argument_F)
        slope_F = share_F * (1.0 - share_F) * inner_F
    return x_F * share_F, share_F + x_F * slope_F


@triton.jit
def _forward_kernel(
    gate_ptr, up_ptr, act_ptr, blocks_per_row, F, gate_stride, up_stride, KIND: tl.constexpr, BLOCK_F: tl.constexpr
):
    row, columns_F, mask_F = _tile(blocks_per_row, F, BLOCK_F)
    gate_F = tl.load(gate_ptr + row * gate_stride + columns_F, mask=mask_F, other=0.0).to(tl.float32)
    act_F, _ = activation_and_slope(gate_F, KIND)
    if up_ptr is not None:
        up_F = tl.load(up_ptr + row * up_stride + columns_F, mask=mask_F, other=0.0).to(tl.float32)
        act_F = act_F.to(act_ptr.dtype.element_ty).to(tl.float32) * up_F
    tl.store(act_ptr + row * F + columns_F, act_F, mask=mask_F)


@triton.jit
def _backward_kernel(
    dact_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, act_ptr,
    blocks_per_row, F, dact_stride, gate_stride, up_stride, dgate_stride, dup_stride, act_stride,
    KIND: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    row, columns_F, mask_F = _tile(blocks_per_row, F, BLOCK_F)
    dact_F = tl.load(dact_ptr + row * dact_stride + columns_F, mask=mask_F, other=0.0).to(tl.float32)
    gate_F = tl.load(gate_ptr + row * gate_stride + columns_F, mask=mask_F, other=0.0).to(tl.float32)
    act_F, slope_F = activation_and_slope(gate_F, KIND)
    dgate_F = dact_F * slope_F
    if up_ptr is not None:
        up_F = tl.load(up_ptr + row * up_stride + columns_F, mask=mask_F, other=0.0).to(tl.float32)
        act_F = act_F.to(act_ptr.dtype.element_ty).to(tl.float32)
        tl.store(dup_ptr + row * dup_stride + columns_F, dact_F * act_F, mask=mask_F)
        dgate_F *= up_F
        act_F *= up_F
    tl.store(dgate_ptr + row * dgate_stride + columns_F, dgate_F, mask=mask_F)
    tl.store(act_ptr + row * act_stride + columns_F, act_F, mask=mask_F)


def _walk(*tensors_TF: Tensor | None) -> tuple[int, int, list[int]]:
    """How to walk the tensors, whose last dimensions are contiguous: rows, their width, the tensors' row strides.

    Contiguous tensors are one long row: no program is partly empty, and an F that is no multiple of the
    vector width costs nothing.  A strided one (half of a packed gate_up projection) keeps its rows.
    """
    there = [x_TF for x_TF in tensors_TF if x_TF is not None]
    T, F = there[0].shape
    if all(x_TF.is_contiguous() for x_TF in there):
        return 1, T * F, [0] * len(tensors_TF)
    return T, F, [0 if x_TF is None else x_TF.stride(0) for x_TF in tensors_TF]


def gradient_places(gate_TF: Tensor, up_TF: Tensor | None, *, overwrite: bool) -> tuple[Tensor, Tensor | None]:
    """Where the gradients of gate and up go: into their places, or new tensors."""
    return place_of(gate_TF, overwrite=overwrite), None if up_TF is None else place_of(up_TF, overwrite=overwrite)


def activate(gate_TF: Tensor, up_TF: Tensor | None, kind: ActivationKind) -> Tensor:
    """`act_TF`; see `reference.activate`."""
    act_TF = torch.empty(gate_TF.shape, dtype=gate_TF.dtype, device=gate_TF.device)
    if act_TF.numel():
        gate_TF, up_TF = unit_stride(gate_TF), optional_unit_stride(up_TF)
        rows, width, strides = _walk(gate_TF, up_TF)
        blocks_per_row = triton.cdiv(width, _BLOCK_F)
        with device_guard(gate_TF):
            _forward_kernel[(rows * blocks_per_row,)](
                gate_TF, up_TF, act_TF, blocks_per_row, width, *strides,
                KIND=kind, BLOCK_F=_BLOCK_F, num_warps=_NUM_WARPS,
            )  # fmt: skip
    return act_TF


def activate_backward(
    dact_TF: Tensor,
    gate_TF: Tensor,
    up_TF: Tensor | None,
    kind: ActivationKind,
    out: tuple[Tensor, Tensor] | None = None,
    *,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`(dgate_TF, dup_TF, act_TF)`; see `reference.activate_backward`.  The rows of `out` are contiguous.

    With `overwrite` nothing is allocated: each program reads its elements before it writes any.
    """
    dact_TF, gate_TF, up_TF = inputs = unit_stride(dact_TF), unit_stride(gate_TF), optional_unit_stride(up_TF)
    dgate_TF, dup_TF = out if out is not None else gradient_places(gate_TF, up_TF, overwrite=overwrite)
    act_TF = place_of(dact_TF, overwrite=overwrite)
    if act_TF.numel():
        rows, width, strides = _walk(*inputs, dgate_TF, dup_TF, act_TF)
        blocks_per_row = triton.cdiv(width, _BLOCK_F)
        with device_guard(gate_TF):
            _backward_kernel[(rows * blocks_per_row,)](
                *inputs, dgate_TF, dup_TF, act_TF, blocks_per_row, width, *strides,
                KIND=kind, BLOCK_F=_BLOCK_F, num_warps=_NUM_WARPS,
            )  # fmt: skip
    return dgate_TF, dup_TF, act_TF
