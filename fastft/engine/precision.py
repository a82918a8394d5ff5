"""Which dtype is computed in: that of the activations, or what autocast asks for."""

import torch

_NARROW = {torch.float32: (torch.bfloat16, torch.float16)}
"""What autocast computes in beside a residual stream of a dtype."""


def compute_dtype(hidden_states: torch.Tensor) -> torch.dtype:
    """What a linear layer computes in on these activations: autocast's dtype, or theirs."""
    device = hidden_states.device.type
    if torch.is_autocast_enabled(device) and hidden_states.dtype != torch.float64:  # which autocast leaves alone
        return torch.get_autocast_dtype(device)
    return hidden_states.dtype


def why_mixed(dtype: torch.dtype, weight: torch.Tensor) -> str | None:
    """Why activations of this dtype are no residual stream for layers with such norms, or None.

    Autocast may compute in 16 bits between norms that keep the stream in fp32.
    """
    computed = compute_dtype(weight)
    if weight.dtype == dtype and computed in (dtype, *_NARROW.get(dtype, ())):
        return None
    return f"it computes in {computed} on {weight.dtype} norms, from {dtype}"
