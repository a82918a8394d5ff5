"""ModelShape: the sizes of a model, without its weights.

Speed and memory do not depend on the values of the weights, so a shape is all that tuning needs: a plan can
be made before the model is downloaded, and models of equal shape share it.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from fastft.errors import ModelError, unknown_choice
from fastft.models.spec import SPECS, LayerSpec

SUPPORTED_FAMILIES = tuple(SPECS)

_CONFIGURED: dict[str, tuple[str, ...]] = {
    "gemma2": ("attn_logit_softcapping", "final_logit_softcapping", "layer_types", "query_pre_attn_scalar"),
    "gemma3_text": ("final_logit_softcapping", "layer_types", "query_pre_attn_scalar"),
    "granite": ("attention_multiplier", "embedding_multiplier", "logits_scaling", "residual_multiplier"),
    "qwen2": ("layer_types",),
    "qwen3": ("layer_types",),
    "smollm3": ("layer_types", "no_rope_layers"),
}
"""Settings of a family's configuration that `ModelShape.settings` keeps; for `layer_types` only with a window."""


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
    window: int | None = None
    """How many tokens a query sees, itself included, in the layers with a sliding window."""
    rope_theta: float = 10000.0
    rotary_fraction: float = 1.0
    """The part of each head that is rotated."""
    rms_norm_eps: float = 1e-6
    """Of LayerNorms too."""
    max_positions: int = 8192
    settings: dict[str, Any] = field(default_factory=dict, hash=False)
    """What else the family's configuration says: multipliers, soft-caps, the layers' kinds."""

    def __post_init__(self) -> None:
        # A model made shorter by `replace` keeps the first layers' kinds.
        cut = {
            name: kinds[: self.layers] if isinstance(kinds, list) else kinds for name, kinds in self.settings.items()
        }
        object.__setattr__(self, "settings", cut)

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return asdict(self)

    def sizes(self) -> dict[str, Any]:
        """What speed and memory depend on: everything but constants of the arithmetic."""
        constants = {"rope_theta", "rotary_fraction", "rms_norm_eps", "max_positions", "settings"}
        sizes = {name: value for name, value in asdict(self).items() if name not in constants}
        if "layer_types" in self.settings:
            sizes["windowed_layers"] = self.settings["layer_types"].count("sliding_attention")
        return sizes

    @property
    def spec(self) -> LayerSpec:
        """What the family's layers are made of."""
        return SPECS[self.family]

    @property
    def linear_sizes(self) -> dict[str, tuple[int, int]]:
        """(in, out) of each linear layer of one decoder layer, in the engine's order."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        qkv = (q, kv, kv) if len(self.spec.qkv) == 3 else (q + 2 * kv,)
        mlp = 1 + self.spec.gated
        gate_up = (self.intermediate,) * mlp if len(self.spec.gate_up) == mlp else (mlp * self.intermediate,)
        outs = (*qkv, self.hidden, *gate_up, self.hidden)
        ins = (*[self.hidden] * len(qkv), q, *[self.hidden] * len(gate_up), self.intermediate)
        return dict(zip(self.spec.targets, zip(ins, outs, strict=True), strict=True))

    @property
    def linear_weights(self) -> int:
        """Weights of the linear layers of one decoder layer."""
        return sum(size_in * size_out for size_in, size_out in self.linear_sizes.values())

    @property
    def qkv_names(self) -> tuple[str, ...]:
        """Those of `linear_sizes` that make q, k and v."""
        return self.spec.targets[: len(self.spec.qkv)]

    @property
    def gate_up_names(self) -> tuple[str, ...]:
        """Those of `linear_sizes` that make the activation's inputs."""
        return self.spec.targets[-1 - len(self.spec.gate_up) : -1]

    @property
    def norm_parameters(self) -> int:
        """Parameters of one norm over the hidden size."""
        return self.hidden * (2 if self.spec.norm_kind == "layer" else 1)

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer: linears, biases and norms."""
        biases = (self.heads + 2 * self.kv_heads) * self.head_dim if self.qkv_bias else 0
        head_norms = 0 if self.spec.head_norms is None else len(self.spec.head_norms)
        norms = (len(self.spec.norms) - head_norms) * self.norm_parameters + head_norms * self.head_dim
        return self.linear_weights + biases + norms

    @property
    def parameters(self) -> int:
        """Parameters of the model; tied embeddings count once."""
        embeddings = self.vocabulary * self.hidden * (1 if self.tied_embeddings else 2)
        return self.layers * self.layer_parameters + embeddings + self.norm_parameters

    def lora_parameters(self, rank: int, targets: tuple[str, ...]) -> int:
        """Trainable parameters of a LoRA of `rank` on `targets` in every layer."""
        sizes = self.linear_sizes
        return self.layers * sum(rank * sum(sizes[name]) for name in targets if name in sizes)

    def to_config(self) -> Any:
        """The Hugging Face configuration of this shape."""
        from transformers import AutoConfig

        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": self.rope_theta}
        sizes: dict[str, Any] = {
            "intermediate_size": self.intermediate,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": self.rms_norm_eps,
        }
        if self.family == "gemma3_text":
            rope = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
        elif self.family == "phi3":
            rope["partial_rotary_factor"] = self.rotary_fraction
        elif self.family == "falcon":
            sizes = {
                "ffn_hidden_size": self.intermediate,
                "num_kv_heads": self.kv_heads,
                "layer_norm_epsilon": self.rms_norm_eps,
            }
        # The others derive it from the hidden size.
        if self.family in ("llama", "mistral", "qwen3", "gemma2", "gemma3_text"):
            sizes["head_dim"] = self.head_dim
        if self.spec.window is not None:
            sizes["sliding_window"] = self.window
        if self.family in ("qwen2", "qwen3", "smollm3"):
            sizes["use_sliding_window"] = self.window is not None
        return AutoConfig.for_model(
            self.family,
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            max_position_embeddings=self.max_positions,
            rope_parameters=rope,
            tie_word_embeddings=self.tied_embeddings,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=None,
            **sizes,
            **self.settings,
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

    def first(*names: str) -> Any:
        return next((value for name in names if (value := getattr(config, name, None)) is not None), None)

    heads = config.num_attention_heads
    kv_heads = first("num_key_value_heads", "num_kv_heads") or heads
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        kv_heads = 1
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention") or rope
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    settings = {name: getattr(config, name) for name in _CONFIGURED.get(family, ())}
    if window is None:
        settings.pop("layer_types", None)
    return ModelShape(
        family=family,
        vocabulary=config.vocab_size,
        hidden=config.hidden_size,
        intermediate=first("intermediate_size", "ffn_hidden_size"),
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=first("head_dim") or config.hidden_size // heads,
        tied_embeddings=bool(config.tie_word_embeddings),
        qkv_bias=family == "qwen2" or bool(getattr(config, "attention_bias", False)),
        window=window if SPECS[family].window is not None else None,
        rope_theta=float(rope.get("rope_theta", 10000.0)),
        rotary_fraction=float(rope.get("partial_rotary_factor", 1.0)),
        rms_norm_eps=first("rms_norm_eps", "layer_norm_epsilon"),
        max_positions=config.max_position_embeddings,
        settings=settings,
    )


def _shape(
    family: str, vocabulary: int, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **more: Any
) -> ModelShape:
    defaults = {"head_dim": hidden // heads, "tied_embeddings": False, "qkv_bias": False}
    return ModelShape(
        family=family, vocabulary=vocabulary, hidden=hidden, intermediate=intermediate, layers=layers, heads=heads,
        kv_heads=kv_heads, **{**defaults, **more},
    )  # fmt: skip


def _llama(*sizes: int, **more: Any) -> ModelShape:
    return _shape("llama", *sizes, **{"rope_theta": 500000.0, "rms_norm_eps": 1e-5, **more})


def _qwen2(*sizes: int, tied_embeddings: bool) -> ModelShape:
    return _shape(
        "qwen2", *sizes, tied_embeddings=tied_embeddings, qkv_bias=True, rope_theta=1e6, max_positions=32768,
    )  # fmt: skip


def _kinds(pattern: str) -> list[str]:
    """`s` for a layer with a sliding window, `f` for one without."""
    return [{"s": "sliding_attention", "f": "full_attention"}[letter] for letter in pattern]


SHAPES: dict[str, ModelShape] = {
    "llama-2-13b": _llama(32000, 5120, 13824, 40, 40, 40, rope_theta=10000.0, max_positions=4096),
    "llama-3-8b": _llama(128256, 4096, 14336, 32, 32, 8),
    "llama-3.2-1b": _llama(128256, 2048, 8192, 16, 32, 8, tied_embeddings=True),
    "llama-3.2-3b": _llama(128256, 3072, 8192, 28, 24, 8, tied_embeddings=True),
    "falcon3-7b": _llama(131072, 3072, 23040, 28, 12, 4, head_dim=256, rope_theta=1000042.0, rms_norm_eps=1e-6,
                         max_positions=32768),
    "smollm2-1.7b": _llama(49152, 2048, 8192, 24, 32, 32, rope_theta=130000.0, tied_embeddings=True),
    "mistral-7b": _shape("mistral", 32768, 4096, 14336, 32, 32, 8, rope_theta=1e6, rms_norm_eps=1e-5,
                         max_positions=32768),
    "qwen2-0.5b": _qwen2(151936, 896, 4864, 24, 14, 2, tied_embeddings=True),
    "qwen2-1.5b": _qwen2(151936, 1536, 8960, 28, 12, 2, tied_embeddings=True),
    "qwen2-7b": _qwen2(152064, 3584, 18944, 28, 28, 4, tied_embeddings=False),
    "qwen3-8b": _shape("qwen3", 151936, 4096, 12288, 36, 32, 8, head_dim=128, rope_theta=1e6, max_positions=40960),
    "gemma-2-9b": _shape("gemma2", 256000, 3584, 14336, 42, 16, 8, head_dim=256, tied_embeddings=True, window=4096,
                         settings={"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
                                   "layer_types": _kinds("sf" * 21), "query_pre_attn_scalar": 256}),
    "gemma-3-4b": _shape("gemma3_text", 262208, 2560, 10240, 34, 8, 4, head_dim=256, tied_embeddings=True, window=1024,
                         rope_theta=1e6, max_positions=131072,
                         settings={"final_logit_softcapping": None, "layer_types": _kinds("sssssf" * 5 + "ssss"),
                                   "query_pre_attn_scalar": 256}),
    "granite-3-8b": _shape("granite", 49155, 4096, 12800, 40, 32, 8, tied_embeddings=True, rope_theta=1e7,
                           rms_norm_eps=1e-5, max_positions=131072,
                           settings={"attention_multiplier": 0.0078125, "embedding_multiplier": 12.0,
                                     "logits_scaling": 16.0, "residual_multiplier": 0.22}),
    "phi-4": _shape("phi3", 100352, 5120, 17920, 40, 40, 10, rope_theta=250000.0, rms_norm_eps=1e-5,
                    max_positions=16384),
    "smollm3-3b": _shape("smollm3", 128256, 2048, 11008, 36, 16, 4, tied_embeddings=True, rope_theta=5e6,
                         max_positions=65536, settings={"no_rope_layers": [1, 1, 1, 0] * 9}),
    "falcon-7b": _shape("falcon", 65024, 4544, 18176, 32, 71, 1, tied_embeddings=True, rms_norm_eps=1e-5,
                        max_positions=2048),
    # Small enough for tests and for looking at the tool on a laptop; what a family is about matters in each.
    "toy-llama": _llama(512, 64, 172, 3, 4, 2, rope_theta=10000.0, tied_embeddings=True),
    "toy-mistral": _shape("mistral", 512, 64, 172, 3, 4, 2, window=7),
    "toy-qwen2": _qwen2(512, 64, 172, 3, 4, 2, tied_embeddings=True),
    "toy-qwen3": _shape("qwen3", 512, 64, 172, 3, 4, 2, head_dim=24, tied_embeddings=True),
    "toy-gemma2": _shape("gemma2", 512, 64, 172, 3, 4, 2, head_dim=24, tied_embeddings=True, window=7,
                         settings={"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
                                   "layer_types": _kinds("sfs"), "query_pre_attn_scalar": 32}),
    "toy-gemma3": _shape("gemma3_text", 512, 64, 172, 3, 4, 2, head_dim=24, tied_embeddings=True, window=7,
                         rope_theta=1e6,
                         settings={"final_logit_softcapping": None, "layer_types": _kinds("sfs"),
                                   "query_pre_attn_scalar": 32}),
    "toy-granite": _shape("granite", 512, 64, 172, 3, 4, 2, tied_embeddings=True,
                          settings={"attention_multiplier": 0.1, "embedding_multiplier": 6.0, "logits_scaling": 4.0,
                                    "residual_multiplier": 0.4}),
    "toy-phi3": _shape("phi3", 512, 64, 172, 3, 4, 2, window=7, rotary_fraction=0.5),
    "toy-smollm3": _shape("smollm3", 512, 64, 172, 3, 4, 2, tied_embeddings=True, window=7,
                          settings={"layer_types": _kinds("fsf"), "no_rope_layers": [1, 0, 1]}),
    "toy-falcon": _shape("falcon", 512, 64, 172, 3, 4, 1, tied_embeddings=True, rms_norm_eps=1e-5),
}  # fmt: skip
"""The shipped shapes, each from the model's published configuration."""


def shipped_shape(name: str) -> ModelShape:
    """The shape called `name`.

    Raises:
        ModelError: no such shape.
    """
    if name not in SHAPES:
        raise unknown_choice("shape", name, SHAPES, ModelError)
    return SHAPES[name]
