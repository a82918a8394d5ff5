"""LoRA's dropout in Triton: masks as bits, and products that read an input once for all adapters of a group.

Same names and signatures as `reference.py`, but for what masks are.

A mask's bit is u < p, negated, for a number u of 16 random bits.  32 of them are made at once, a random word for each
place of u and p, from the lowest place up: where p has a one, u is below it as soon as u has a zero there.  Random
words are Philox 4×32 of seven rounds, the fewest that pass all of TestU01 ("Parallel Random Numbers: As Easy as 1, 2,
3", https://doi.org/10.1145/2063384.2063405).  The eight lower places, which decide one element in 256, are those of
four words: the probability of each element stays p, and two of the four depend on each other in one pair of 65,536.
"""

# T tokens, K columns of the input, R rank, G adapters, S shares of the rows, W words of a row, N words of a launch;
# BLOCK_* what a program holds at once

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastft.kernels.launch import device_guard, rank_block, unit_stride
from fastft.kernels.launches import MAX_RANK
from fastft.kernels.lora_linear.triton import dot, narrow_rows

_PLACES = 16
_TOGETHER = tl.constexpr(4)
"""Words that share their lower places."""
_ROUNDS = tl.constexpr(7)
_BLOCK_N, _WORDS_WARPS = 512, 4


class Masks(NamedTuple):
    """Bits of a group's adapters: 1 where an element is kept."""

    words_GTW: Tensor
    """int32; element i of a row is bit i % 32 of word i // 32."""
    scales: list[float]
    """1 / (1 − p) of each adapter."""


@triton.jit
def _below(is_below, words_0, words_1, words_2, words_3, P: tl.constexpr, PLACE: tl.constexpr):
    """Whether u is below p, up to four places further than `is_below` says; PLACE is the lowest of them."""
    is_below = (is_below | words_0) if (P >> PLACE) & 1 else (is_below & words_0)
    is_below = (is_below | words_1) if (P >> (PLACE + 1)) & 1 else (is_below & words_1)
    is_below = (is_below | words_2) if (P >> (PLACE + 2)) & 1 else (is_below & words_2)
    return (is_below | words_3) if (P >> (PLACE + 3)) & 1 else (is_below & words_3)


@triton.jit
def _words_kernel(words_ptr, seed, N, P: tl.constexpr, BLOCK_N: tl.constexpr):
    program = tl.program_id(0)
    lanes_N = tl.arange(0, BLOCK_N)
    counter_N = program * BLOCK_N + lanes_N
    none_N = tl.zeros((BLOCK_N,), tl.int32).to(tl.uint32, bitcast=True)
    counter_N = counter_N.to(tl.uint32)
    lower_N = none_N
    for call in tl.static_range(2):
        w_0, w_1, w_2, w_3 = tl.philox(seed, counter_N, none_N + call, none_N, none_N, n_rounds=_ROUNDS)
        lower_N = _below(lower_N, w_0, w_1, w_2, w_3, P, 4 * call)
    for word in tl.static_range(_TOGETHER):
        below_N = lower_N
        for call in tl.static_range(2):
            w_0, w_1, w_2, w_3 = tl.philox(
                seed, counter_N, none_N + (2 + 2 * word + call), none_N, none_N, n_rounds=_ROUNDS
            )
            below_N = _below(below_N, w_0, w_1, w_2, w_3, P, 8 + 4 * call)
        at_N = (program.to(tl.int64) * _TOGETHER + word) * BLOCK_N + lanes_N
        tl.store(words_ptr + at_N, (~below_N).to(tl.int32, bitcast=True), mask=at_N < N)


@triton.jit
def kept(words_ptr, rows_T, columns_K, words_stride, mask_TK):
    """Whether these elements are kept."""
    words_TK = tl.load(words_ptr + rows_T[:, None] * words_stride + (columns_K >> 5)[None, :], mask=mask_TK, other=0)
    return ((words_TK >> (columns_K & 31).to(tl.int32)[None, :]) & 1) != 0


