"""What the engine reads from a Hugging Face decoder layer, and what a forward gives every layer.

`LayerParts` is the layer as it stands: frozen weights and adapters, which stay in their modules.  `StepContext` is
what one forward of the model tells its layers: positions, mask, attention.  `LayerCall` joins both for one call.
"""

from operator import attrgetter
from typing import NamedTuple

import torch
from torch import nn

from fastft.adapters.lora import AdaptedLinear, read_linear
from fastft.backends import Backend
from fastft.kernels.attention.library import Attention, Seen
from fastft.models.spec import LayerSpec
from fastft.plan import Policy


class LayerParts(NamedTuple):
    """The tensors and constants of one decoder layer."""

    input_norm_D: torch.Tensor
    input_eps: float
    mlp_norm_D: torch.Tensor
    mlp_eps: float
    qkv: tuple[AdaptedLinear, AdaptedLinear, AdaptedLinear]
    o: AdaptedLinear
    gate_up: tuple[AdaptedLinear, AdaptedLinear]
    down: AdaptedLinear
    head_dim: int
    scale: float
    """Of the attention scores."""

    @property
    def linears(self) -> tuple[AdaptedLinear, ...]:
        """The linear layers, in the order in which `backward_layer` returns their adapters' gradients."""
        return (*self.qkv, self.o, *self.gate_up, self.down)

    @property
    def adapters(self) -> list[torch.Tensor | None]:
        """A and B of every linear layer in that order; None where there is no adapter."""
        return [matrix for linear in self.linears for matrix in (linear.a, linear.b)]

    @property
    def has_dropout(self) -> bool:
        """Whether any adapter drops elements of its input now."""
        return any(linear.dropout > 0 for linear in self.linears)


class StepContext(NamedTuple):
    """What the layers of one forward share."""

    batch: int
    """B: sequences of the micro-batch."""
    tokens: int
    """B·S, padding included."""
    attention: Attention
    cos_Sd: torch.Tensor
    sin_Sd: torch.Tensor
    seen: Seen
    """What attention may see."""
    rows_R: torch.Tensor | None
    """Which of the B·S tokens are real, ascending (int64), where the others are right padding and worth leaving out:
    everything but attention then runs on R rows only, and the output of the others is zero.  None for all."""


class LayerCall(NamedTuple):
    """Everything about one call of one layer that is not differentiated."""

    ops: Backend
    parts: LayerParts
    context: StepContext
    policy: Policy
    seed: int
    """Of the dropout masks; a recomputation draws the same ones."""


def read_parts(layer: nn.Module, spec: LayerSpec) -> LayerParts:
    """The parts of a decoder layer for which `fastft.engine.support.why_no_layer` is None."""
    input_norm, mlp_norm = attrgetter(spec.input_norm, spec.mlp_norm)(layer)
    q, k, v, o, gate, up, down = (read_linear(module) for module in attrgetter(*spec.linears)(layer))
    attention = attrgetter(spec.o.rpartition(".")[0])(layer)
    return LayerParts(
        input_norm_D=input_norm.weight,
        input_eps=epsilon(input_norm),
        mlp_norm_D=mlp_norm.weight,
        mlp_eps=epsilon(mlp_norm),
        qkv=(q, k, v),
        o=o,
        gate_up=(gate, up),
        down=down,
        head_dim=attention.head_dim,
        scale=attention.scaling,
    )


def epsilon(norm: nn.Module) -> float:
    """What a norm adds to the mean of squares."""
    eps: float = norm.variance_epsilon  # type: ignore[assignment]
    return eps
