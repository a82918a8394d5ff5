"""LayerSpec: what distinguishes the model families, as data.

The engine knows one decoder layer; a spec says where its parts are in a Hugging Face module.  A family is
supported when its layer computes  x₂ = x + attention(norm(x)),  y = x₂ + down(silu(gate(h)) · up(h)),  h = norm(x₂).
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """Where the parts of a decoder layer are, as attribute paths from the layer."""

    family: str
    layer_class: str
    norm_class: str
    input_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    qkv: tuple[str, str, str] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    o: str = "self_attn.o_proj"
    gate_up: tuple[str, str] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"

    @property
    def linears(self) -> tuple[str, ...]:
        """The seven linear layers in the engine's order."""
        return (*self.qkv, self.o, *self.gate_up, self.down)


SPECS: dict[str, LayerSpec] = {
    "llama": LayerSpec(family="llama", layer_class="LlamaDecoderLayer", norm_class="LlamaRMSNorm"),
    "qwen2": LayerSpec(family="qwen2", layer_class="Qwen2DecoderLayer", norm_class="Qwen2RMSNorm"),
}
"""By Hugging Face's `model_type`."""
