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
from typing import TYPE_CHECKING, Any, Literal

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
    module: str
    """The Python module of transformers that defines the family's classes."""
    backbone: str = "model"
    """From the model with head: the decoder without it."""
    embedding: str = "embed_tokens"
    """From the backbone, as all up to `final_norm`."""
    embedding_multiplier: str | None = None
    """What the backbone multiplies the embeddings by."""
    rotary_embedding: str = "rotary_emb"
    rotary_by_layer_type: bool = False
    """Whether there is a table of angles for each of the configuration's `layer_types`."""
    layers: str = "layers"
    final_norm: str = "norm"
    counts_layers: bool = True
    """Whether stock's loop visits as many layers as the configuration says, not all that there are."""
    returns_tuple: bool = False
    """Whether a layer returns its output as the first of a tuple."""
    separates_documents: bool = True
    """Whether stock keeps packed documents, told by position ids, apart."""

    layer_class: str
    backbone_class: str
    model_class: str
    """With the head."""
    norm_class: str
    norm_module: str | None = None
    """Where the norm's class is defined; None is `module`."""
    norm_kind: "NormKind" = "rms"
    attention_class: str
    mlp_class: str
    rotary_class: str
    backbone_output: str = "BaseModelOutputWithPast"
    """A class of `transformers.modeling_outputs`, as `model_output`."""
    model_output: str = "CausalLMOutputWithPast"

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
    window: Literal["layer", "model"] | None = None
    """Whose `sliding_window` of the configuration holds, how many tokens a query sees, itself included: of the layers
    whose `layer_types` says so, or of all."""
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
    required: tuple[tuple[str, tuple[object, ...], str], ...] = ()
    """Settings of the model's configuration that the engine needs: their name, their values, why not without."""

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


def _spec(family: str, prefix: str, **more: Any) -> LayerSpec:
    """A family whose classes have the usual names."""
    package = more.pop("package", family)
    named = {
        "layer_class": "DecoderLayer", "backbone_class": "Model", "model_class": "ForCausalLM", "norm_class": "RMSNorm",
        "attention_class": "Attention", "mlp_class": "MLP", "rotary_class": "RotaryEmbedding",
    }  # fmt: skip
    classes = {name: f"{prefix}{ending}" for name, ending in named.items()}
    return LayerSpec(family=family, module=f"transformers.models.{package}.modeling_{package}", **{**classes, **more})


def _gemma(family: str, number: int, **more: Any) -> LayerSpec:
    return _spec(
        family,
        f"Gemma{number}",
        package=f"gemma{number}",
        norm_kind="rms_unit_offset",
        post_attention_norm="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        post_mlp_norm="post_feedforward_layernorm",
        window="layer",
        logit_softcap="final_logit_softcapping",
        **more,
    )


SPECS: dict[str, LayerSpec] = {
    "llama": _spec(
        "llama",
        "Llama",
    ),
    "mistral": _spec(
        "mistral",
        "Mistral",
        window="model",
    ),
    "qwen2": _spec(
        "qwen2",
        "Qwen2",
        window="layer",
    ),
    "qwen3": _spec(
        "qwen3",
        "Qwen3",
        head_norms=_HEAD_NORMS,
        window="layer",
    ),
    "gemma2": _gemma("gemma2", 2, softcap="self_attn.attn_logit_softcapping"),
    # Its attention has a soft-cap in the configuration and does not apply it.
    "gemma3_text": _gemma(
        "gemma3_text",
        3,
        backbone_class="Gemma3TextModel",
        head_norms=_HEAD_NORMS,
        rotary_by_layer_type=True,
        required=(("use_bidirectional_attention", (False, None), "its attention looks to both sides"),),
    ),
    "granite": _spec(
        "granite",
        "Granite",
        embedding_multiplier="embedding_multiplier",
        residual_multiplier="residual_multiplier",
        logit_divisor="logits_scaling",
    ),
    "phi3": _spec(
        "phi3",
        "Phi3",
        qkv=("self_attn.qkv_proj",),
        window="model",
        gate_up=("mlp.gate_up_proj",),
        activation="mlp.activation_fn",
        dropouts=("self_attn.attention_dropout", "resid_attn_dropout", "resid_mlp_dropout"),
    ),
    "smollm3": _spec(
        "smollm3",
        "SmolLM3",
        window="layer",
        rotary="self_attn.use_rope",
    ),
    "falcon": _spec(
        "falcon",
        "Falcon",
        backbone="transformer",
        embedding="word_embeddings",
        layers="h",
        counts_layers=False,
        final_norm="ln_f",
        returns_tuple=True,
        separates_documents=_transformers_version() >= (5, 24),
        norm_class="LayerNorm",
        norm_module="torch.nn.modules.normalization",
        norm_kind="layer",
        backbone_output="BaseModelOutputWithPastAndCrossAttentions",
        model_output="CausalLMOutputWithCrossAttentions",
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
            ("alibi", (False,), "its positions are ALiBi's"),
            ("new_decoder_architecture", (False,), "its query_key_value is grouped by key/value head"),
            ("multi_query", (True,), "its query_key_value is grouped by head"),
            ("parallel_attn", (True,), "its MLP has a norm of its own"),
        ),
    ),
}
"""By Hugging Face's `model_type`."""
