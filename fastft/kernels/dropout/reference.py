"""LoRA's dropout in plain PyTorch: masks that are written out, and products of what they leave."""

# T tokens, K columns of the input, R rank

from collections.abc import Sequence

import torch
from torch import Tensor

Masks = list[Tensor | None]
"""Of each adapter: 0 or 1 / (1 − p), T × K; None where nothing is dropped."""


def masks(
    probabilities: Sequence[float], shape: tuple[int, int], dtype: torch.dtype, device: torch.device, seed: int
) -> Masks:
    """Independent masks of `shape`, a function of `seed`; an element is dropped with its adapter's probability."""
    return [
        dropout_mask(shape, p, seed + index, dtype, device) if p > 0 else None for index, p in enumerate(probabilities)
    ]


def dropout_mask(shape: tuple[int, int], p: float, seed: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """0 with probability `p`, else 1 / (1 − p); a function of `seed`."""
    generator = torch.Generator(device).manual_seed(seed)
    mask = torch.empty(shape, dtype=dtype, device=device).bernoulli_(1.0 - p, generator=generator)
    return mask.div_(1.0 - p) if p < 1.0 else mask


def low_rank(x_TK: Tensor, a_RK: Tensor, ranks: Sequence[int], masks: Masks) -> Tensor:
    """See `Dropout.low_rank`."""
    of_each = zip(a_RK.split(list(ranks)), masks, strict=True)
    return torch.cat([torch.mm(_kept(x_TK, mask), a.t()) for a, mask in of_each], dim=1)


def a_gradients(dlow_TR: Tensor, x_TK: Tensor, ranks: Sequence[int], masks: Masks) -> Tensor:
    """See `Dropout.a_gradients`."""
    of_each = zip(dlow_TR.split(list(ranks), dim=1), masks, strict=True)
    return torch.cat([torch.mm(dlow.t(), _kept(x_TK, mask)) for dlow, mask in of_each])


def input_gradient(dlow_TR: Tensor, a_RK: Tensor, ranks: Sequence[int], masks: Masks) -> Tensor:
    """See `Dropout.input_gradient`."""
    of_each = zip(dlow_TR.split(list(ranks), dim=1), a_RK.split(list(ranks)), masks, strict=True)
    first, *others = [_kept(torch.mm(dlow, a), mask) for dlow, a, mask in of_each]
    for other in others:
        first.add_(other)
    return first


def _kept(x_TK: Tensor, mask_TK: Tensor | None) -> Tensor:
    return x_TK if mask_TK is None else x_TK * mask_TK
