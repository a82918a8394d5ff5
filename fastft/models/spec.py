"""LayerSpec: what distinguishes the model families, as data.

The engine knows one decoder layer, and a spec says which of its parts a family has and where they are in Hugging Face's
modules.  With `norm` and `post` for norms (where there are any) and m for the residual multiplier:

    h  = norm(x)
    q, k, v = projections of h;  q, k = rotation(norm(q)), rotation(norm(k))  per head
    x₂ = x + m · post(o(attention(q, k, v)))
    h₂ = norm(x₂), or h where attention and MLP are parallel
    y  = x₂ + m · post(down(act(gate(h₂)) · up(h₂))), or down(act(up(h₂))) where there is no gate
"""

from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastft.kernels.activation import ActivationKind
    from fastft.kernels.norm import NormKind

ACTIVATIONS: "dict[str, ActivationKind]" = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
}
"""By the class of Hugging Face's (or PyTorch's) module."""


def _transformers_version() -> tuple[int, int]:
    """Major and minor; families change with them."""
    major, minor = version("transformers").split(".")[:2]
    return int(major), int(minor)


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """Where the parts of a decoder layer are, as attribute paths from the layer; None is a part that it does not have.

    Constants are read through paths too: what they hold may differ from layer to layer and from model to model.
    """

    family: str
    backbone: str = "model"
    """From the model with head: the decoder without it."""
    layers: str = "layers"
    """From the backbone, as `final_norm`."""
    final_norm: str = "norm"
    returns_tuple: bool = False
    """Whether a layer returns its output as the first of a tuple."""
    separates_documents: bool = True
    """Whether stock keeps packed documents, told by position ids, apart."""

    layer_class: str
    norm_class: str
    norm_kind: "NormKind" = "rms"

    input_norm: str = "input_layernorm"
    post_attention_norm: str | None = None
    mlp_norm: str | None = "post_attention_layernorm"
    """None where the MLP reads what attention reads."""
    post_mlp_norm: str | None = None
    head_norms: tuple[str, str] | None = None
    """Of each head of q and of k, before the rotation."""

    attention: str = "self_attn"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    """Three linears, or one whose output is q, k and v side by side."""
    o: str = "self_attn.o_proj"
    scale: str | None = "self_attn.scaling"
    """Of the scores; None for head size^-½."""
    softcap: str | None = None
    """Of the scores."""
    window: str | None = None
    """How many tokens a query sees, itself included."""
    rotary: str | None = None
    """Whether q and k are rotated; None for always."""

    mlp: str = "mlp"
    gated: bool = True
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """Two linears, one whose output is gate and up side by side, or one without a gate."""
    down: str = "mlp.down_proj"
    activation: str = "mlp.act_fn"

    residual_multiplier: str | None = None
    dropouts: tuple[str, ...] = ("self_attn.attention_dropout",)
    """Probabilities, or dropout modules, that the engine can only run at 0."""
    required: tuple[tuple[str, object, str], ...] = ()
    """Settings of the model's configuration that the engine needs: their name, their value, why not without it."""

    logit_divisor: str | None = None
    """A setting of the configuration: what the logits are divided by before the softmax."""
    logit_softcap: str | None = None
    """A setting of the configuration."""

    @property
    def norms(self) -> tuple[str, ...]:
        """All norms that a layer has."""
        paths = (self.input_norm, self.post_attention_norm, self.mlp_norm, self.post_mlp_norm, *(self.head_norms or ()))
        return tuple(path for path in paths if path is not None)

    @property
    def linears(self) -> tuple[str, ...]:
        """The linear layers in the engine's order."""
        return (*self.qkv, self.o, *self.gate_up, self.down)

    @property
    def targets(self) -> tuple[str, ...]:
        """The linear layers' own names: the modules that an adapter of the whole layer targets."""
        return tuple(path.rpartition(".")[2] for path in self.linears)


_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")


def _gemma(number: int, **more: object) -> LayerSpec:
    return LayerSpec(
        layer_class=f"Gemma{number}DecoderLayer",
        norm_class=f"Gemma{number}RMSNorm",
        norm_kind="rms_unit_offset",
        post_attention_norm="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        post_mlp_norm="post_feedforward_layernorm",
        window="self_attn.sliding_window",
        logit_softcap="final_logit_softcapping",
        **more,  # type: ignore[arg-type]
    )


SPECS: dict[str, LayerSpec] = {
    "llama": LayerSpec(family="llama", layer_class="LlamaDecoderLayer", norm_class="LlamaRMSNorm"),
    "mistral": LayerSpec(
        family="mistral",
        layer_class="MistralDecoderLayer",
        norm_class="MistralRMSNorm",
        window="self_attn.config.sliding_window",
    ),
    "qwen2": LayerSpec(
        family="qwen2",
        layer_class="Qwen2DecoderLayer",
        norm_class="Qwen2RMSNorm",
        window="self_attn.sliding_window",
    ),
    "qwen3": LayerSpec(
        family="qwen3",
        layer_class="Qwen3DecoderLayer",
        norm_class="Qwen3RMSNorm",
        head_norms=_HEAD_NORMS,
        window="self_attn.sliding_window",
    ),
    "gemma2": _gemma(2, family="gemma2", softcap="self_attn.attn_logit_softcapping"),
    # Its attention has a soft-cap in the configuration and does not apply it.
    "gemma3_text": _gemma(3, family="gemma3_text", head_norms=_HEAD_NORMS),
    "granite": LayerSpec(
        family="granite",
        layer_class="GraniteDecoderLayer",
        norm_class="GraniteRMSNorm",
        residual_multiplier="residual_multiplier",
        logit_divisor="logits_scaling",
    ),
    "phi3": LayerSpec(
        family="phi3",
        layer_class="Phi3DecoderLayer",
        norm_class="Phi3RMSNorm",
        qkv=("self_attn.qkv_proj",),
        window="self_attn.config.sliding_window",
        gate_up=("mlp.gate_up_proj",),
        activation="mlp.activation_fn",
        dropouts=("self_attn.attention_dropout", "resid_attn_dropout", "resid_mlp_dropout"),
    ),
    "smollm3": LayerSpec(
        family="smollm3",
        layer_class="SmolLM3DecoderLayer",
        norm_class="SmolLM3RMSNorm",
        window="self_attn.sliding_window",
        rotary="self_attn.use_rope",
    ),
    "falcon": LayerSpec(
        family="falcon",
        backbone="transformer",
        layers="h",
        final_norm="ln_f",
        returns_tuple=True,
        separates_documents=_transformers_version() >= (5, 24),
        layer_class="FalconDecoderLayer",
        norm_class="LayerNorm",
        norm_kind="layer",
        mlp_norm=None,
        attention="self_attention",
        qkv=("self_attention.query_key_value",),
        o="self_attention.dense",
        scale=None,
        gated=False,
        gate_up=("mlp.dense_h_to_4h",),
        down="mlp.dense_4h_to_h",
        activation="mlp.act",
        dropouts=("self_attention.attention_dropout", "hidden_dropout"),
        required=(
            ("alibi", False, "its positions are ALiBi's"),
            ("new_decoder_architecture", False, "its query_key_value is grouped by key/value head"),
            ("multi_query", True, "its query_key_value is grouped by head"),
            ("parallel_attn", True, "its MLP has a norm of its own"),
        ),
    ),
}
"""By Hugging Face's `model_type`."""
