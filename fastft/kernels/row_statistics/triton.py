"""Statistics of rows of logits in Triton: one pass over the logits, whatever of them is asked for.

Same names and signatures as `reference.py`.  A program owns a row and walks over blocks of the vocabulary with a
running maximum, to which its sums refer.
"""

# N rows, V vocabulary

from collections.abc import Collection

import triton
import triton.language as tl
from torch import Tensor

from fastft.kernels.cross_entropy import LogitTransform
from fastft.kernels.cross_entropy.triton import capped_logits
from fastft.kernels.launch import device_guard, next_power_of_2
from fastft.kernels.row_statistics import NAMES, RowStatistics, reference

_BLOCK_V, _WARPS = 4096, 8
_LOWEST = tl.constexpr(-3.4e38)


@triton.jit
def _row_statistics_kernel(
    logits_ptr, targets_ptr, entropy_ptr, log_sum_sq_ptr, mean_ptr, is_top1_ptr, V, logits_stride_N, logits_stride_V,
    multiplier, softcap, temperature, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_stride_N
    lanes_V = tl.arange(0, BLOCK_V)
    target = tl.load(targets_ptr + row)
    unit = multiplier / temperature
    if softcap is not None:
        unit = 1.0 / temperature

    maximum = tl.full((), _LOWEST, tl.float32)
    # −∞ where the target is the first column, so that no maximum is before it.
    before_target = tl.full((), float("-inf"), tl.float32)
    target_z = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    # Σ exp(z − maximum)·(z − maximum), Σ exp(z − maximum)², and the sum of z for its mean.
    weighted = tl.full((), 0.0, tl.float32)
    squares = tl.full((), 0.0, tl.float32)
    sum_z = tl.full((), 0.0, tl.float32)
    for start in range(0, V, BLOCK_V):
        columns_V = start + lanes_V
        mask_V = columns_V < V
        at_V = row_ptr + columns_V.to(tl.int64) * logits_stride_V
        logits_V = tl.load(at_V, mask=mask_V, other=float("-inf")).to(tl.float32)
        z_V = capped_logits(logits_V, mask_V, multiplier, softcap) * unit
        if mean_ptr is not None:
            sum_z += tl.sum(tl.where(mask_V, z_V, 0.0), axis=0)
        if is_top1_ptr is not None:
            before_V = tl.where(columns_V < target, z_V, float("-inf"))
            before_target = tl.maximum(before_target, tl.max(before_V, axis=0))
            target_z = tl.maximum(target_z, tl.max(tl.where(columns_V == target, z_V, float("-inf")), axis=0))
        higher = tl.maximum(maximum, tl.max(z_V, axis=0))
        step = maximum - higher
        shrunk = tl.exp(step)
        below_V = z_V - higher
        exp_V = tl.exp(below_V)
        if entropy_ptr is not None:
            products_V = tl.where(exp_V > 0.0, exp_V * below_V, 0.0)
            # What was summed referred to another maximum.  Before the first block there is nothing to move.
            moved = tl.where(total > 0.0, shrunk * (weighted + step * total), 0.0)
            weighted = moved + tl.sum(products_V, axis=0)
        if log_sum_sq_ptr is not None:
            squares = squares * shrunk * shrunk + tl.sum(exp_V * exp_V, axis=0)
        total = total * shrunk + tl.sum(exp_V, axis=0)
        maximum = higher
    if entropy_ptr is not None:
        tl.store(entropy_ptr + row, tl.log(total) - weighted / total)
    if log_sum_sq_ptr is not None:
        tl.store(log_sum_sq_ptr + row, tl.log(squares) - 2.0 * tl.log(total))
    if mean_ptr is not None:
        tl.store(mean_ptr + row, sum_z / V)
    if is_top1_ptr is not None:
        tl.store(is_top1_ptr + row, (target_z >= maximum) & (target_z > before_target))


def row_statistics(
    logits_NV: Tensor,
    targets_N: Tensor,
    names: Collection[str],
    transform: LogitTransform = LogitTransform(),  # noqa: B008
) -> RowStatistics:
    """See `reference.row_statistics`."""
    if transform.multiplier <= 0:  # then the largest logit is not the likeliest
        return reference.row_statistics(logits_NV, targets_N, names, transform)
    N, V = logits_NV.shape
    places = reference.places_for(names, logits_NV)
    found = RowStatistics(*(places.get(name) for name in NAMES))
    if N and places:
        block = min(_BLOCK_V, next_power_of_2(V))
        warps = max(1, _WARPS * block // _BLOCK_V)
        with device_guard(logits_NV):
            _row_statistics_kernel[(N,)](
                logits_NV, targets_N.contiguous(), *found, V, *logits_NV.stride(), *transform,
                BLOCK_V=block, num_warps=warps,
            )  # fmt: skip
    return found
