"""Types of the implementations' functions, and the layouts that PyTorch's operators want.

Legend: B batch, S tokens of a sequence, H query heads, K key/value heads, G = H / K, d head size.
"""

import torch

Saved = tuple[torch.Tensor, ...]
"""What a forward keeps for its backward besides q, k, v and the output."""
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""dq, dk, dv: (B, S, heads, d), in any memory layout."""


def heads_first(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(B, S, heads, d) as (B, heads, S, d), or back; views."""
    return tuple(t.transpose(1, 2) for t in tensors)


def repeat_kv(x_BSKd: torch.Tensor, heads: int) -> torch.Tensor:
    """Keys or values for an operator without grouped heads: one for each of `heads` query heads."""
    kv_heads = x_BSKd.shape[2]
    if heads == kv_heads:
        return x_BSKd
    return x_BSKd.unsqueeze(3).expand(-1, -1, -1, heads // kv_heads, -1).flatten(2, 3)


def sum_kv(dx_BSHd: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """The gradient of what `repeat_kv` was given."""
    heads = dx_BSHd.shape[2]
    if heads == kv_heads:
        return dx_BSHd
    return dx_BSHd.unflatten(2, (kv_heads, heads // kv_heads)).sum(3)
