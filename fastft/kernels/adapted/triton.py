"""Activation, rotation and residual addition with adapter terms, in Triton.

A program owns a block of columns and walks down the rows: the terms' matrices stay in registers, and the sums over all
tokens that the adapters' gradients are need no other program's help but that of the few that share its columns.
"""

# T tokens, F columns, R rank; BLOCK_* the tile of a program; low_TR·matrix_RF is a term
# H heads, d head size, h half of it, S rows of the tables

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastft.kernels.activation import ActivationKind
from fastft.kernels.activation.triton import activation_and_slope, gradient_places
from fastft.kernels.adapted import Gradients
from fastft.kernels.adapted.reference import plus_term
from fastft.kernels.dropout.triton import Masks, kept
from fastft.kernels.launch import (
    device_guard,
    next_power_of_2,
    optional_unit_stride,
    rank_block,
    unit_stride,
)
from fastft.kernels.launches import DEFAULTS, Launches, launch_for
from fastft.kernels.lora_linear import AdapterTerm
from fastft.kernels.lora_linear.triton import dot, narrow_rows, store_sum
from fastft.kernels.rope import rotary_width
from fastft.kernels.rope.triton import rope_


@triton.jit
def _matrix(
    matrix_ptr, columns_F, F, rank_stride, column_stride, RANK: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    """The columns of a term's other factor that a program owns; zeros beyond."""
    ranks_R = tl.arange(0, BLOCK_R)
    mask_RF = (ranks_R < RANK)[:, None] & (columns_F < F)[None, :]
    at_RF = matrix_ptr + ranks_R[:, None] * rank_stride + columns_F[None, :] * column_stride
    return tl.load(at_RF, mask=mask_RF, other=0.0)


@triton.jit
def _owned(F, rows_each, T, BLOCK_F: tl.constexpr):
    """The first and the last row of this program, and its columns; int64, as T·F may pass 2³¹."""
    first = tl.program_id(1).to(tl.int64) * rows_each
    columns_F = tl.program_id(0).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    return first, tl.minimum(first + rows_each, T), columns_F


@triton.jit
def _activate_kernel(
    gate_ptr, up_ptr, act_ptr, low_gate_ptr, b_gate_ptr, low_up_ptr, b_up_ptr,
    T, F, rows_each, gate_stride, up_stride, low_gate_stride, b_gate_rank_stride, b_gate_stride,
    low_up_stride, b_up_rank_stride, b_up_stride, gate_scaling, up_scaling,
    KIND: tl.constexpr, RANK_GATE: tl.constexpr, RANK_UP: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    first, last, columns_F = _owned(F, rows_each, T, BLOCK_F)
    if low_gate_ptr is not None:
        b_gate_RF = _matrix(b_gate_ptr, columns_F, F, b_gate_rank_stride, b_gate_stride, RANK_GATE, BLOCK_R)
    if low_up_ptr is not None:
        b_up_RF = _matrix(b_up_ptr, columns_F, F, b_up_rank_stride, b_up_stride, RANK_UP, BLOCK_R)
    for start in tl.range(first, last, BLOCK_T, num_stages=STAGES):
        rows_T = start + tl.arange(0, BLOCK_T).to(tl.int64)
        mask_TF = (rows_T < last)[:, None] & (columns_F < F)[None, :]
        gate_TF = tl.load(gate_ptr + rows_T[:, None] * gate_stride + columns_F[None, :], mask=mask_TF, other=0.0)
        gate_TF = gate_TF.to(tl.float32)
        if low_gate_ptr is not None:
            low_TR = narrow_rows(low_gate_ptr, rows_T, last, low_gate_stride, RANK_GATE, BLOCK_R)
            gate_TF += gate_scaling * dot(low_TR, b_gate_RF)
        act_TF, _ = activation_and_slope(gate_TF, KIND)
        if up_ptr is not None:
            up_TF = tl.load(up_ptr + rows_T[:, None] * up_stride + columns_F[None, :], mask=mask_TF, other=0.0)
            up_TF = up_TF.to(tl.float32)
            if low_up_ptr is not None:
                low_TR = narrow_rows(low_up_ptr, rows_T, last, low_up_stride, RANK_UP, BLOCK_R)
                up_TF += up_scaling * dot(low_TR, b_up_RF)
            act_TF = act_TF.to(act_ptr.dtype.element_ty).to(tl.float32) * up_TF
        tl.store(act_ptr + rows_T[:, None] * F + columns_F[None, :], act_TF, mask=mask_TF)


@triton.jit
def _activate_backward_kernel(
    dact_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, sums_ptr,
    low_gate_ptr, b_gate_ptr, low_up_ptr, b_up_ptr, dlow_ptr, a_down_ptr, bits_ptr,
    T, F, rows_each, dact_stride, gate_stride, up_stride, dgate_stride, dup_stride, sums_stride,
    low_gate_stride, b_gate_rank_stride, b_gate_stride, low_up_stride, b_up_rank_stride, b_up_stride,
    dlow_stride, a_down_rank_stride, a_down_stride, gate_scaling, up_scaling, dact_scaling, keep_scale,
    KIND: tl.constexpr, RANK_GATE: tl.constexpr, RANK_UP: tl.constexpr, RANK_DOWN: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    first, last, columns_F = _owned(F, rows_each, T, BLOCK_F)
    dtype = gate_ptr.dtype.element_ty
    if low_gate_ptr is not None:
        b_gate_RF = _matrix(b_gate_ptr, columns_F, F, b_gate_rank_stride, b_gate_stride, RANK_GATE, BLOCK_R)
    if low_up_ptr is not None:
        b_up_RF = _matrix(b_up_ptr, columns_F, F, b_up_rank_stride, b_up_stride, RANK_UP, BLOCK_R)
    if dlow_ptr is not None:
        a_down_RF = _matrix(a_down_ptr, columns_F, F, a_down_rank_stride, a_down_stride, RANK_DOWN, BLOCK_R)
    db_gate_FR = tl.zeros((BLOCK_F, BLOCK_R), tl.float32)
    db_up_FR = tl.zeros((BLOCK_F, BLOCK_R), tl.float32)
    da_down_FR = tl.zeros((BLOCK_F, BLOCK_R), tl.float32)
    for start in tl.range(first, last, BLOCK_T, num_stages=STAGES):
        rows_T = start + tl.arange(0, BLOCK_T).to(tl.int64)
        mask_TF = (rows_T < last)[:, None] & (columns_F < F)[None, :]
        dact_TF = tl.load(dact_ptr + rows_T[:, None] * dact_stride + columns_F[None, :], mask=mask_TF, other=0.0)
        gate_TF = tl.load(gate_ptr + rows_T[:, None] * gate_stride + columns_F[None, :], mask=mask_TF, other=0.0)
        dact_TF, gate_TF = dact_TF.to(tl.float32), gate_TF.to(tl.float32)
        if dlow_ptr is not None:
            dlow_TR = narrow_rows(dlow_ptr, rows_T, last, dlow_stride, RANK_DOWN, BLOCK_R)
            # The factor is 1.  Without it the compiler makes dact the product's own sum, and its load then waits.
            term_TF = dact_scaling * dot(dlow_TR, a_down_RF)
            if bits_ptr is not None:
                bits_TF = tl.load(bits_ptr + rows_T[:, None] * F + columns_F[None, :], mask=mask_TF, other=0)
                term_TF = kept(keep_scale * term_TF, bits_TF, 0)
            dact_TF += term_TF
        if low_gate_ptr is not None:
            low_gate_TR = narrow_rows(low_gate_ptr, rows_T, last, low_gate_stride, RANK_GATE, BLOCK_R)
            gate_TF += gate_scaling * dot(low_gate_TR, b_gate_RF)
        act_TF, slope_TF = activation_and_slope(gate_TF, KIND)
        dgate_TF = dact_TF * slope_TF
        if up_ptr is not None:
            up_TF = tl.load(up_ptr + rows_T[:, None] * up_stride + columns_F[None, :], mask=mask_TF, other=0.0)
            up_TF = up_TF.to(tl.float32)
            act_TF = act_TF.to(dtype).to(tl.float32)
            dup_TF = (dact_TF * act_TF).to(dtype)
            tl.store(dup_ptr + rows_T[:, None] * dup_stride + columns_F[None, :], dup_TF, mask=mask_TF)
            if low_up_ptr is not None:
                low_up_TR = narrow_rows(low_up_ptr, rows_T, last, low_up_stride, RANK_UP, BLOCK_R)
                up_TF += up_scaling * dot(low_up_TR, b_up_RF)
                db_up_FR += dot(tl.trans(dup_TF), low_up_TR)
            dgate_TF *= up_TF
            act_TF *= up_TF
        dgate_TF = dgate_TF.to(dtype)
        tl.store(dgate_ptr + rows_T[:, None] * dgate_stride + columns_F[None, :], dgate_TF, mask=mask_TF)
        if low_gate_ptr is not None:
            db_gate_FR += dot(tl.trans(dgate_TF), low_gate_TR)
        if dlow_ptr is not None:
            if bits_ptr is not None:
                act_TF = kept(act_TF, bits_TF, 0)
            da_down_FR += dot(tl.trans(act_TF.to(dtype)), dlow_TR)
    sums_ptr += tl.program_id(1).to(tl.int64) * sums_stride
    if low_gate_ptr is not None:
        store_sum(sums_ptr, gate_scaling * db_gate_FR, columns_F, F, RANK_GATE, 1, RANK_GATE, BLOCK_R)
    if low_up_ptr is not None:
        store_sum(sums_ptr + F * RANK_GATE, up_scaling * db_up_FR, columns_F, F, RANK_UP, 1, RANK_UP, BLOCK_R)
    if dlow_ptr is not None:
        if bits_ptr is not None:
            da_down_FR *= keep_scale
        store_sum(sums_ptr + F * (RANK_GATE + RANK_UP), da_down_FR, columns_F, F, 1, F, RANK_DOWN, BLOCK_R)


@triton.jit
def _add_kernel(
    x_ptr, residual_ptr, out_ptr, low_ptr, matrix_ptr,
    T, F, rows_each, x_stride, residual_stride, low_stride, matrix_rank_stride, matrix_stride, scaling, multiplier,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    first, last, columns_F = _owned(F, rows_each, T, BLOCK_F)
    matrix_RF = _matrix(matrix_ptr, columns_F, F, matrix_rank_stride, matrix_stride, RANK, BLOCK_R)
    for start in tl.range(first, last, BLOCK_T, num_stages=STAGES):
        rows_T = start + tl.arange(0, BLOCK_T).to(tl.int64)
        mask_TF = (rows_T < last)[:, None] & (columns_F < F)[None, :]
        x_TF = tl.load(x_ptr + rows_T[:, None] * x_stride + columns_F[None, :], mask=mask_TF, other=0.0)
        residual_at_TF = residual_ptr + rows_T[:, None] * residual_stride + columns_F[None, :]
        residual_TF = tl.load(residual_at_TF, mask=mask_TF, other=0.0).to(tl.float32)
        low_TR = narrow_rows(low_ptr, rows_T, last, low_stride, RANK, BLOCK_R)
        term_TF = scaling * dot(low_TR, matrix_RF)
        out_TF = residual_TF + multiplier * (x_TF.to(tl.float32) + term_TF)
        tl.store(out_ptr + rows_T[:, None] * F + columns_F[None, :], out_TF, mask=mask_TF)


@triton.jit
def _rotate_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, low_q_ptr, b_q_ptr, low_k_ptr, b_k_ptr,
    T, S, q_heads, rows_each, q_stride, k_stride, cos_stride, sin_stride,
    low_q_stride, b_q_rank_stride, b_q_stride, low_k_stride, b_k_rank_stride, b_k_stride, q_scaling, k_scaling,
    INVERSE: tl.constexpr, HALF: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    x_ptr, x_stride = q_ptr, q_stride
    low_ptr, low_stride, scaling = low_q_ptr, low_q_stride, q_scaling
    b_ptr, rank_stride, column_stride = b_q_ptr, b_q_rank_stride, b_q_stride
    if head >= q_heads:
        x_ptr, x_stride = k_ptr, k_stride
        if RANK > 0:
            low_ptr, low_stride, scaling = low_k_ptr, low_k_stride, k_scaling
            b_ptr, rank_stride, column_stride = b_k_ptr, b_k_rank_stride, b_k_stride
        head -= q_heads
    first = tl.program_id(1).to(tl.int64) * rows_each
    last = tl.minimum(first + rows_each, T)
    lanes_h = tl.arange(0, HALF)
    columns_h = head * 2 * HALF + lanes_h
    end = (head + 1) * 2 * HALF
    if RANK > 0:
        b_first_Rh = _matrix(b_ptr, columns_h, end, rank_stride, column_stride, RANK, BLOCK_R)
        b_second_Rh = _matrix(b_ptr, columns_h + HALF, end, rank_stride, column_stride, RANK, BLOCK_R)
    for start in tl.range(first, last, BLOCK_T, num_stages=STAGES):
        rows_T = start + tl.arange(0, BLOCK_T).to(tl.int64)
        mask_Th = (rows_T < last)[:, None] & (lanes_h < HALF)[None, :]
        at_Th = x_ptr + rows_T[:, None] * x_stride + columns_h[None, :]
        first_Th = tl.load(at_Th, mask=mask_Th, other=0.0).to(tl.float32)
        second_Th = tl.load(at_Th + HALF, mask=mask_Th, other=0.0).to(tl.float32)
        angles_T = rows_T % S
        cos_Th = tl.load(cos_ptr + angles_T[:, None] * cos_stride + lanes_h[None, :], mask=mask_Th, other=0.0)
        sin_Th = tl.load(sin_ptr + angles_T[:, None] * sin_stride + lanes_h[None, :], mask=mask_Th, other=0.0)
        cos_Th, sin_Th = cos_Th.to(tl.float32), sin_Th.to(tl.float32)
        if INVERSE:
            sin_Th = -sin_Th
        if RANK > 0:
            low_TR = narrow_rows(low_ptr, rows_T, last, low_stride, RANK, BLOCK_R)
            first_Th += scaling * dot(low_TR, b_first_Rh)
            second_Th += scaling * dot(low_TR, b_second_Rh)
        tl.store(at_Th, first_Th * cos_Th - second_Th * sin_Th, mask=mask_Th)
        tl.store(at_Th + HALF, second_Th * cos_Th + first_Th * sin_Th, mask=mask_Th)


def activate(
    gate_TF: Tensor,
    up_TF: Tensor | None,
    kind: ActivationKind,
    gate_term: AdapterTerm | None = None,
    up_term: AdapterTerm | None = None,
    *,
    launches: Launches = DEFAULTS,
) -> Tensor:
    """`act_TF`; see `reference.activate`.  Sums are fp32; ranks at most `launches.MAX_RANK`."""
    T, F = gate_TF.shape
    gate_TF, up_TF = unit_stride(gate_TF), optional_unit_stride(up_TF)
    act_TF = torch.empty((T, F), dtype=gate_TF.dtype, device=gate_TF.device)
    if act_TF.numel():
        gate, up = _arguments(gate_term), _arguments(up_term)
        block_r = rank_block(gate.rank, up.rank)
        launch = launch_for("activate", (1 if up_TF is None else 2, F, block_r), gate_TF.element_size(), T, launches)
        grid, rows_each = launch.grid(T, F)
        with device_guard(gate_TF):
            _activate_kernel[grid](
                gate_TF, up_TF, act_TF, *gate.pointers, *up.pointers,
                T, F, rows_each, gate_TF.stride(0), 0 if up_TF is None else up_TF.stride(0),
                *gate.strides, *up.strides, gate.scaling, up.scaling,
                KIND=kind, RANK_GATE=gate.rank, RANK_UP=up.rank, BLOCK_R=block_r,
                BLOCK_T=launch.block_t, BLOCK_F=launch.block_f, num_warps=launch.warps, STAGES=launch.stages,
            )  # fmt: skip
    return act_TF


def activate_backward(
    dact_TF: Tensor,
    gate_TF: Tensor,
    up_TF: Tensor | None,
    kind: ActivationKind,
    gate_term: AdapterTerm | None = None,
    up_term: AdapterTerm | None = None,
    dact_term: AdapterTerm | None = None,
    out: tuple[Tensor, Tensor] | None = None,
    *,
    overwrite: bool = False,
    dtype: torch.dtype = torch.float32,
    masks: Masks | None = None,
    launches: Launches = DEFAULTS,
) -> Gradients:
    """See `reference.activate_backward`; sums and ranks as in `activate`.  The rows of `out` are contiguous."""
    T, F = gate_TF.shape
    dact_TF, gate_TF, up_TF = inputs = unit_stride(dact_TF), unit_stride(gate_TF), optional_unit_stride(up_TF)
    dgate_TF, dup_TF = out if out is not None else gradient_places(gate_TF, up_TF, overwrite=overwrite)
    gate, up, down = _arguments(gate_term), _arguments(up_term), _arguments(dact_term)
    sizes = [F * each.rank for each in (gate, up, down)]
    block_r = rank_block(gate.rank, up.rank, down.rank)
    inputs_of_act = 1 if up_TF is None else 2
    launch = launch_for("activate_backward", (inputs_of_act, F, block_r), gate_TF.element_size(), T, launches)
    grid, rows_each = launch.grid(T, F)
    sums_SN = torch.empty((grid[1], sum(sizes)), dtype=torch.float32, device=gate_TF.device)
    bits = None if masks is None else masks.bits_TK
    if gate_TF.numel():
        strides = [0 if x_TF is None else x_TF.stride(0) for x_TF in (*inputs, dgate_TF, dup_TF)]
        with device_guard(gate_TF):
            _activate_backward_kernel[grid](
                *inputs, dgate_TF, dup_TF, sums_SN, *gate.pointers, *up.pointers, *down.pointers, bits,
                T, F, rows_each, *strides, sums_SN.stride(0), *gate.strides, *up.strides, *down.strides,
                gate.scaling, up.scaling, down.scaling,
                1.0 if masks is None else masks.scales[0],
                KIND=kind, RANK_GATE=gate.rank, RANK_UP=up.rank, RANK_DOWN=down.rank,
                BLOCK_R=block_r,
                BLOCK_T=launch.block_t, BLOCK_F=launch.block_f, num_warps=launch.warps, STAGES=launch.stages,
            )  # fmt: skip
    else:
        sums_SN.zero_()
    # All at once: three small tensors' launches cost more than their work.
    sums = (sums_SN[0] if len(sums_SN) == 1 else sums_SN.sum(dim=0)).to(dtype).split(sizes)
    return Gradients(
        dgate_TF,
        dup_TF,
        sums[0].view(F, gate.rank) if gate_term is not None else None,
        sums[1].view(F, up.rank) if up_term is not None else None,
        sums[2].view(down.rank, F) if dact_term is not None else None,
    )


def add(
    x_TF: Tensor, residual_TF: Tensor, term: AdapterTerm, multiplier: float = 1.0, *, launches: Launches = DEFAULTS
) -> Tensor:
    """See `reference.add`; the sum is rounded once."""
    T, F = x_TF.shape
    x_TF, residual_TF = x_TF.contiguous(), unit_stride(residual_TF)
    out_TF = x_TF if x_TF.dtype == residual_TF.dtype else torch.empty_like(x_TF, dtype=residual_TF.dtype)
    if x_TF.numel():
        arguments = _arguments(term)
        block_r = rank_block(arguments.rank)
        launch = launch_for("add", (F, block_r), x_TF.element_size(), T, launches)
        grid, rows_each = launch.grid(T, F)
        with device_guard(x_TF):
            _add_kernel[grid](
                x_TF, residual_TF, out_TF, *arguments.pointers,
                T, F, rows_each, x_TF.stride(0), residual_TF.stride(0), *arguments.strides, term.scaling, multiplier,
                RANK=arguments.rank, BLOCK_R=block_r,
                BLOCK_T=launch.block_t, BLOCK_F=launch.block_f, num_warps=launch.warps, STAGES=launch.stages,
            )  # fmt: skip
    return out_TF


def rotate_(
    q_THd: Tensor,
    k_THd: Tensor,
    cos_Sr: Tensor,
    sin_Sr: Tensor,
    q_term: AdapterTerm | None = None,
    k_term: AdapterTerm | None = None,
    *,
    inverse: bool = False,
    launches: Launches = DEFAULTS,
) -> None:
    """See `reference.rotate_`; sums and ranks as in `activate`, rounded once.

    One launch, where r is a power of two and d, and q and k have terms of one rank or none; else as many as it takes.
    """
    half, d = rotary_width(q_THd, cos_Sr, sin_Sr) // 2, q_THd.shape[-1]
    rank = 0 if q_term is None else q_term.matrix_RO.shape[0]
    alike = (q_term is None) == (k_term is None) and (k_term is None or k_term.matrix_RO.shape[0] == rank)
    side_by_side = all(x_THd.stride()[1:] == (d, 1) for x_THd in (q_THd, k_THd))
    if not (alike and side_by_side and k_THd.shape[-1] == d == 2 * half == next_power_of_2(d)):
        for x_THd, term in ((q_THd, q_term), (k_THd, k_term)):
            if term is not None:
                x_THd.copy_(plus_term(x_THd.flatten(1), term).view(x_THd.shape))
            rope_(x_THd, cos_Sr, sin_Sr, inverse=inverse)
        return
    T, H, _ = q_THd.shape
    if T:
        cos_Sr, sin_Sr = unit_stride(cos_Sr), unit_stride(sin_Sr)
        q, k = _arguments(q_term), _arguments(k_term)
        k_heads, block_r = k_THd.shape[1], rank_block(rank)
        sizes = (H, k_heads, d, block_r if rank else 0)
        launch = launch_for("rotate", sizes, q_THd.element_size(), T, launches)
        grid, rows_each = launch.shared(T, H + k_heads)
        with device_guard(q_THd):
            _rotate_kernel[grid](
                q_THd, k_THd, cos_Sr, sin_Sr, *q.pointers, *k.pointers,
                T, len(cos_Sr), H, rows_each, q_THd.stride(0), k_THd.stride(0), cos_Sr.stride(0), sin_Sr.stride(0),
                *q.strides, *k.strides, q.scaling, k.scaling,
                INVERSE=inverse, HALF=half, RANK=rank, BLOCK_R=block_r,
                BLOCK_T=launch.block_t, num_warps=launch.warps, STAGES=launch.stages,
            )  # fmt: skip


class _Arguments(NamedTuple):
    """A term as the kernels take it."""

    pointers: tuple[Tensor | None, Tensor | None]
    strides: tuple[int, int, int]
    rank: int
    scaling: float


def _arguments(term: AdapterTerm | None) -> _Arguments:
    if term is None:
        return _Arguments((None, None), (0, 0, 0), 0, 1.0)
    low_TR, matrix_RO = unit_stride(term.low_TR), term.matrix_RO
    strides = low_TR.stride(0), matrix_RO.stride(0), matrix_RO.stride(1)
    return _Arguments((low_TR, matrix_RO), strides, matrix_RO.shape[0], term.scaling)
