"""LoRA's dropout: every adapter of a group drops elements of the group's input by a mask of its own.

Masks are functions of a seed.  They are made in the forward and once more in the backward, and kept in between by
nobody.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Dropout(NamedTuple):
    """The operations of a backend; T tokens, I in, R rank of one adapter, ΣR of all side by side."""

    masks: "Callable[[Sequence[float], tuple[int, int], torch.dtype, torch.device, int], Any]"
    """Of the probabilities of a group's adapters, the input's shape, dtype and device, and a seed: what the others
    take as masks."""
    low_rank: "Callable[[Tensor, Tensor, Sequence[int], Any], Tensor]"
    """(mask ∘ x)·Aᵀ of all adapters side by side (T × ΣR), from x (T × I), their A, one below the other (ΣR × I),
    their ranks and masks."""
    a_gradients: "Callable[[Tensor, Tensor, Sequence[int], Any], Tensor]"
    """dlowᵀ·(mask ∘ x) of all adapters, one below the other (ΣR × I), from dlow (T × ΣR), x, their ranks and masks."""
    input_gradient: "Callable[[Tensor, Tensor, Sequence[int], Any], Tensor]"
    """Σ mask ∘ (dlow·A) over the adapters (T × I), from dlow, their A, ranks and masks."""


class Dropped(NamedTuple):
    """The masks of a group's adapters, and the backend that made them."""

    ops: Dropout
    masks: Any
