"""Cross-entropy in Triton: the logits are read twice and their gradient is written in their place once.

Same name and signature as `reference.py`.  One program owns a row: an online softmax (Milakov and
Gimelshein, arXiv:1805.02867) over blocks of the vocabulary, then the gradient.
"""

# N labelled rows, V vocabulary

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastft.kernels.cross_entropy import LogitTransform
from fastft.kernels.cross_entropy.reference import scale_tensor
from fastft.kernels.launch import device_guard, next_power_of_2, warps_for

_MAX_BLOCK_V = 8192


@triton.jit
def _tanh(x):
    """Without cancellation near 0: a series there, 2·sigmoid(2x) − 1 elsewhere."""
    square = x * x
    series = x * (1.0 + square * (-0.33333334 + square * (0.13333334 + square * (-0.053968254 + square * 0.021869488))))
    return tl.where(tl.abs(x) < 0.25, series, 2.0 * tl.sigmoid(2.0 * x) - 1.0)


@triton.jit
def _transformed(logits, mask, multiplier, softcap):
    """z, what the softmax is taken of; −∞ outside the row."""
    z = logits * multiplier
    if softcap is not None:
        z = tl.where(mask, softcap * _tanh(z / softcap), float("-inf"))
    return z


@triton.jit
def _slope(z, multiplier, softcap):
    """dz / dlogits."""
    slope = multiplier
    if softcap is not None:
        slope = multiplier * (1.0 - (z / softcap) * (z / softcap))
    return slope


@triton.jit
def _cross_entropy_kernel(
    logits_ptr, targets_ptr, scale_ptr, loss_ptr, V, logits_stride_N, logits_stride_V, multiplier, softcap,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_stride_N
    lanes_V = tl.arange(0, BLOCK_V)
    lane_offsets_V = lanes_V.to(tl.int64) * logits_stride_V
    block_stride = tl.full((), BLOCK_V, tl.int64) * logits_stride_V

    target = tl.load(targets_ptr + row)
    # A target outside the vocabulary gives a NaN loss, never a read outside the row.
    target_exists = (target >= 0) & (target < V)
    target_logit = tl.load(row_ptr + target * logits_stride_V, mask=target_exists, other=float("nan")).to(tl.float32)
    target_z = _transformed(target_logit, True, multiplier, softcap)

    maximum = -3.4e38  # finite, so that a first block of −inf gives exp(−inf), not exp(−inf + inf)
    total = 0.0
    block_ptr = row_ptr
    for start in range(0, V, BLOCK_V):
        mask_V = start + lanes_V < V
        logits_V = tl.load(block_ptr + lane_offsets_V, mask=mask_V, other=float("-inf")).to(tl.float32)
        z_V = _transformed(logits_V, mask_V, multiplier, softcap)
        new_maximum = tl.maximum(maximum, tl.max(z_V, axis=0))
        total = total * tl.exp(maximum - new_maximum) + tl.sum(tl.exp(z_V - new_maximum), axis=0)
        maximum = new_maximum
        block_ptr += block_stride
    tl.store(loss_ptr + row, tl.log(total) - (target_z - maximum))

    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
        factor = scale / total
        blocks = tl.cdiv(V, BLOCK_V)
        # From the end back: the blocks read last are the likeliest to be in the L2 cache still.
        for step in range(0, blocks):
            block_ptr -= block_stride
            columns_V = (blocks - 1 - step) * BLOCK_V + lanes_V
            logits_V = tl.load(block_ptr + lane_offsets_V, mask=columns_V < V, other=float("-inf")).to(tl.float32)
            z_V = _transformed(logits_V, columns_V < V, multiplier, softcap)
            gradient_V = tl.exp(z_V - maximum) * factor
            gradient_V = tl.where(columns_V == target, gradient_V - scale, gradient_V) * _slope(
                z_V, multiplier, softcap
            )
            tl.store(block_ptr + lane_offsets_V, gradient_V, mask=columns_V < V)


def cross_entropy_(
    logits_NV: Tensor,
    targets_N: Tensor,
    scale: float | Tensor | None = None,
    transform: LogitTransform = LogitTransform(),  # noqa: B008
) -> Tensor:
    """`loss_N`; see `reference.cross_entropy_`.  A target outside the vocabulary gives a NaN loss."""
    N, V = logits_NV.shape
    loss_N = torch.empty((N,), dtype=torch.float32, device=logits_NV.device)
    if N:
        scale_1 = None if scale is None else scale_tensor(scale, logits_NV.device)
        block = min(_MAX_BLOCK_V, next_power_of_2(V))
        with device_guard(logits_NV):
            _cross_entropy_kernel[(N,)](
                logits_NV, targets_N.contiguous(), scale_1, loss_N, V, *logits_NV.stride(),
                transform.multiplier, transform.softcap, BLOCK_V=block, num_warps=warps_for(block),
            )  # fmt: skip
    return loss_N
