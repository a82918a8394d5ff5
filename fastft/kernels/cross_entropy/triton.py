"""Cross-entropy in Triton: the logits are read once, and their gradient is written in their place at once.

Same name and signature as `reference.py`.  One program owns a row and walks over blocks of the vocabulary.  A softmax
needs its row's sum before its first element can be written; here the sum is left out of what is written, and returned
as the row's divisor.  Exponentials are taken from a level: the maximum of the first block, not of the row.  Where a
later block is so far above it that they might overflow, the level rises, and what was written of the row is scaled
down to it.
"""

# N labelled rows, V vocabulary, R running sums of a row

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastft.kernels.cross_entropy import LogitTransform, reference
from fastft.kernels.cross_entropy.reference import scale_tensor
from fastft.kernels.launch import device_guard, next_power_of_2
from fastft.kernels.launches import DEFAULTS, Launches, launch_for

_MIN_BLOCK_V = 32  # one warp's threads
_NEIGHBOURS = tl.constexpr(4)
"""Lanes that share a running sum: one thread holds them, so it costs no exchange and saves registers."""
_LOWEST = tl.constexpr(-3.4e38)  # finite, so that a first block of −∞ gives exp(−∞), not exp(−∞ + ∞)
_LIMIT = tl.constexpr(40.0)
"""How far above its level a row may go.  exp(40) · V is 10²³, far from 10³⁸, the largest bf16 or fp32 number, and a
product with the head is no larger than that times a weight."""


@triton.jit
def _tanh(x):
    """Without cancellation near 0: a series there, 2·sigmoid(2x) − 1 elsewhere."""
    square = x * x
    series = x * (1.0 + square * (-0.33333334 + square * (0.13333334 + square * (-0.053968254 + square * 0.021869488))))
    return tl.where(tl.abs(x) < 0.25, series, 2.0 * tl.sigmoid(2.0 * x) - 1.0)


@triton.jit
def capped_logits(logits, mask, multiplier, softcap):
    """What the softmax is taken of, but for the temperature, and without a soft-cap for the multiplier; −∞ outside the
    row."""
    capped = logits
    if softcap is not None:
        capped = tl.where(mask, softcap * _tanh(logits * multiplier / softcap), float("-inf"))
    return capped


@triton.jit
def _slope(capped, multiplier, softcap):
    """How that changes with the logits."""
    slope = 1.0
    if softcap is not None:
        slope = multiplier * (1.0 - (capped / softcap) * (capped / softcap))
    return slope


@triton.jit
def _multiply_(row_ptr, lane_offsets_V, block_stride, blocks, factor):
    """The row's first `blocks` blocks, times a number."""
    tl.debug_barrier()  # what other threads wrote is read
    for _ in range(blocks):
        tl.store(row_ptr + lane_offsets_V, tl.load(row_ptr + lane_offsets_V).to(tl.float32) * factor)
        row_ptr += block_stride


