"""What patched modules know: the settings that one model shares, and each module's own state."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from fastft.backends import Backend
from fastft.engine import optimizer_step
from fastft.engine.graphs import GraphMode
from fastft.engine.ledger import Ledger
from fastft.engine.runtime import Runtime
from fastft.models.spec import LayerSpec
from fastft.plan import Choices, Policy

STATE = "_fastft"
"""The attribute under which a patched module keeps its `ModuleState`."""


REPLACED = "its forward was replaced"
_SIZE_STEP = 64


class Placed(NamedTuple):
    """What is chosen when the size of a batch is known."""

    placement: list[Policy]
    loss_chunk_tokens: int
    mlp_chunk_tokens: int | None = None
    resident_layers: int = 0
    host_embedding: bool = False
    graphs: GraphMode = "auto"

    @classmethod
    def of(cls, choices: Choices) -> "Placed":
        """The part of a plan's choices that is about memory."""
        return cls(**{name: getattr(choices, name) for name in cls._fields})


@dataclass
class EngineSettings:
    """What every patched module of one model shares."""

    ops: Backend
    spec: LayerSpec
    ledger: Ledger
    placement: list[Policy]
    attention: str
    loss_chunk_tokens: int
    placement_is_fixed: bool
    """Whether the placement was chosen (a plan, the user), so that gradient checkpointing does not replace it."""
    choose_placement: Callable[[int, int], Placed] | None = None
    """From (B, S) to the placement, asked when a batch of a new size comes (S is rounded up to a multiple of 64); None
    where the placement is given."""
    chosen: dict[tuple[int, int, bool], Placed] = field(default_factory=dict)
    steps_before: int = field(default_factory=optimizer_step.steps)
    """Optimizer steps before this model was patched."""
    graphs: GraphMode = "auto"
    mlp_chunk_tokens: int | None = None
    resident_layers: int = 0
    """So many layers, the first ones, keep their quantized weights dense as well."""
    host_embedding: bool = False
    """Whether the input embedding stays in host memory."""
    runtime: Runtime = field(default_factory=Runtime)

    def place(self, batch: int, tokens: int) -> None:
        """Set the placement and the chunks for a micro-batch of `batch` rows of `tokens` tokens."""
        if self.choose_placement is None:
            return
        # Rounded up, so that ragged batches share an answer.  Asked again once an optimizer has its states: what stands
        # is then known.
        size = (batch, -(-tokens // _SIZE_STEP) * _SIZE_STEP)
        asked = (*size, optimizer_step.steps() > self.steps_before)
        if asked not in self.chosen:
            self.chosen[asked] = self.choose_placement(*size)
        placed = self.chosen[asked]
        if placed.placement != self.placement:
            self.runtime.expect_others()
        for name, value in placed._asdict().items():
            setattr(self, name, value)


@dataclass
class ModuleState:
    """What one patched module knows."""

    settings: EngineSettings
    name: str
    index: int = 0
    original: Callable[..., Any] | None = None
    """An instance's own `forward` from before the patch; None means the class's."""

    @property
    def replaced(self) -> str | None:
        """The reason not to run fused what somebody else had already given another `forward`."""
        return None if self.original is None else REPLACED


def why_replaced(module: nn.Module) -> str | None:
    """The reason in the ledger where somebody else gave this module, as an instance, another `forward` before."""
    return REPLACED if "forward" in module.__dict__ and STATE not in module.__dict__ else None


def state_of(module: nn.Module) -> ModuleState:
    """The state of a patched module."""
    state: ModuleState = module.__dict__[STATE]
    return state


def policy_of(layer: nn.Module) -> Policy:
    """What a patched layer saves: as placed; where that is left open, `full` if gradient checkpointing is on."""
    state = state_of(layer)
    if layer.gradient_checkpointing and not state.settings.placement_is_fixed:
        return "full"
    return state.settings.placement[state.index]


def original_forward(module: nn.Module) -> Callable[..., Any]:
    """The `forward` that stood before the patch, bound to `module`."""
    original = state_of(module).original
    return original if original is not None else type(module).forward.__get__(module)


def compute_dtype(hidden_states: torch.Tensor) -> torch.dtype:
    """What a linear layer computes in on these activations: autocast's dtype, or theirs."""
    device = hidden_states.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden_states.dtype
