"""LoRA's dropout in Triton: a byte of bits for each element of a group's input, one bit an adapter, and products that
read an input once for all adapters of a group.

Same names and signatures as `reference.py`, but for what masks are.

A mask's bit is u < p, negated, for a number u of 16 random bits.  32 of them are made at once, a random word for each
place of u and p, from the lowest place up: where p has a one, u is below it as soon as u has a zero there.  Random
words are Philox 4×32 of seven rounds, the fewest that pass all of TestU01 ("Parallel Random Numbers: As Easy as 1, 2,
3", https://doi.org/10.1145/2063384.2063405).  The eight lower places, which decide one element in 256, are those of
four words: the probability of each element stays p, and two of the four depend on each other in one pair of 65,536.
"""

# T tokens, K columns of the input, R rank, S parts of a sum, N words; BLOCK_* what a program holds at once

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
_MAX_ADAPTERS = 3
_TOGETHER = tl.constexpr(4)
"""Words that share their lower places."""
_ROUNDS = tl.constexpr(7)
_BYTES = tl.constexpr(8)
"""Words of four bytes that a word's 32 bits become."""
_BLOCK_N, _BITS_WARPS = 256, 4


class Masks(NamedTuple):
    """Which elements a group's adapters keep."""

    bits_TK: Tensor
    """uint8; bit g is 1 where adapter g keeps the element."""
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
def _lower(seed, counter_N, none_N, P: tl.constexpr, CALL: tl.constexpr):
    """What the eight lower places say."""
    below_N = none_N
    for call in tl.static_range(2):
        w_0, w_1, w_2, w_3 = tl.philox(seed, counter_N, none_N + (CALL + call), none_N, none_N, n_rounds=_ROUNDS)
        below_N = _below(below_N, w_0, w_1, w_2, w_3, P, 4 * call)
    return below_N


@triton.jit
def _kept_words(lower_N, seed, counter_N, none_N, P: tl.constexpr, CALL: tl.constexpr):
    """32 elements in a word, 1 where one is kept."""
    below_N = lower_N
    for call in tl.static_range(2):
        w_0, w_1, w_2, w_3 = tl.philox(seed, counter_N, none_N + (CALL + call), none_N, none_N, n_rounds=_ROUNDS)
        below_N = _below(below_N, w_0, w_1, w_2, w_3, P, 8 + 4 * call)
    if P == 65536:
        below_N = ~none_N
    return ~below_N


