"""The narrow gradients of LoRA linears, in Triton.

dlow = scaling · dy·B and dB = scaling · dyᵀ·low both read dy, which is wide, and write next to nothing.  A program owns
a block of dy's columns, of any layer of the group, and walks down a share of its rows: of what it has read it makes its
part of dlow, and adds to its part of dB, which stays in registers.  A second kernel adds the parts in a fixed order, so
that the gradients are the same in every run.
"""

# T tokens, O out, R rank; C blocks of columns of all layers, S shares of the rows, N elements; BLOCK_* what a program
# holds at once

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastft.kernels.launch import device_guard, optional_unit_stride, rank_block, unit_stride
from fastft.kernels.launches import DEFAULTS, MAX_RANK, Launches, launch_for
from fastft.kernels.lora_linear import reference
from fastft.kernels.lora_linear.reference import Linear

_MAX_LAYERS = 3
_DTYPES = {torch.bfloat16, torch.float16, torch.float32}

_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(x, y):
    """x·y with sums in fp32."""
    if _INTERPRETED:
        # The interpreter multiplies bf16 as if its bits were integers.
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, input_precision="ieee")


@triton.jit
def narrow_rows(x_ptr, rows_T, T, stride, rank, BLOCK_R: tl.constexpr):
    """A block of rows of a narrow matrix; zeros beyond its rows and its rank."""
    ranks_R = tl.arange(0, BLOCK_R)
    mask_TR = (rows_T < T)[:, None] & (ranks_R < rank)[None, :]
    return tl.load(x_ptr + rows_T[:, None] * stride + ranks_R[None, :], mask=mask_TR, other=0.0)


@triton.jit
def store_sum(sums_ptr, sum_FR, columns_F, F, column_stride, rank_stride, rank, BLOCK_R: tl.constexpr):
    """Write what a program has summed for its columns."""
    ranks_R = tl.arange(0, BLOCK_R)
    at_FR = sums_ptr + columns_F[:, None] * column_stride + ranks_R[None, :] * rank_stride
    tl.store(at_FR, sum_FR, mask=(columns_F < F)[:, None] & (ranks_R < rank)[None, :])


@triton.jit
def _of(layer, x_0, x_1, x_2):
    return tl.where(layer == 0, x_0, tl.where(layer == 1, x_1, x_2))