@triton.jit
def _cross_entropy_kernel(
    logits_ptr, targets_ptr, scale_ptr, lse_ptr, loss_ptr, divisor_ptr, V, logits_stride_N, logits_stride_V,
    multiplier, softcap, temperature, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """`lse_ptr`: log-sum-exp of the rows.  Without a scale it is written; with one it is the level to begin at, from
    which no row rises."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_stride_N
    lanes_V = tl.arange(0, BLOCK_V)
    lane_offsets_V = lanes_V.to(tl.int64) * logits_stride_V
    block_stride = tl.full((), BLOCK_V, tl.int64) * logits_stride_V

    target = tl.load(targets_ptr + row)
    # A target outside the vocabulary gives a NaN loss and divisor, never an access outside the row.
    target_exists = (target >= 0) & (target < V)
    target_ptr = row_ptr + target * logits_stride_V
    target_logit = tl.load(target_ptr, mask=target_exists, other=float("nan")).to(tl.float32)
    target_capped = capped_logits(target_logit, True, multiplier, softcap)
    target_column = target.to(tl.int32)
    tl.debug_barrier()  # every thread has read it before one writes there

    # What every element is multiplied by is left out of all that is done for each.
    unit = multiplier / temperature
    if softcap is not None:
        unit = 1.0 / temperature
    to_base_2 = unit * 1.4426950408889634
    limit = _LIMIT / unit
    maximum = tl.full((), _LOWEST, tl.float32)
    level = maximum
    if scale_ptr is not None and lse_ptr is not None:
        level = tl.load(lse_ptr + row) / unit
    # Of all but the target: that is what 1 − p is made of, and of a confident p it would be lost in rounding.
    # Summed over lanes only at the end.
    rest_R = tl.zeros((BLOCK_V // _NEIGHBOURS,), tl.float32)
    block_ptr = row_ptr
    ahead_V = tl.load(block_ptr + lane_offsets_V, mask=lanes_V < V, other=float("-inf"))
    for start in range(0, V, BLOCK_V):
        mask_V = lanes_V < V - start
        logits_V = ahead_V.to(tl.float32)
        # The next block, so that its load need not wait for this one's maximum; nobody has written there yet.
        after_V = lanes_V < V - start - BLOCK_V
        ahead_V = tl.load(block_ptr + block_stride + lane_offsets_V, mask=after_V, other=float("-inf"))
        capped_V = capped_logits(logits_V, mask_V, multiplier, softcap)
        block_maximum = tl.max(capped_V, axis=0)
        maximum = tl.maximum(maximum, block_maximum)
        if block_maximum > level + limit:
            factor = tl.exp2((level - block_maximum) * to_base_2)
            rest_R *= factor
            if scale_ptr is not None:
                _multiply_(row_ptr, lane_offsets_V, block_stride, start // BLOCK_V, factor)
            level = block_maximum
        exp_V = tl.exp2((capped_V - level) * to_base_2)
        others_V = exp_V
        if (target_column >= start) & (target_column < start + BLOCK_V):
            others_V = tl.where(lanes_V == target_column - start, 0.0, exp_V)
        rest_R += tl.sum(tl.reshape(others_V, (BLOCK_V // _NEIGHBOURS, _NEIGHBOURS)), axis=1)
        if scale_ptr is not None:
            tl.store(block_ptr + lane_offsets_V, exp_V * _slope(capped_V, multiplier, softcap), mask=mask_V)
        block_ptr += block_stride

    rest = tl.sum(rest_R, axis=0)
    total = rest + tl.exp2((target_capped - level) * to_base_2)
    # From the maximum, so that the logarithm, like what is taken from it, is small where the loss is.
    log_total = tl.log(total * tl.exp2((level - maximum) * to_base_2))
    tl.store(loss_ptr + row, log_total - (target_capped - maximum) * unit)
    if scale_ptr is not None:
        # What is the same for a whole row is left to the divisor.
        tl.store(divisor_ptr + row, total / (tl.load(scale_ptr) * unit))
        tl.debug_barrier()  # another thread may have written the target's element with its block
        tl.store(target_ptr, -rest * _slope(target_capped, multiplier, softcap), mask=target_exists)
    elif lse_ptr is not None:
        tl.store(lse_ptr + row, maximum * unit + log_total)


def cross_entropy_(
    logits_NV: Tensor,
    targets_N: Tensor,
    scale: float | Tensor | None = None,
    transform: LogitTransform = LogitTransform(),  # noqa: B008
    *,
    launches: Launches = DEFAULTS,
) -> tuple[Tensor, Tensor | None]:
    """`(loss_N, divisor_N)`; see `reference.cross_entropy_`.

    A target outside the vocabulary gives a NaN loss and divisor.
    """
    if transform.multiplier <= 0:  # then the largest logit is not the likeliest
        return reference.cross_entropy_(logits_NV, targets_N, scale, transform)
    loss_N = torch.empty(logits_NV.shape[:1], dtype=torch.float32, device=logits_NV.device)
    if scale is None:
        _launch(logits_NV, targets_N, None, None, loss_N, None, transform, launches)
        return loss_N, None
    divisor_N, lse_N = torch.empty_like(loss_N), None
    if logits_NV.dtype == torch.float16:
        # An undivided gradient may be over fp16's largest number, so here the rows' sums are taken first.
        lse_N = torch.empty_like(loss_N)
        _launch(logits_NV, targets_N, None, lse_N, loss_N, None, transform, launches)
    scale_1 = scale_tensor(scale, logits_NV.device)
    _launch(logits_NV, targets_N, scale_1, lse_N, loss_N, divisor_N, transform, launches)
    return loss_N, divisor_N


def _launch(
    logits_NV: Tensor, targets_N: Tensor, scale_1: Tensor | None, lse_N: Tensor | None, loss_N: Tensor,
    divisor_N: Tensor | None, transform: LogitTransform, launches: Launches,
) -> None:  # fmt: skip
    N, V = logits_NV.shape
    if N == 0:
        return
    launch = launch_for("cross_entropy", (V,), logits_NV.element_size(), N, launches)
    block = min(launch.block_f, max(_MIN_BLOCK_V, next_power_of_2(V)))
    # A narrower block has fewer warps in proportion.
    warps = max(1, launch.warps * block // launch.block_f)
    with device_guard(logits_NV):
        _cross_entropy_kernel[(N,)](
            logits_NV, targets_N.contiguous(), scale_1, lse_N, loss_N, divisor_N, V, *logits_NV.stride(),
            *transform, BLOCK_V=block, num_warps=warps,
        )  # fmt: skip