@triton.jit
def _bits_kernel(
    bits_ptr, seed, N, P_0: tl.constexpr, P_1: tl.constexpr, P_2: tl.constexpr, COUNT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    lanes_N = tl.arange(0, BLOCK_N)
    none_N = tl.zeros((BLOCK_N,), tl.int32).to(tl.uint32, bitcast=True)
    counter_N = (program * BLOCK_N + lanes_N).to(tl.uint32)
    # No adapter's random numbers are another's: each has sixteen calls of its own.
    lower_0_N = _lower(seed, counter_N, none_N, P_0, 0)
    lower_1_N = _lower(seed, counter_N, none_N, P_1, 16) if COUNT > 1 else none_N
    lower_2_N = _lower(seed, counter_N, none_N, P_2, 32) if COUNT > 2 else none_N
    for word in tl.static_range(_TOGETHER):
        kept_0_N = _kept_words(lower_0_N, seed, counter_N, none_N, P_0, 2 + 2 * word)
        kept_1_N = _kept_words(lower_1_N, seed, counter_N, none_N, P_1, 18 + 2 * word) if COUNT > 1 else none_N
        kept_2_N = _kept_words(lower_2_N, seed, counter_N, none_N, P_2, 34 + 2 * word) if COUNT > 2 else none_N
        for place in tl.static_range(_BYTES):
            bits_N = (kept_0_N >> place) & 0x01010101
            if COUNT > 1:
                bits_N |= ((kept_1_N >> place) & 0x01010101) << 1
            if COUNT > 2:
                bits_N |= ((kept_2_N >> place) & 0x01010101) << 2
            at_N = ((program.to(tl.int64) * _TOGETHER + word) * _BYTES + place) * BLOCK_N + lanes_N
            tl.store(bits_ptr + at_N, bits_N.to(tl.int32, bitcast=True), mask=at_N < N)


@triton.jit
def kept(x_TK, bits_TK, ADAPTER: tl.constexpr):
    """x where the adapter keeps it, else 0; in x's dtype."""
    return tl.where(((bits_TK >> ADAPTER) & 1) != 0, x_TK, 0.0).to(x_TK.dtype)


@triton.jit
def _add_low(
    low_TR, x_TK, bits_TK, a_ptr, columns_K, last, K,
    ADAPTER: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Plus (mask ∘ x)·Aᵀ of these columns."""
    ranks_R = tl.arange(0, BLOCK_R)
    mask_KR = (columns_K < last)[:, None] & (ranks_R < RANK)[None, :]
    a_KR = tl.load(a_ptr + ranks_R[None, :] * K + columns_K[:, None], mask=mask_KR, other=0.0)
    return low_TR + dot(kept(x_TK, bits_TK, ADAPTER), a_KR)


@triton.jit
def _store_low(low_ptr, low_TR, rows_T, T, stride, RANK: tl.constexpr, BLOCK_R: tl.constexpr):
    ranks_R = tl.arange(0, BLOCK_R)
    mask_TR = (rows_T < T)[:, None] & (ranks_R < RANK)[None, :]
    tl.store(low_ptr + rows_T[:, None] * stride + ranks_R[None, :], low_TR, mask=mask_TR)


@triton.jit
def _low_rank_kernel(
    x_ptr, a_ptr, bits_ptr, low_ptr, T, K, columns_each, x_stride, low_stride, part_stride,
    scale_0, scale_1, scale_2,
    FIRST: tl.constexpr, RANK_0: tl.constexpr, RANK_1: tl.constexpr, RANK_2: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    rows_T = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    begin = tl.program_id(1) * columns_each
    last = tl.minimum(begin + columns_each, K)
    low_0_TR = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    low_1_TR = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    low_2_TR = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for start in tl.range(begin, last, BLOCK_K, num_stages=STAGES):
        columns_K = start + tl.arange(0, BLOCK_K)
        mask_TK = (rows_T < T)[:, None] & (columns_K < last)[None, :]
        x_TK = tl.load(x_ptr + rows_T[:, None] * x_stride + columns_K[None, :], mask=mask_TK, other=0.0)
        bits_TK = tl.load(bits_ptr + rows_T[:, None] * K + columns_K[None, :], mask=mask_TK, other=0)
        low_0_TR = _add_low(low_0_TR, x_TK, bits_TK, a_ptr, columns_K, last, K, FIRST, RANK_0, BLOCK_R)
        if RANK_1 > 0:
            a_1_ptr = a_ptr + RANK_0 * K
            low_1_TR = _add_low(low_1_TR, x_TK, bits_TK, a_1_ptr, columns_K, last, K, FIRST + 1, RANK_1, BLOCK_R)
        if RANK_2 > 0:
            a_2_ptr = a_ptr + (RANK_0 + RANK_1) * K
            low_2_TR = _add_low(low_2_TR, x_TK, bits_TK, a_2_ptr, columns_K, last, K, FIRST + 2, RANK_2, BLOCK_R)
    low_ptr += tl.program_id(1).to(tl.int64) * part_stride
    _store_low(low_ptr, scale_0 * low_0_TR, rows_T, T, low_stride, RANK_0, BLOCK_R)
    if RANK_1 > 0:
        _store_low(low_ptr + RANK_0, scale_1 * low_1_TR, rows_T, T, low_stride, RANK_1, BLOCK_R)
    if RANK_2 > 0:
        _store_low(low_ptr + RANK_0 + RANK_1, scale_2 * low_2_TR, rows_T, T, low_stride, RANK_2, BLOCK_R)


@triton.jit
def _add_da(
    da_KR, x_TK, bits_TK, dlow_ptr, rows_T, dlow_stride, last,
    ADAPTER: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Plus (mask ∘ x)ᵀ·dlow of these rows."""
    dlow_TR = narrow_rows(dlow_ptr, rows_T, last, dlow_stride, RANK, BLOCK_R)
    return da_KR + dot(tl.trans(kept(x_TK, bits_TK, ADAPTER)), dlow_TR)


@triton.jit
def _store_da(da_ptr, da_KR, columns_K, K, RANK: tl.constexpr, BLOCK_R: tl.constexpr):
    ranks_R = tl.arange(0, BLOCK_R)
    mask_KR = (columns_K < K)[:, None] & (ranks_R < RANK)[None, :]
    tl.store(da_ptr + ranks_R[None, :] * K + columns_K[:, None], da_KR, mask=mask_KR)


@triton.jit
def _a_gradients_kernel(
    x_ptr, dlow_ptr, bits_ptr, parts_ptr, T, K, rows_each, x_stride, dlow_stride, scale_0, scale_1, scale_2,
    FIRST: tl.constexpr, RANK_0: tl.constexpr, RANK_1: tl.constexpr, RANK_2: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    columns_K = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    first = tl.program_id(1).to(tl.int64) * rows_each
    last = tl.minimum(first + rows_each, T)
    da_0_KR = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    da_1_KR = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    da_2_KR = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    for start in tl.range(first, last, BLOCK_T, num_stages=STAGES):
        rows_T = start + tl.arange(0, BLOCK_T).to(tl.int64)
        mask_TK = (rows_T < last)[:, None] & (columns_K < K)[None, :]
        x_TK = tl.load(x_ptr + rows_T[:, None] * x_stride + columns_K[None, :], mask=mask_TK, other=0.0)
        bits_TK = tl.load(bits_ptr + rows_T[:, None] * K + columns_K[None, :], mask=mask_TK, other=0)
        da_0_KR = _add_da(da_0_KR, x_TK, bits_TK, dlow_ptr, rows_T, dlow_stride, last, FIRST, RANK_0, BLOCK_R)
        if RANK_1 > 0:
            low_1_ptr = dlow_ptr + RANK_0
            da_1_KR = _add_da(da_1_KR, x_TK, bits_TK, low_1_ptr, rows_T, dlow_stride, last, FIRST + 1, RANK_1, BLOCK_R)
        if RANK_2 > 0:
            low_2_ptr = dlow_ptr + RANK_0 + RANK_1
            da_2_KR = _add_da(da_2_KR, x_TK, bits_TK, low_2_ptr, rows_T, dlow_stride, last, FIRST + 2, RANK_2, BLOCK_R)
    parts_ptr += tl.program_id(1).to(tl.int64) * (RANK_0 + RANK_1 + RANK_2) * K
    _store_da(parts_ptr, scale_0 * da_0_KR, columns_K, K, RANK_0, BLOCK_R)
    if RANK_1 > 0:
        _store_da(parts_ptr + RANK_0 * K, scale_1 * da_1_KR, columns_K, K, RANK_1, BLOCK_R)
    if RANK_2 > 0:
        _store_da(parts_ptr + (RANK_0 + RANK_1) * K, scale_2 * da_2_KR, columns_K, K, RANK_2, BLOCK_R)


@triton.jit
def _product(
    dlow_ptr, a_ptr, bits_TK, rows_T, columns_K, dlow_stride, T, K, scale,
    ADAPTER: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """mask ∘ (dlow·A), times `scale`, fp32."""
    ranks_R = tl.arange(0, BLOCK_R)
    mask_RK = (ranks_R < RANK)[:, None] & (columns_K < K)[None, :]
    a_RK = tl.load(a_ptr + ranks_R[:, None] * K + columns_K[None, :], mask=mask_RK, other=0.0)
    dlow_TR = narrow_rows(dlow_ptr, rows_T, T, dlow_stride, RANK, BLOCK_R)
    return kept(scale * dot(dlow_TR, a_RK), bits_TK, ADAPTER)


@triton.jit
def _input_gradient_kernel(
    dlow_ptr, a_ptr, bits_ptr, dx_ptr, T, K, dlow_stride, scale_0, scale_1, scale_2,
    FIRST: tl.constexpr, RANK_0: tl.constexpr, RANK_1: tl.constexpr, RANK_2: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows_T = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns_K = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_TK = (rows_T < T)[:, None] & (columns_K < K)[None, :]
    bits_TK = tl.load(bits_ptr + rows_T[:, None] * K + columns_K[None, :], mask=mask_TK, other=0)
    dx_TK = _product(dlow_ptr, a_ptr, bits_TK, rows_T, columns_K, dlow_stride, T, K, scale_0, FIRST, RANK_0, BLOCK_R)
    if RANK_1 > 0:
        dx_TK += _product(
            dlow_ptr + RANK_0, a_ptr + RANK_0 * K, bits_TK, rows_T, columns_K, dlow_stride, T, K, scale_1,
            FIRST + 1, RANK_1, BLOCK_R,
        )  # fmt: skip
    if RANK_2 > 0:
        dx_TK += _product(
            dlow_ptr + RANK_0 + RANK_1, a_ptr + (RANK_0 + RANK_1) * K, bits_TK, rows_T, columns_K, dlow_stride, T, K,
            scale_2, FIRST + 2, RANK_2, BLOCK_R,
        )  # fmt: skip
    tl.store(dx_ptr + rows_T[:, None] * K + columns_K[None, :], dx_TK, mask=mask_TK)


class Layout(NamedTuple):
    """Of the launch of a product."""

    block_t: int
    block_k: int
    warps: int
    stages: int
    programs: int
    """How many share the work, about."""


# The best of seven to nine each on an H200, or within a tenth of it, at ranks 16 and 64 (docs/log.md, 2026-11-29).
LOW_RANK = Layout(64, 64, 4, 3, 528)
A_GRADIENTS = Layout(64, 64, 4, 2, 528)
INPUT_GRADIENT = Layout(64, 128, 4, 1, 0)


def masks(
    probabilities: Sequence[float], shape: tuple[int, int], dtype: torch.dtype, device: torch.device, seed: int
) -> Masks:
    """Independent masks of `shape`, a function of `seed`; an element is dropped with its adapter's probability, to
    2⁻¹⁷.  At most three adapters."""
    T, K = shape
    count, elements = len(probabilities), T * K
    if count > _MAX_ADAPTERS:
        raise ValueError(f"{count} adapters share an input; masks hold {_MAX_ADAPTERS}")
    bits_N = torch.empty(-(-elements // 4), dtype=torch.int32, device=device)
    below = {f"P_{index}": round(p * (1 << _PLACES)) for index, p in enumerate([*probabilities, 0.0, 0.0][:3])}
    if elements:
        programs = -(-len(bits_N) // (_BLOCK_N * _TOGETHER.value * _BYTES.value))
        with device_guard(bits_N):
            _bits_kernel[(programs,)](
                bits_N, seed, len(bits_N), **below, COUNT=count, BLOCK_N=_BLOCK_N, num_warps=_BITS_WARPS
            )
    scales = [1.0 / (1.0 - p) if p < 1.0 else 1.0 for p in probabilities]
    return Masks(bits_N.view(torch.uint8)[:elements].view(T, K), scales)


def low_rank(x_TK: Tensor, a_RK: Tensor, ranks: Sequence[int], masks: Masks, *, layout: Layout = LOW_RANK) -> Tensor:
    """See `Dropout.low_rank`.  Sums are fp32 and scaled before they are rounded."""
    T, K = x_TK.shape
    x_TK, a_RK = unit_stride(x_TK), a_RK.contiguous()
    down = -(-T // layout.block_t)
    each = -(-K // max(1, min(layout.programs // max(1, down), K // 512)))
    each = -(-each // layout.block_k) * layout.block_k
    parts = -(-K // each)
    low_STR = torch.empty((parts, T, len(a_RK)), dtype=x_TK.dtype if parts == 1 else torch.float32, device=x_TK.device)
    if low_STR.numel():
        with device_guard(x_TK):
            for launch in _launches(ranks, masks):
                _low_rank_kernel[(down, parts)](
                    x_TK, a_RK[launch.row :], masks.bits_TK, low_STR[..., launch.row :], T, K, each, x_TK.stride(0),
                    low_STR.stride(1), low_STR.stride(0), *launch.scales, **launch.constants,
                    BLOCK_T=layout.block_t, BLOCK_K=layout.block_k, STAGES=layout.stages, num_warps=layout.warps,
                )  # fmt: skip
    return low_STR[0] if parts == 1 else low_STR.sum(0).to(x_TK.dtype)


def a_gradients(
    dlow_TR: Tensor, x_TK: Tensor, ranks: Sequence[int], masks: Masks, *, layout: Layout = A_GRADIENTS
) -> Tensor:
    """See `Dropout.a_gradients`; sums as in `low_rank`."""
    T, K = x_TK.shape
    x_TK, dlow_TR = unit_stride(x_TK), unit_stride(dlow_TR)
    across = -(-K // layout.block_k)
    each = -(-T // max(1, min(layout.programs // across, T // 256)))
    each = max(1, -(-each // layout.block_t)) * layout.block_t
    shares = max(1, -(-T // each))
    da_RK = x_TK.new_empty(sum(ranks), K)
    for launch in _launches(ranks, masks):
        parts_SRK = torch.empty((shares, launch.rows, K), dtype=torch.float32, device=x_TK.device)
        with device_guard(x_TK):
            _a_gradients_kernel[(across, shares)](
                x_TK, dlow_TR[:, launch.row :], masks.bits_TK, parts_SRK, T, K, each, x_TK.stride(0),
                dlow_TR.stride(0), *launch.scales, **launch.constants,
                BLOCK_T=layout.block_t, BLOCK_K=layout.block_k, STAGES=layout.stages, num_warps=layout.warps,
            )  # fmt: skip
        da_RK[launch.row : launch.row + launch.rows] = parts_SRK.sum(0)
    return da_RK


def input_gradient(
    dlow_TR: Tensor, a_RK: Tensor, ranks: Sequence[int], masks: Masks, *, layout: Layout = INPUT_GRADIENT
) -> Tensor:
    """See `Dropout.input_gradient`; sums are fp32 and rounded once a launch."""
    T, K = len(dlow_TR), a_RK.shape[1]
    a_RK, dlow_TR = a_RK.contiguous(), unit_stride(dlow_TR)
    grid = -(-K // layout.block_k), -(-T // layout.block_t)
    dx_TK = None
    for launch in _launches(ranks, masks):
        made_TK = dlow_TR.new_empty(T, K)
        if T:
            with device_guard(dlow_TR):
                _input_gradient_kernel[grid](
                    dlow_TR[:, launch.row :], a_RK[launch.row :], masks.bits_TK, made_TK, T, K, dlow_TR.stride(0),
                    *launch.scales, **launch.constants,
                    BLOCK_T=layout.block_t, BLOCK_K=layout.block_k, num_warps=layout.warps,
                )  # fmt: skip
        dx_TK = made_TK if dx_TK is None else dx_TK.add_(made_TK)
    assert dx_TK is not None
    return dx_TK


class _Launch(NamedTuple):
    """Some of a group's adapters, or a part of one."""

    row: int
    """Of the stacked A, where the first of them starts."""
    ranks: list[int]
    first: int
    """The number of the first of them."""
    scales: list[float]

    @property
    def rows(self) -> int:
        return sum(self.ranks)

    @property
    def constants(self) -> dict[str, int]:
        ranks = {f"RANK_{index}": rank for index, rank in enumerate([*self.ranks, 0, 0][:3])}
        return {"FIRST": self.first, **ranks, "BLOCK_R": rank_block(*self.ranks)}


def _launches(ranks: Sequence[int], masks: Masks) -> list[_Launch]:
    """One launch for all adapters, as far as a program's registers hold them; a rank beyond is divided."""
    if max(ranks) <= MAX_RANK:
        return [_Launch(0, list(ranks), 0, [*masks.scales, 0.0, 0.0][:3])]
    starts = [0, *accumulate(ranks)]
    return [
        _Launch(row, [min(MAX_RANK, starts[g + 1] - row)], g, [masks.scales[g], 0.0, 0.0])
        for g in range(len(ranks))
        for row in range(starts[g], starts[g + 1], MAX_RANK)
    ]