@triton.jit
def _add_low(
    low_TR, x_TK, a_ptr, words_ptr, rows_T, columns_K, words_stride, mask_TK, K,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Plus (mask ∘ x)·Aᵀ of these columns."""
    ranks_R = tl.arange(0, BLOCK_R)
    mask_KR = (columns_K < K)[:, None] & (ranks_R < RANK)[None, :]
    a_KR = tl.load(a_ptr + ranks_R[None, :] * K + columns_K[:, None], mask=mask_KR, other=0.0)
    kept_TK = kept(words_ptr, rows_T, columns_K, words_stride, mask_TK)
    return low_TR + dot(tl.where(kept_TK, x_TK, 0.0).to(x_TK.dtype), a_KR)


@triton.jit
def _low_rank_kernel(
    x_ptr, a_ptr, words_ptr, low_ptr, T, K, x_stride, low_stride, words_stride, plane, scale_0, scale_1, scale_2,
    RANK_0: tl.constexpr, RANK_1: tl.constexpr, RANK_2: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    rows_T = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    low_0_TR = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    low_1_TR = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    low_2_TR = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        columns_K = start + tl.arange(0, BLOCK_K)
        mask_TK = (rows_T < T)[:, None] & (columns_K < K)[None, :]
        x_TK = tl.load(x_ptr + rows_T[:, None] * x_stride + columns_K[None, :], mask=mask_TK, other=0.0)
        low_0_TR = _add_low(
            low_0_TR, x_TK, a_ptr, words_ptr, rows_T, columns_K, words_stride, mask_TK, K, RANK_0, BLOCK_R
        )
        if RANK_1 > 0:
            low_1_TR = _add_low(
                low_1_TR, x_TK, a_ptr + RANK_0 * K, words_ptr + plane, rows_T, columns_K, words_stride, mask_TK, K,
                RANK_1, BLOCK_R,
            )  # fmt: skip
        if RANK_2 > 0:
            low_2_TR = _add_low(
                low_2_TR, x_TK, a_ptr + (RANK_0 + RANK_1) * K, words_ptr + 2 * plane, rows_T, columns_K, words_stride,
                mask_TK, K, RANK_2, BLOCK_R,
            )  # fmt: skip
    ranks_R = tl.arange(0, BLOCK_R)
    at_TR = low_ptr + rows_T[:, None] * low_stride + ranks_R[None, :]
    there_T = (rows_T < T)[:, None]
    tl.store(at_TR, scale_0 * low_0_TR, mask=there_T & (ranks_R < RANK_0)[None, :])
    if RANK_1 > 0:
        tl.store(at_TR + RANK_0, scale_1 * low_1_TR, mask=there_T & (ranks_R < RANK_1)[None, :])
    if RANK_2 > 0:
        tl.store(at_TR + RANK_0 + RANK_1, scale_2 * low_2_TR, mask=there_T & (ranks_R < RANK_2)[None, :])


@triton.jit
def _add_da(
    da_KR, x_TK, dlow_ptr, words_ptr, rows_T, columns_K, dlow_stride, words_stride, mask_TK, last,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Plus (mask ∘ x)ᵀ·dlow of these rows."""
    dlow_TR = narrow_rows(dlow_ptr, rows_T, last, dlow_stride, RANK, BLOCK_R)
    kept_TK = kept(words_ptr, rows_T, columns_K, words_stride, mask_TK)
    return da_KR + dot(tl.trans(tl.where(kept_TK, x_TK, 0.0).to(x_TK.dtype)), dlow_TR)


@triton.jit
def _store_da(da_ptr, da_KR, columns_K, K, RANK: tl.constexpr, BLOCK_R: tl.constexpr):
    ranks_R = tl.arange(0, BLOCK_R)
    mask_KR = (columns_K < K)[:, None] & (ranks_R < RANK)[None, :]
    tl.store(da_ptr + ranks_R[None, :] * K + columns_K[:, None], da_KR, mask=mask_KR)


@triton.jit
def _a_gradients_kernel(
    x_ptr, dlow_ptr, words_ptr, parts_ptr, T, K, rows_each, x_stride, dlow_stride, words_stride, plane,
    scale_0, scale_1, scale_2,
    RANK_0: tl.constexpr, RANK_1: tl.constexpr, RANK_2: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    columns_K = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    first = tl.program_id(1).to(tl.int64) * rows_each
    last = tl.minimum(first + rows_each, T)
    da_0_KR = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    da_1_KR = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    da_2_KR = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    for start in tl.range(first, last, BLOCK_T, num_stages=STAGES):
        rows_T = start + tl.arange(0, BLOCK_T).to(tl.int64)
        mask_TK = (rows_T < last)[:, None] & (columns_K < K)[None, :]
        x_TK = tl.load(x_ptr + rows_T[:, None] * x_stride + columns_K[None, :], mask=mask_TK, other=0.0)
        da_0_KR = _add_da(
            da_0_KR, x_TK, dlow_ptr, words_ptr, rows_T, columns_K, dlow_stride, words_stride, mask_TK, last,
            RANK_0, BLOCK_R,
        )  # fmt: skip
        if RANK_1 > 0:
            da_1_KR = _add_da(
                da_1_KR, x_TK, dlow_ptr + RANK_0, words_ptr + plane, rows_T, columns_K, dlow_stride, words_stride,
                mask_TK, last, RANK_1, BLOCK_R,
            )  # fmt: skip
        if RANK_2 > 0:
            da_2_KR = _add_da(
                da_2_KR, x_TK, dlow_ptr + RANK_0 + RANK_1, words_ptr + 2 * plane, rows_T, columns_K, dlow_stride,
                words_stride, mask_TK, last, RANK_2, BLOCK_R,
            )  # fmt: skip
    parts_ptr += tl.program_id(1).to(tl.int64) * (RANK_0 + RANK_1 + RANK_2) * K
    _store_da(parts_ptr, scale_0 * da_0_KR, columns_K, K, RANK_0, BLOCK_R)
    if RANK_1 > 0:
        _store_da(parts_ptr + RANK_0 * K, scale_1 * da_1_KR, columns_K, K, RANK_1, BLOCK_R)
    if RANK_2 > 0:
        _store_da(parts_ptr + (RANK_0 + RANK_1) * K, scale_2 * da_2_KR, columns_K, K, RANK_2, BLOCK_R)


@triton.jit
def _masked_product(
    dlow_ptr, a_ptr, words_ptr, rows_T, columns_K, dlow_stride, words_stride, mask_TK, T, K, scale,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """mask ∘ (dlow·A), times `scale`."""
    ranks_R = tl.arange(0, BLOCK_R)
    mask_RK = (ranks_R < RANK)[:, None] & (columns_K < K)[None, :]
    a_RK = tl.load(a_ptr + ranks_R[:, None] * K + columns_K[None, :], mask=mask_RK, other=0.0)
    dlow_TR = narrow_rows(dlow_ptr, rows_T, T, dlow_stride, RANK, BLOCK_R)
    kept_TK = kept(words_ptr, rows_T, columns_K, words_stride, mask_TK)
    return tl.where(kept_TK, scale * dot(dlow_TR, a_RK), 0.0)


@triton.jit
def _input_gradient_kernel(
    dlow_ptr, a_ptr, words_ptr, dx_ptr, T, K, dlow_stride, words_stride, plane, scale_0, scale_1, scale_2,
    RANK_0: tl.constexpr, RANK_1: tl.constexpr, RANK_2: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows_T = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns_K = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_TK = (rows_T < T)[:, None] & (columns_K < K)[None, :]
    dx_TK = _masked_product(
        dlow_ptr, a_ptr, words_ptr, rows_T, columns_K, dlow_stride, words_stride, mask_TK, T, K, scale_0,
        RANK_0, BLOCK_R,
    )  # fmt: skip
    if RANK_1 > 0:
        dx_TK += _masked_product(
            dlow_ptr + RANK_0, a_ptr + RANK_0 * K, words_ptr + plane, rows_T, columns_K, dlow_stride, words_stride,
            mask_TK, T, K, scale_1, RANK_1, BLOCK_R,
        )  # fmt: skip
    if RANK_2 > 0:
        dx_TK += _masked_product(
            dlow_ptr + RANK_0 + RANK_1, a_ptr + (RANK_0 + RANK_1) * K, words_ptr + 2 * plane, rows_T, columns_K,
            dlow_stride, words_stride, mask_TK, T, K, scale_2, RANK_2, BLOCK_R,
        )  # fmt: skip
    tl.store(dx_ptr + rows_T[:, None] * K + columns_K[None, :], dx_TK, mask=mask_TK)


def masks(
    probabilities: Sequence[float], shape: tuple[int, int], dtype: torch.dtype, device: torch.device, seed: int
) -> Masks:
    """Independent masks of `shape`, a function of `seed`; an element is dropped with its adapter's probability, to
    2⁻¹⁷."""
    T, K = shape
    words_GTW = torch.empty((len(probabilities), T, -(-K // 32)), dtype=torch.int32, device=device)
    if len(set(probabilities)) == 1:
        _fill(words_GTW, probabilities[0], seed)
    else:
        for index, p in enumerate(probabilities):
            _fill(words_GTW[index], p, seed + index)
    return Masks(words_GTW, [1.0 / (1.0 - p) if p < 1.0 else 1.0 for p in probabilities])


def _fill(words_N: Tensor, p: float, seed: int) -> None:
    N, below = words_N.numel(), round(p * (1 << _PLACES))
    if below >= 1 << _PLACES:
        words_N.zero_()
    elif N:
        with device_guard(words_N):
            programs = -(-N // (_BLOCK_N * _TOGETHER.value))
            _words_kernel[(programs,)](words_N, seed, N, P=below, BLOCK_N=_BLOCK_N, num_warps=_WORDS_WARPS)


def low_rank(x_TK: Tensor, a_RK: Tensor, ranks: Sequence[int], masks: Masks) -> Tensor:
    """See `Dropout.low_rank`.  Sums are fp32 and scaled before they are rounded."""
    T, K = x_TK.shape
    x_TK, a_RK = unit_stride(x_TK), a_RK.contiguous()
    low_TR = x_TK.new_empty(T, len(a_RK))
    for part in _launches(ranks, masks):
        block_t = 64 if part.block_r * len(part.ranks) > 64 else 32
        with device_guard(x_TK):
            if T:
                _low_rank_kernel[(-(-T // block_t),)](
                    x_TK, a_RK[part.row :], part.words, low_TR[:, part.row :], T, K, x_TK.stride(0), low_TR.stride(0),
                    *part.strides, *part.scales, **part.constants, BLOCK_R=part.block_r,
                    BLOCK_T=block_t, BLOCK_K=64, STAGES=3, num_warps=4,
                )  # fmt: skip
    return low_TR


def a_gradients(dlow_TR: Tensor, x_TK: Tensor, ranks: Sequence[int], masks: Masks) -> Tensor:
    """See `Dropout.a_gradients`; sums as in `low_rank`."""
    T, K = x_TK.shape
    x_TK, dlow_TR = unit_stride(x_TK), unit_stride(dlow_TR)
    da_RK = x_TK.new_empty(sum(ranks), K)
    for part in _launches(ranks, masks):
        across = -(-K // 64)
        shares = max(1, min(528 // across, T // 256))
        rows_each = -(-T // (shares * 64)) * 64
        shares = max(1, -(-T // rows_each)) if T else 1
        parts_SRK = torch.empty((shares, sum(part.ranks), K), dtype=torch.float32, device=x_TK.device)
        with device_guard(x_TK):
            _a_gradients_kernel[(across, shares)](
                x_TK, dlow_TR[:, part.row :], part.words, parts_SRK, T, K, rows_each, x_TK.stride(0),
                dlow_TR.stride(0), *part.strides, *part.scales, **part.constants, BLOCK_R=part.block_r,
                BLOCK_T=64, BLOCK_K=64, STAGES=3, num_warps=4,
            )  # fmt: skip
        da_RK[part.row : part.row + sum(part.ranks)] = parts_SRK.sum(0)
    return da_RK


def input_gradient(dlow_TR: Tensor, a_RK: Tensor, ranks: Sequence[int], masks: Masks) -> Tensor:
    """See `Dropout.input_gradient`; sums are fp32 and rounded once."""
    T, K = len(dlow_TR), a_RK.shape[1]
    a_RK, dlow_TR = a_RK.contiguous(), unit_stride(dlow_TR)
    dx_TK = None
    for part in _launches(ranks, masks):
        made_TK = dlow_TR.new_empty(T, K)
        with device_guard(dlow_TR):
            if T:
                _input_gradient_kernel[(-(-K // 128), -(-T // 64))](
                    dlow_TR[:, part.row :], a_RK[part.row :], part.words, made_TK, T, K, dlow_TR.stride(0),
                    *part.strides, *part.scales, **part.constants, BLOCK_R=part.block_r,
                    BLOCK_T=64, BLOCK_K=128, num_warps=4,
                )  # fmt: skip
        dx_TK = made_TK if dx_TK is None else dx_TK.add_(made_TK)
    assert dx_TK is not None
    return dx_TK


class _Launch(NamedTuple):
    """Up to three adapters' share of a group."""

    row: int
    """Of the stacked A, where the first of them starts."""
    ranks: list[int]
    words: Tensor
    """From their first mask on."""
    strides: tuple[int, int]
    scales: list[float]

    @property
    def block_r(self) -> int:
        return rank_block(*self.ranks)

    @property
    def constants(self) -> dict[str, int]:
        return {f"RANK_{index}": rank for index, rank in enumerate([*self.ranks, 0, 0][:3])}


def _launches(ranks: Sequence[int], masks: Masks) -> list[_Launch]:
    """One launch for all adapters, as far as a program's registers hold them; a rank beyond is divided."""
    strides = masks.words_GTW.stride(1), masks.words_GTW.stride(0)
    if len(ranks) <= 3 and max(ranks) <= MAX_RANK:
        scales = [*masks.scales, 0.0, 0.0][:3]
        return [_Launch(0, list(ranks), masks.words_GTW, strides, scales)]
    starts = [0, *accumulate(ranks)]
    return [
        _Launch(row, [min(MAX_RANK, starts[g + 1] - row)], masks.words_GTW[g], strides, [masks.scales[g], 0.0, 0.0])
        for g in range(len(ranks))
        for row in range(starts[g], starts[g + 1], MAX_RANK)
    ]
