"""Clipping by the norm of all adapter gradients, which lie in one buffer: a few launches instead of hundreds."""

from collections.abc import Sequence

import torch

from fastft.engine.bank import bank_of


def clip_gradients_(parameters: Sequence[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
    """What `torch.nn.utils.clip_grad_norm_` does, with the same result but for the order of a sum.

    Args:
        parameters: those whose gradients count.
        max_norm: gradients are scaled down to this norm; infinite for none.

    Returns:
        The norm before clipping, a scalar on the device; nothing waits for it.
    """
    trained = [p for p in parameters if p.grad is not None]
    bank = bank_of(trained[0]) if trained else None
    buffer_N = None
    if bank is not None and bank.holds() and {id(p) for p in trained} == {id(p) for p in bank.parameters}:
        buffer_N = bank.gradients_in_one()
    if buffer_N is None:
        return torch.nn.utils.clip_grad_norm_(trained, max_norm)
    norm = torch.linalg.vector_norm(buffer_N)
    if max_norm != float("inf"):
        # As PyTorch does: the 1e-6 keeps a norm of zero from dividing, and nothing is scaled up.
        buffer_N.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
