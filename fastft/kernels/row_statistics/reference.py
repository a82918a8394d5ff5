"""Statistics of rows of logits in plain PyTorch; the logits are upcast to fp32."""

# N rows, V vocabulary, n the rows of a block

from collections.abc import Collection

import torch
from torch import Tensor

from fastft.kernels.cross_entropy import LogitTransform
from fastft.kernels.cross_entropy.reference import BLOCK_ELEMENTS, transformed
from fastft.kernels.row_statistics import NAMES, RowStatistics


def row_statistics(
    logits_NV: Tensor,
    targets_N: Tensor,
    names: Collection[str],
    transform: LogitTransform = LogitTransform(),  # noqa: B008
) -> RowStatistics:
    """The statistics called `names` of each row.

    Args:
        logits_NV: fp32, bf16 or fp16, left as they are; N may be 0.
        targets_N: int64, each from 0 to V−1.
        names: of `NAMES`.
        transform: what comes between the head and the softmax.
    """
    N, V = logits_NV.shape
    found = places_for(names, logits_NV)
    rows = max(1, BLOCK_ELEMENTS.get(logits_NV.device.type, 2**26) // V)
    for start in range(0, N, rows):
        part = slice(start, start + rows)
        for name, value_n in _block(logits_NV[part], targets_N[part].unsqueeze(1), names, transform).items():
            found[name][part] = value_n
    return RowStatistics(*(found.get(name) for name in NAMES))


def places_for(names: Collection[str], logits_NV: Tensor) -> dict[str, Tensor]:
    """Where each statistic of the rows goes."""
    return {
        name: torch.empty(
            (len(logits_NV),), dtype=torch.bool if name == "is_top1" else torch.float32, device=logits_NV.device
        )
        for name in names
    }


def _block(
    logits_nV: Tensor, targets_n1: Tensor, names: Collection[str], transform: LogitTransform
) -> dict[str, Tensor]:
    z_nV = transformed(logits_nV, transform, needs_slope=False)[0].to(torch.float32)
    found = {}
    if "mean_logits" in names:
        found["mean_logits"] = z_nV.mean(-1)
    maximum_n1 = z_nV.amax(-1, keepdim=True)
    if "is_top1" in names:
        columns_V = torch.arange(z_nV.shape[1], device=z_nV.device)
        earlier_n = ((z_nV == maximum_n1) & (columns_V < targets_n1)).any(-1)
        found["is_top1"] = (z_nV.gather(1, targets_n1) == maximum_n1).squeeze(1) & ~earlier_n
    if "entropy" in names or "log_sum_sq_probs" in names:
        below_nV = z_nV - maximum_n1
        exp_nV = below_nV.exp()
        total_n = exp_nV.sum(-1)
        if "entropy" in names:
            # Where p is 0, z may be −∞.
            found["entropy"] = total_n.log() - (exp_nV * below_nV.clamp(min=-1e30)).sum(-1) / total_n
        if "log_sum_sq_probs" in names:
            found["log_sum_sq_probs"] = exp_nV.square_().sum(-1).log() - 2 * total_n.log()
    return found


def entropy_gradient(
    logits_NV: Tensor,
    entropy_N: Tensor,
    factor_N: Tensor,
    transform: LogitTransform = LogitTransform(),  # noqa: B008
) -> Tensor:
    """The gradient (N × V, dtype of the logits) of `Σ factor · entropy`, `−factor · p · (log p + entropy) · slope`.

    Source: ∂H/∂z_j = −p_j·(log p_j + H), by differentiating H = log Σ exp(z) − Σ p·z.
    """
    gradient_NV = torch.empty_like(logits_NV)
    rows = max(1, BLOCK_ELEMENTS.get(logits_NV.device.type, 2**26) // logits_NV.shape[1])
    for start in range(0, len(logits_NV), rows):
        part = slice(start, start + rows)
        z_nV, slope_nV = transformed(logits_NV[part], transform, needs_slope=True)
        log_p_nV = z_nV.to(torch.float32).log_softmax(-1)
        p_nV = log_p_nV.exp()
        work_nV = log_p_nV.clamp_(min=-1e30).add_(entropy_N[part].unsqueeze(1)).mul_(p_nV)
        work_nV.mul_(-factor_N[part].unsqueeze(1))
        gradient_NV[part] = work_nV if slope_nV is None else work_nV.mul_(slope_nV)
    return gradient_NV