@triton.jit
def _parts_kernel(
    dy_0_ptr, dy_1_ptr, dy_2_ptr, b_0_ptr, b_1_ptr, b_2_ptr, low_ptr, dlow_parts_ptr, db_parts_ptr,
    T, rows_each, dy_0_stride, dy_1_stride, dy_2_stride, low_stride, O_0, O_1, O_2, scaling_0, scaling_1, scaling_2,
    RANK_0: tl.constexpr, RANK_1: tl.constexpr, RANK_2: tl.constexpr, WIDTH: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    block, share = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    start_1 = tl.cdiv(O_0, BLOCK_O)
    start_2 = start_1 + tl.cdiv(O_1, BLOCK_O)
    layer = (block >= start_1).to(tl.int32) + (block >= start_2).to(tl.int32)
    dy_ptr, dy_stride = _of(layer, dy_0_ptr, dy_1_ptr, dy_2_ptr), _of(layer, dy_0_stride, dy_1_stride, dy_2_stride)
    width, rank = _of(layer, O_0, O_1, O_2), _of(layer, RANK_0, RANK_1, RANK_2)
    scaling = _of(layer, scaling_0, scaling_1, scaling_2)
    dtype = dy_ptr.dtype.element_ty
    columns_O = (block - _of(layer, 0, start_1, start_2)) * BLOCK_O + tl.arange(0, BLOCK_O)
    ranks_R = tl.arange(0, BLOCK_R)
    b_OR = narrow_rows(_of(layer, b_0_ptr, b_1_ptr, b_2_ptr), columns_O, width, rank, rank, BLOCK_R).to(dtype)
    db_OR = tl.zeros((BLOCK_O, BLOCK_R), tl.float32)
    dlow_parts_ptr += block * T * WIDTH
    first = share * rows_each
    last = tl.minimum(first + rows_each, T)
    for start in tl.range(first, last, BLOCK_T, num_stages=STAGES):
        rows_T = start + tl.arange(0, BLOCK_T).to(tl.int64)
        mask_TO = (rows_T < last)[:, None] & (columns_O < width)[None, :]
        dy_TO = tl.load(dy_ptr + rows_T[:, None] * dy_stride + columns_O[None, :], mask=mask_TO, other=0.0)
        mask_TR = (rows_T < last)[:, None] & (ranks_R < rank)[None, :]
        dlow_at_TR = dlow_parts_ptr + rows_T[:, None] * WIDTH + ranks_R[None, :]
        tl.store(dlow_at_TR, scaling * dot(dy_TO, b_OR), mask=mask_TR)
        if low_ptr is not None:
            before = _of(layer, 0, RANK_0, RANK_0 + RANK_1)
            db_OR += dot(tl.trans(dy_TO), narrow_rows(low_ptr + before, rows_T, last, low_stride, rank, BLOCK_R))
    if low_ptr is not None:
        db_parts_ptr += share * (O_0 * RANK_0 + O_1 * RANK_1 + O_2 * RANK_2)
        db_parts_ptr += _of(layer, 0, O_0 * RANK_0, O_0 * RANK_0 + O_1 * RANK_1)
        store_sum(db_parts_ptr, scaling * db_OR, columns_O, width, rank, 1, rank, BLOCK_R)


@triton.jit
def _sum_of_parts(parts_at_N, stride, count_N, most, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """The sum of the first `count_N` of at `most` so many parts, each `stride` elements behind the other."""
    sum_N = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, most, BLOCK_P):
        parts_P = first + tl.arange(0, BLOCK_P).to(tl.int64)
        at_PN = parts_at_N[None, :] + parts_P[:, None] * stride
        sum_N += tl.sum(tl.load(at_PN, mask=parts_P[:, None] < count_N[None, :], other=0.0), axis=0)
    return sum_N


@triton.jit
def _sum_kernel(
    dlow_parts_ptr, db_parts_ptr, dlow_ptr, db_ptr, T, dlow_N, db_N, shares, blocks_0, blocks_1, blocks_2,
    RANK_0: tl.constexpr, RANK_1: tl.constexpr, RANK_2: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    for_dlow = tl.cdiv(dlow_N, BLOCK_N)
    if program < for_dlow:
        at_N = program * BLOCK_N + tl.arange(0, BLOCK_N)
        row_N, column_N = at_N // (RANK_0 + RANK_1 + RANK_2), at_N % (RANK_0 + RANK_1 + RANK_2)
        layer_N = (column_N >= RANK_0).to(tl.int32) + (column_N >= RANK_0 + RANK_1).to(tl.int32)
        rank_N = column_N - _of(layer_N, 0, RANK_0, RANK_0 + RANK_1)
        start_N = _of(layer_N, 0, blocks_0, blocks_0 + blocks_1).to(tl.int64)
        count_N = tl.where(at_N < dlow_N, _of(layer_N, blocks_0, blocks_1, blocks_2), 0)
        most = tl.maximum(blocks_0, tl.maximum(blocks_1, blocks_2))
        parts_at_N = dlow_parts_ptr + start_N * T * WIDTH + row_N * WIDTH + rank_N
        sum_N = _sum_of_parts(parts_at_N, T * WIDTH, count_N, most, BLOCK_P, BLOCK_N)
        tl.store(dlow_ptr + at_N, sum_N, mask=at_N < dlow_N)
    else:
        at_N = (program - for_dlow) * BLOCK_N + tl.arange(0, BLOCK_N)
        count_N = tl.where(at_N < db_N, shares, 0)
        sum_N = _sum_of_parts(db_parts_ptr + at_N, db_N, count_N, shares, BLOCK_P, BLOCK_N)
        tl.store(db_ptr + at_N, sum_N, mask=at_N < db_N)


_SUM_PARTS, _SUM_ELEMENTS, _SUM_WARPS = 16, 256, 2


def narrow_gradients(
    dy: Sequence[Tensor], low_TR: Tensor | None, group: Sequence[Linear], *, launches: Launches = DEFAULTS
) -> tuple[Tensor | None, list[Tensor | None]]:
    """See `reference.narrow_gradients`.  Sums are fp32 and rounded once.

    Two launches for up to three adapters of ranks up to 64; the reference for others, and where dy is empty.
    """
    adapted = [(d, layer.b, layer.scaling) for d, layer in zip(dy, group, strict=True) if layer.b is not None]
    if not _can_run([(d, b) for d, b, _ in adapted]):
        return reference.narrow_gradients(dy, low_TR, group)
    layers, low_TR = _layers(adapted), optional_unit_stride(low_TR)
    with device_guard(layers.dy[0]):
        dlow_TR, db_N = _add(layers, _make_parts(layers, low_TR, launches))
    if low_TR is None:
        return dlow_TR, [None] * len(group)
    db = iter(db_N.split(layers.sizes))
    return dlow_TR, [None if layer.b is None else next(db).view(layer.b.shape) for layer in group]


def _can_run(adapted: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Whether the kernels take these dy and B."""
    dtypes = {d.dtype for d, _ in adapted}, {b.dtype for _, b in adapted}
    alike = all(len(kinds) == 1 and kinds <= _DTYPES for kinds in dtypes)
    fit = all(d.numel() > 0 and b.shape[1] <= MAX_RANK for d, b in adapted)
    return alike and fit and len(adapted) <= _MAX_LAYERS


class _Layers(NamedTuple):
    """The adapted layers as the kernels take them: three, of which those that are not there have no columns."""

    dy: list[Tensor]
    b: list[Tensor]
    widths: list[int]
    ranks: list[int]
    scalings: list[float]

    @property
    def sizes(self) -> list[int]:
        """Elements of each layer's B."""
        return [width * rank for width, rank in zip(self.widths, self.ranks, strict=True)]

    @property
    def constants(self) -> dict[str, int]:
        """What both kernels are compiled for."""
        return {**{f"RANK_{index}": rank for index, rank in enumerate(self.ranks)}, "WIDTH": max(self.ranks)}


def _layers(adapted: Sequence[tuple[Tensor, Tensor, float]]) -> _Layers:
    missing = _MAX_LAYERS - len(adapted)
    dy, b = [unit_stride(d) for d, _, _ in adapted], [b.contiguous() for _, b, _ in adapted]
    # Nobody reads what stands for the tensors of a layer without columns.
    return _Layers(
        dy + dy[:1] * missing,
        b + b[:1] * missing,
        [matrix.shape[0] for matrix in b] + [0] * missing,
        [matrix.shape[1] for matrix in b] + [0] * missing,
        [scaling for _, _, scaling in adapted] + [0.0] * missing,
    )


class _Parts(NamedTuple):
    """What `_parts_kernel` makes."""

    dlow_CTR: Tensor
    db_SN: Tensor
    """N is 0 where nobody asks for dB."""
    blocks: list[int]
    """Of each layer, of C."""


def _make_parts(layers: _Layers, low_TR: Tensor | None, launches: Launches) -> _Parts:
    T, device = len(layers.dy[0]), layers.dy[0].device
    block_r = rank_block(*layers.ranks)
    sizes = (*layers.widths, block_r)
    launch = launch_for("narrow_gradients", sizes, layers.dy[0].element_size(), T, launches)
    blocks = [-(-width // launch.block_f) for width in layers.widths]
    grid, rows_each = launch.shared(T, sum(blocks))
    dlow_CTR = torch.empty((grid[0], T, max(layers.ranks)), dtype=torch.float32, device=device)
    db_SN = torch.empty((grid[1], 0 if low_TR is None else sum(layers.sizes)), dtype=torch.float32, device=device)
    _parts_kernel[grid](
        *layers.dy, *layers.b, low_TR, dlow_CTR, db_SN,
        T, rows_each, *(d.stride(0) for d in layers.dy), 0 if low_TR is None else low_TR.stride(0),
        *layers.widths, *layers.scalings,
        **layers.constants, BLOCK_R=block_r, BLOCK_T=launch.block_t, BLOCK_O=launch.block_f,
        STAGES=launch.stages, num_warps=launch.warps,
    )  # fmt: skip
    return _Parts(dlow_CTR, db_SN, blocks)


def _add(layers: _Layers, parts: _Parts) -> tuple[Tensor, Tensor]:
    """dlow (T × ΣR), and dB of all layers one after the other."""
    (_, T, _), (shares, elements), device = parts.dlow_CTR.shape, parts.db_SN.shape, parts.db_SN.device
    dlow_TR = torch.empty((T, sum(layers.ranks)), dtype=layers.dy[0].dtype, device=device)
    db_N = torch.empty(elements, dtype=layers.b[0].dtype, device=device)
    programs = sum(-(-x.numel() // _SUM_ELEMENTS) for x in (dlow_TR, db_N))
    _sum_kernel[(programs,)](
        parts.dlow_CTR, parts.db_SN, dlow_TR, db_N, T, dlow_TR.numel(), elements, shares, *parts.blocks,
        **layers.constants, BLOCK_P=_SUM_PARTS, BLOCK_N=_SUM_ELEMENTS, num_warps=_SUM_WARPS,
    )  # fmt: skip
    return dlow_TR, db_N
