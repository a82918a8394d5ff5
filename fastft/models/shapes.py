"""ModelShape: the sizes of a model, without its weights.

Speed and memory do not depend on the values of the weights, so a shape is all that tuning needs: a plan can
be made before the model is downloaded, and models of equal shape share it.
"""

from dataclasses import asdict, dataclass
from typing import Any

from fastft.errors import ModelError, unknown_choice

SUPPORTED_FAMILIES = ("llama", "qwen2")


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a decoder-only model, in elements."""

    family: str
    """Hugging Face's `model_type`."""
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied_embeddings: bool
    qkv_bias: bool
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    max_positions: int = 8192

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return asdict(self)

    def sizes(self) -> dict[str, Any]:
        """What speed and memory depend on: everything but constants of the arithmetic."""
        constants = {"rope_theta", "rms_norm_eps", "max_positions"}
        return {name: value for name, value in asdict(self).items() if name not in constants}

    @property
    def linear_sizes(self) -> dict[str, tuple[int, int]]:
        """(in, out) of each linear layer of one decoder layer."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, q),
            "k_proj": (self.hidden, kv),
            "v_proj": (self.hidden, kv),
            "o_proj": (q, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer: linears, biases and the two norms."""
        weights = sum(i * o for i, o in self.linear_sizes.values())
        biases = (self.heads + 2 * self.kv_heads) * self.head_dim if self.qkv_bias else 0
        return weights + biases + 2 * self.hidden

    @property
    def parameters(self) -> int:
        """Parameters of the model; tied embeddings count once."""
        embeddings = self.vocabulary * self.hidden * (1 if self.tied_embeddings else 2)
        return self.layers * self.layer_parameters + embeddings + self.hidden

    def lora_parameters(self, rank: int, targets: tuple[str, ...]) -> int:
        """Trainable parameters of a LoRA of `rank` on `targets` in every layer."""
        sizes = self.linear_sizes
        return self.layers * sum(rank * sum(sizes[name]) for name in targets if name in sizes)

    def to_config(self) -> Any:
        """The Hugging Face configuration of this shape."""
        import transformers

        config_class = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}[self.family]
        return config_class(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=self.max_positions,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            rms_norm_eps=self.rms_norm_eps,
            tie_word_embeddings=self.tied_embeddings,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=None,
            **({"head_dim": self.head_dim} if self.family == "llama" else {}),
        )


def shape_of(config: Any) -> ModelShape:
    """The shape of a Hugging Face configuration.

    Raises:
        ModelError: the family has no layer specification.
    """
    family = getattr(config, "model_type", "unknown")
    if family not in SUPPORTED_FAMILIES:
        raise ModelError(
            "the model type is not supported",
            got=family,
            allowed=SUPPORTED_FAMILIES,
            fix="choose backend peft, which trains any model that PEFT knows",
        )
    heads = config.num_attention_heads
    rope = getattr(config, "rope_parameters", None) or {}
    return ModelShape(
        family=family,
        vocabulary=config.vocab_size,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        tied_embeddings=bool(config.tie_word_embeddings),
        qkv_bias=family == "qwen2" or bool(getattr(config, "attention_bias", False)),
        rope_theta=float(rope.get("rope_theta", 10000.0)),
        rms_norm_eps=config.rms_norm_eps,
        max_positions=config.max_position_embeddings,
    )


def _llama(
    vocabulary: int, hidden: int, intermediate: int, layers: int, heads: int, kv: int, **more: Any
) -> ModelShape:
    sizes = {"head_dim": hidden // heads, "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "tied_embeddings": False}
    return ModelShape(
        family="llama", vocabulary=vocabulary, hidden=hidden, intermediate=intermediate, layers=layers, heads=heads,
        kv_heads=kv, qkv_bias=False, **{**sizes, **more},
    )  # fmt: skip


def _qwen2(vocabulary: int, hidden: int, intermediate: int, layers: int, heads: int, kv: int, tied: bool) -> ModelShape:
    return ModelShape(
        family="qwen2", vocabulary=vocabulary, hidden=hidden, intermediate=intermediate, layers=layers, heads=heads,
        kv_heads=kv, head_dim=hidden // heads, tied_embeddings=tied, qkv_bias=True, rope_theta=1e6,
        rms_norm_eps=1e-6, max_positions=32768,
    )  # fmt: skip


SHAPES: dict[str, ModelShape] = {
    "llama-3-8b": _llama(128256, 4096, 14336, 32, 32, 8),
    "llama-3.2-1b": _llama(128256, 2048, 8192, 16, 32, 8, tied_embeddings=True),
    "llama-3.2-3b": _llama(128256, 3072, 8192, 28, 24, 8, tied_embeddings=True),
    "qwen2-0.5b": _qwen2(151936, 896, 4864, 24, 14, 2, True),
    "qwen2-1.5b": _qwen2(151936, 1536, 8960, 28, 12, 2, True),
    "qwen2-7b": _qwen2(152064, 3584, 18944, 28, 28, 4, False),
    # Small enough for tests and for looking at the tool on a laptop.
    "toy-llama": _llama(512, 64, 172, 3, 4, 2, rope_theta=10000.0, tied_embeddings=True),
    "toy-qwen2": _qwen2(512, 64, 172, 3, 4, 2, True),
}
"""The shipped shapes, each from the model's published configuration."""


def shipped_shape(name: str) -> ModelShape:
    """The shape called `name`.

    Raises:
        ModelError: no such shape.
    """
    if name not in SHAPES:
        raise unknown_choice("shape", name, SHAPES, ModelError)
    return SHAPES[name]
