"""What a decoder layer makes on its way, and what each placement policy keeps of that for the backward.

Legend: T tokens.
"""

from typing import NamedTuple

import torch

from fastft.plan import Policy


class Activations(NamedTuple):
    """The intermediates of one layer; None where the policy did not save one, or the layer has none."""

    x: torch.Tensor
    rstd1: torch.Tensor | None = None
    h1: torch.Tensor | None = None
    q_in: torch.Tensor | None = None
    """What the norm of the query heads takes, or an adapter reads; None without, as for k_in, o and down."""
    q_rstd: torch.Tensor | None = None
    k_in: torch.Tensor | None = None
    k_rstd: torch.Tensor | None = None
    q: torch.Tensor | None = None
    """As attention takes it: normalised and rotated."""
    k: torch.Tensor | None = None
    v: torch.Tensor | None = None
    low_qkv: torch.Tensor | None = None
    attended: torch.Tensor | None = None
    low_o: torch.Tensor | None = None
    o: torch.Tensor | None = None
    """What the norm behind attention takes, or an adapter reads."""
    o_rstd: torch.Tensor | None = None
    x2: torch.Tensor | None = None
    rstd2: torch.Tensor | None = None
    h2: torch.Tensor | None = None
    gate: torch.Tensor | None = None
    """Where there is no gate: the activation's input.  Without their adapters' terms where the activation adds them."""
    up: torch.Tensor | None = None
    low_gate_up: torch.Tensor | None = None
    low_down: torch.Tensor | None = None
    down: torch.Tensor | None = None
    """What the norm behind the MLP takes, or an adapter reads."""
    down_rstd: torch.Tensor | None = None


# Narrow ones are saved always: they weigh little, and to make them again is to read all that they are made of.
_FULL = frozenset({"x", "low_qkv", "low_o", "low_gate_up", "low_down"})
_MLP = _FULL | {"rstd1", "q_in", "k_in", "q", "k", "v", "attended", "o", "x2", "rstd2", "down", "down_rstd"}
_LIGHT = _MLP | {"gate", "up"}
_KEEP = frozenset(Activations._fields)
SAVED: dict[Policy, frozenset[str]] = {
    "keep": _KEEP,
    "light": _LIGHT,
    "mlp": _MLP,
    "full": _FULL,
    "offload_mlp": _MLP,
    "offload": _FULL,
}
"""Which intermediates each policy saves.  Attention's own statistics go with `attended`."""


class Saved(NamedTuple):
    """What one layer keeps for its backward."""

    made: Activations
    attention: tuple[torch.Tensor, ...]
    """Attention's own statistics."""
    of_variants: tuple[torch.Tensor | None, ...] = ()
    """What each linear layer keeps of resolving its adapter; nothing where all are plain LoRA."""
