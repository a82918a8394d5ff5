"""Cross-entropy in plain PyTorch.

Source of the formula and of the rounding: `ForCausalLMLoss` in transformers' `loss_utils.py`.  Logits are
upcast to fp32; the gradient is cast back to their dtype.  A soft-cap is `Gemma2ForCausalLM`'s; transformers rounds each
of its steps to the logits' dtype, here all of it is fp32.
"""

# N labelled rows, V vocabulary

import torch
from torch import Tensor

from fastft.kernels.cross_entropy import LogitTransform

# Rows are taken in blocks: on a CPU so few that all passes over a block stay in the cache, on a GPU enough
# to fill it while the fp32 copy of 16-bit logits stays small.
BLOCK_ELEMENTS = {"cpu": 2**19, "cuda": 2**26}


def scale_tensor(scale: float | Tensor, device: torch.device) -> Tensor:
    """`scale` as one fp32 element on `device`, without waiting for the device if it is there or a number."""
    if isinstance(scale, Tensor):
        return scale.detach().to(device=device, dtype=torch.float32).reshape(1)
    return torch.full((1,), scale, dtype=torch.float32, device=device)


def cross_entropy_(
    logits_NV: Tensor,
    targets_N: Tensor,
    scale: float | Tensor | None = None,
    transform: LogitTransform = LogitTransform(),  # noqa: B008
) -> tuple[Tensor, Tensor | None]:
    """The loss of each row, and its gradient in the logits' place.

    Args:
        logits_NV: fp32, bf16 or fp16; N may be 0.  Overwritten by their gradient times the divisor,
            `divisor · scale · (softmax − onehot) · transform'(logits)`, if there is a scale, else left as they are.
        targets_N: int64, each from 0 to V−1; rows without a target are not passed.
        scale: a number or a one-element tensor on the logits' device: what the loss's sum is multiplied by,
            1 ÷ the global count of labels.
        transform: what comes between the head and the softmax.

    Returns:
        `loss_N = logsumexp(z) − z[target]` with `z = transform(logits)`, fp32, unscaled; and `divisor_N`, fp32, by
        which the caller divides the rows, or what is linear in them: whatever suits the implementation, here 1.
        None without a scale.
    """
    N, V = logits_NV.shape
    loss_N = torch.empty((N,), dtype=torch.float32, device=logits_NV.device)
    divisor_N = None if scale is None else torch.ones_like(loss_N)
    if N == 0:
        return loss_N, divisor_N
    scale_1 = None if scale is None else scale_tensor(scale, logits_NV.device)
    rows = max(1, BLOCK_ELEMENTS.get(logits_NV.device.type, 2**26) // V)
    for logits_nV, targets_n, loss_n in zip(
        logits_NV.split(rows), targets_N.split(rows), loss_N.split(rows), strict=True
    ):
        _block(logits_nV, targets_n.unsqueeze(1), scale_1, loss_n, transform)
    return loss_N, divisor_N


def _block(
    logits_nV: Tensor, targets_n1: Tensor, scale_1: Tensor | None, loss_n: Tensor, transform: LogitTransform
) -> None:
    z_nV, slope_nV = transformed(logits_nV, transform, needs_slope=scale_1 is not None)
    in_place = scale_1 is not None and z_nV.dtype == torch.float32
    maximum_n1 = z_nV.amax(-1, keepdim=True)
    # The subtraction of two 16-bit numbers would be rounded; of one and an fp32 number it is not.
    work_nV = z_nV.sub_(maximum_n1) if in_place else torch.sub(z_nV, maximum_n1.to(torch.float32))
    target_n1 = work_nV.gather(1, targets_n1)
    # Of all but the target: that is what 1 − p is made of, and of a confident p it would be lost in rounding.
    rest_n1 = work_nV.exp_().scatter_(1, targets_n1, 0.0).sum(-1, keepdim=True)
    total_n1 = rest_n1 + target_n1.exp()
    torch.sub(total_n1.log(), target_n1, out=loss_n.unsqueeze(1))
    if scale_1 is None:
        return
    factor_n1 = scale_1 / total_n1
    work_nV.mul_(factor_n1).scatter_(1, targets_n1, -rest_n1 * factor_n1)
    if slope_nV is not None:
        work_nV.mul_(slope_nV)
    if work_nV is not logits_nV:
        logits_nV.copy_(work_nV)


def transformed(
    logits_nV: Tensor, transform: LogitTransform, *, needs_slope: bool
) -> tuple[Tensor, Tensor | float | None]:
    """z, new and in fp32 unless it is the logits themselves, and dz / dlogits (None for 1)."""
    multiplier, softcap, temperature = transform
    if softcap is None:
        factor = multiplier / temperature
        return (logits_nV, None) if factor == 1.0 else (logits_nV.to(torch.float32) * factor, factor)
    tanh_nV = (logits_nV.to(torch.float32) * (multiplier / softcap)).tanh_()
    slope_nV = tanh_nV.square().neg_().add_(1.0).mul_(multiplier / temperature) if needs_slope else None
    return tanh_nV.mul_(softcap / temperature), slope_nV
