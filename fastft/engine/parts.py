"""What the engine reads from a Hugging Face decoder layer, and what a forward gives every layer.

`LayerParts` is the layer as it stands: frozen weights and adapters, which stay in their modules.  `StepContext` is
what one forward of the model tells its layers: positions, mask, attention.  `LayerCall` joins both for one call.
"""

from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import nn

from fastft.adapters.adapted import AdaptedLinear
from fastft.adapters.lora import read_linear
from fastft.backends import Backend
from fastft.kernels.activation import ActivationKind
from fastft.kernels.attention.library import Attention, Seen
from fastft.kernels.norm import Norm
from fastft.models.quantized import is_quantized
from fastft.models.spec import ACTIVATIONS, LayerSpec
from fastft.plan import Policy


class LayerParts(NamedTuple):
    """The tensors and constants of one decoder layer; what they are for is in `fastft.models.spec`."""

    input_norm: Norm
    post_attention_norm: Norm | None
    mlp_norm: Norm | None
    """None where the MLP reads what attention reads."""
    post_mlp_norm: Norm | None
    head_norms: tuple[Norm, Norm] | None
    qkv: tuple[AdaptedLinear, ...]
    """q, k and v, or one for all three."""
    o: AdaptedLinear
    gate_up: tuple[AdaptedLinear, ...]
    """Gate and up, or one for both, or up alone."""
    down: AdaptedLinear
    qkv_columns: tuple[int, int, int]
    """Heads × head size, of q, k and v."""
    gated: bool
    activation: ActivationKind
    head_dim: int
    scale: float
    """Of the attention scores."""
    softcap: float | None
    """Of the attention scores."""
    window: int | None
    """How many tokens a query sees, itself included."""
    rotary: bool
    """Whether q and k are rotated."""
    residual_multiplier: float

    @property
    def linears(self) -> tuple[AdaptedLinear, ...]:
        """The linear layers, in the order in which `backward_layer` returns their adapters' gradients."""
        return (*self.qkv, self.o, *self.gate_up, self.down)

    @property
    def adapters(self) -> list[torch.Tensor | None]:
        """What is trained of every linear layer in that order, four each: `AdaptedLinear.trained`."""
        return [trained for linear in self.linears for trained in linear.trained]

    @property
    def has_variants(self) -> bool:
        """Whether any adapter has to be resolved before the layer runs."""
        return any(linear.variant is not None for linear in self.linears)

    def map_linears(self, change: Callable[[AdaptedLinear], AdaptedLinear]) -> "LayerParts":
        """The same with every linear layer replaced by what `change` makes of it, in the order of `linears`."""
        return self._replace(
            qkv=tuple(map(change, self.qkv)),
            o=change(self.o),
            gate_up=tuple(map(change, self.gate_up)),
            down=change(self.down),
        )

    @property
    def frozen(self) -> list[torch.Tensor]:
        """What the backward reads in its modules once more, so that nobody may change it before; quantized weights
        aside, which stock's backward does not watch either."""
        norms = (self.input_norm, self.post_attention_norm, self.mlp_norm, self.post_mlp_norm, *(self.head_norms or ()))
        tensors: list[Any] = [t for norm in norms if norm is not None for t in (norm.weight_D, norm.bias_D)]
        for linear in self.linears:
            tensors += [linear.bias, None if is_quantized(linear.module) else linear.module.weight]
            tensors += [linear.number]
        return [t for t in tensors if t is not None and not t.is_inference()]

    @property
    def dtype(self) -> torch.dtype | None:
        """What linears and attention compute in, where that is not the residual stream's dtype."""
        return self.input_norm.dtype

    def computing_in(self, dtype: torch.dtype) -> "LayerParts":
        """The same layer whose linears and attention compute in `dtype`, while the residual stream keeps the norms'."""
        norm, mlp_norm = self.input_norm, self.mlp_norm
        of_norms = None if dtype == norm.weight_D.dtype else dtype
        return self._replace(
            input_norm=norm._replace(dtype=of_norms),
            mlp_norm=None if mlp_norm is None else mlp_norm._replace(dtype=of_norms),
        )

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
    mlp_chunk_tokens: int | None = None
    """About how many tokens the MLP takes at a time, where the policy does not save its gate; None for all."""
    backward_chunk_tokens: int | None = None
    """As many in the backward, where two tiles are enough for it: the forward's bits stay those of the whole."""


def read_parts(layer: nn.Module, spec: LayerSpec, index: int) -> LayerParts:
    """The parts of the decoder layer number `index`, for which `fastft.engine.support.why_no_layer` is None."""

    def at(path: str | None) -> Any:
        return None if path is None else attrgetter(path)(layer)

    def norm_at(path: str | None) -> Norm | None:
        return None if path is None else read_norm(at(path), spec)

    qkv, gate_up = (tuple(read_linear(at(path)) for path in paths) for paths in (spec.qkv, spec.gate_up))
    o, down = read_linear(at(spec.o)), read_linear(at(spec.down))
    head_dim: int = at(spec.attention).head_dim
    q_columns = o.module.in_features
    k_columns = qkv[1].module.out_features if len(qkv) == 3 else (qkv[0].module.out_features - q_columns) // 2  # type: ignore[operator]
    head_norms = None if spec.head_norms is None else tuple(read_norm(at(path), spec) for path in spec.head_norms)
    return LayerParts(
        input_norm=read_norm(at(spec.input_norm), spec),
        post_attention_norm=norm_at(spec.post_attention_norm),
        mlp_norm=norm_at(spec.mlp_norm),
        post_mlp_norm=norm_at(spec.post_mlp_norm),
        head_norms=head_norms,  # type: ignore[arg-type]
        qkv=qkv,
        o=o,
        gate_up=gate_up,
        down=down,
        qkv_columns=(q_columns, k_columns, k_columns),  # type: ignore[arg-type]
        gated=spec.gated,
        activation=ACTIVATIONS[type(at(spec.activation)).__name__],
        head_dim=head_dim,
        scale=head_dim**-0.5 if spec.scale is None else at(spec.scale),
        softcap=at(spec.softcap),
        window=window_of(at(spec.attention).config, spec, index),
        rotary=spec.rotary is None or bool(at(spec.rotary)),
        residual_multiplier=1.0 if spec.residual_multiplier is None else at(spec.residual_multiplier),
    )


def window_of(config: Any, spec: LayerSpec, index: int) -> int | None:
    """How many tokens a query of layer `index` sees: what stock reads when it makes its masks."""
    if spec.window is None or (spec.window == "layer" and config.layer_types[index] != "sliding_attention"):
        return None
    window: int | None = config.sliding_window
    return window


def read_norm(norm: Any, spec: LayerSpec) -> Norm:
    """The weights of a norm for which `fastft.engine.support.why_no_norm` is None."""
    eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    return Norm(spec.norm_kind, norm.weight, getattr(norm, "bias", None), eps)
