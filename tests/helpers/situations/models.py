"""Tiny models of every family, and adapters of every kind, for `situations`."""

from collections.abc import Callable
from typing import Any

import peft
import torch
import transformers
from transformers import AutoConfig

from fastft.models.spec import SPECS

VOCABULARY = 97
HIDDEN = 32

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip

_MIXED = ["sliding_attention", "full_attention"]
_GEMMA = {"head_dim": 12, "sliding_window": 5, "layer_types": _MIXED, "query_pre_attn_scalar": 16}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "qwen2": {},
    "qwen3": {"head_dim": 12},
    "gemma2": {**_GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": _GEMMA,
    "granite": {
        "attention_multiplier": 0.2, "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5
    },
    "phi3": {"resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "smollm3": {"no_rope_layers": [1, 0]},
    "falcon": {"ffn_hidden_size": 48, "num_kv_heads": 1},
    "opt": {
        "ffn_dim": 48, "word_embed_proj_dim": HIDDEN, "dropout": 0.0, "attention_dropout": 0.0
    },
    "gpt_neox": {"hidden_dropout": 0.0, "attention_dropout": 0.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "cohere": {"logit_scale": 0.5},
    "olmo2": {},
    "phi": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_dropout": 0.0},
    "starcoder2": {"residual_dropout": 0.0, "embedding_dropout": 0.0, "attention_dropout": 0.0},
    "stablelm": {},
    "gemma": {"head_dim": 12},
}  # fmt: skip
"""By Hugging Face's `model_type`: what the plain configuration has beside the sizes."""

SPECIFIED = tuple(SPECS)
"""The families whose decoder layers the engine knows."""

_SLIDING = {"use_sliding_window": True, "sliding_window": 5, "layer_types": _MIXED}
_ROPES: dict[str, dict[str, Any]] = {
    "rope linear": {"rope_type": "linear", "factor": 4.0},
    "rope dynamic": {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 8},
    "rope yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    "rope llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    },
}  # fmt: skip
_GENERAL: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True},
    "three layers": {"num_hidden_layers": 3},
    "one layer": {"num_hidden_layers": 1},
    "every head its own": {"num_key_value_heads": 4},
    "one kv head": {"num_key_value_heads": 1},
    "no cache": {"use_cache": False},
    "padding token": {"pad_token_id": 5},
}
_ACTIVATIONS = {f"act {name}": {"hidden_act": name} for name in ("gelu", "gelu_pytorch_tanh", "relu", "gelu_new")}
_TURNED = {
    name: {"rope_parameters": {"rope_theta": 10000.0, **rope}, "max_position_embeddings": 32}
    for name, rope in _ROPES.items()
}
_HEADS = {"biased attention": {"attention_bias": True}, "wide heads": {"head_dim": 20}}
_MLPS = {"biased mlp": {"mlp_bias": True}}
_ALIKE = {**_GENERAL, **_ACTIVATIONS, **_TURNED}

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {**_ALIKE, **_HEADS, **_MLPS},
    "mistral": {**_ALIKE, "wide heads": _HEADS["wide heads"], "no window": {"sliding_window": None}},
    "qwen2": {**_ALIKE, "sliding": _SLIDING},
    "qwen3": {**_ALIKE, **_HEADS, "sliding": _SLIDING},
    "gemma2": {
        **_GENERAL,
        "biased attention": {"attention_bias": True},
        "no soft-cap of scores": {"attn_logit_softcapping": None},
        "no soft-cap of logits": {"final_logit_softcapping": None},
        "all full": {"layer_types": ["full_attention"] * 2},
    },
    "gemma3_text": {
        **_GENERAL,
        "soft-cap of logits": {"final_logit_softcapping": 3.0},
        "all full": {"layer_types": ["full_attention"] * 2},
        "all sliding": {"layer_types": ["sliding_attention"] * 2},
        "bidirectional": {"use_bidirectional_attention": True},
    },
    "granite": {**_ALIKE, "biased attention": {"attention_bias": True}, **_MLPS},
    "phi3": {
        **_GENERAL,
        **_ACTIVATIONS,
        "sliding": {"sliding_window": 5},
        "half rotated": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    },
    "smollm3": {
        **_ALIKE, "biased attention": {"attention_bias": True}, **_MLPS, "all rotated": {"no_rope_layers": [1, 1]},
        "sliding": _SLIDING,
    },
    "falcon": {
        "tied": _GENERAL["tied"],
        "three layers": _GENERAL["three layers"],
        "alibi": {"alibi": True},
        "new architecture": {"new_decoder_architecture": True, "num_kv_heads": 2},
        "no multi-query": {"multi_query": False, "num_kv_heads": 4},
        "not parallel": {"parallel_attn": False},
        "biased": {"bias": True},
    },
    "opt": {"not first": {"do_layer_norm_before": False}},
    "gpt_neox": {"not parallel": {"use_parallel_residual": False}},
    "cohere": {"head norms": {"use_qk_norm": True}},
}  # fmt: skip
"""By family: named changes of its configuration; a family that is not here has only `tied`."""
_TIED = {"tied": _GENERAL["tied"]}

HEADS: dict[str, Any] = {
    "causal": transformers.AutoModelForCausalLM,
    "classification": transformers.AutoModelForSequenceClassification,
    "tokens": transformers.AutoModelForTokenClassification,
}
"""What stands on the backbone; with their labels."""
HEADED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "smollm3")
"""Families that have all of `HEADS`."""


def variants_of(family: str) -> list[str]:
    """The names of a family's configurations other than the plain one."""
    return list(VARIANTS.get(family, _TIED))


def _layers_of(settings: dict[str, Any]) -> dict[str, Any]:
    """What is given a layer, for as many layers as there are."""
    count = settings["num_hidden_layers"]
    return {name: (settings[name] * count)[:count] for name in ("layer_types", "no_rope_layers") if settings.get(name)}


def make_base(
    family: str, variant: str, attention: str, head: str, dtype: torch.dtype, seed: int, *, spread: float
) -> Any:
    """A model with norm weights that are not 1 and biases that are not 0.

    `spread` is that of the weights.  At Hugging Face's default of 0.02 attention is all but uniform, and a wrong mask
    would change next to nothing.
    """
    changes = {} if variant == "plain" else VARIANTS.get(family, _TIED)[variant]
    spreads = {"initializer_range": spread, "init_std": spread}
    settings = {**_SIZES, **spreads, "tie_word_embeddings": False, **FAMILIES[family], **changes}
    config = AutoConfig.for_model(family, **{**settings, **_layers_of(settings)})
    if head != "causal":
        config.num_labels, config.pad_token_id, config.classifier_dropout = 3, 5, 0.0
    torch.manual_seed(seed)
    model = HEADS[head].from_config(config, attn_implementation=attention)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


Adapt = Callable[[Any], Any]
"""From a base model to what is trained."""


def _lora(after: Callable[[Any], Any] | None = None, **settings: Any) -> Adapt:
    def adapt(base: Any) -> Any:
        kept = {"target_modules": "all-linear", "r": 4, "lora_alpha": 8, "init_lora_weights": False, **settings}
        model = peft.get_peft_model(base, peft.LoraConfig(**kept))
        if after is not None:
            after(model)
        return model

    return adapt


def _other(kind: str, **settings: Any) -> Adapt:
    return lambda base: peft.get_peft_model(base, getattr(peft, kind)(**settings))


def _add_second(model: Any) -> None:
    kept = {"r": 3, "lora_alpha": 12, "init_lora_weights": False, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    if not any(name.endswith("q_proj") for name, _ in model.named_modules()):
        kept["target_modules"] = "all-linear"
    model.add_adapter("second", peft.LoraConfig(**kept))


def _second_active(model: Any) -> None:
    _add_second(model)
    model.set_adapter("second")


def _both_active(model: Any) -> None:
    _add_second(model)
    model.base_model.set_adapter(["default", "second"])


def _set_dropout(value: float) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = value

    return change


def _train(words: tuple[str, ...]) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if any(word in name for word in words):
                parameter.requires_grad_(True)

    return change


_SOME_LINEARS = ["q_proj", "down_proj", "qkv_proj", "query_key_value", "dense_4h_to_h", "c_attn", "fc1"]

ADAPTERS: dict[str, Adapt] = {
    "all-linear": _lora(),
    "q and v": _lora(target_modules=r".*(q_proj|v_proj|query_key_value|qkv_proj|c_attn)"),
    "mlp only": _lora(target_modules=r".*(mlp|fc1|fc2).*(_proj|_h|fc1|fc2|fc_in|fc_out|c_fc|c_proj|gate_up_proj)"),
    "down only": _lora(target_modules=r".*(down_proj|dense_4h_to_h|fc2|c_proj)"),
    "first layer only": _lora(target_modules=_SOME_LINEARS, layers_to_transform=[0]),
    "ranks differ": _lora(
        rank_pattern={"q_proj": 2, "down_proj": 7}, alpha_pattern={"v_proj": 3, "layers.1.mlp.up_proj": 20}
    ),
    "rank 1": _lora(r=1),
    "wide rank": _lora(r=40),
    "rslora": _lora(use_rslora=True),
    "bias lora_only": _lora(bias="lora_only"),
    "bias all": _lora(bias="all"),
    "lora_bias": _lora(lora_bias=True),
    "dora": _lora(use_dora=True),
    "pissa": _lora(init_lora_weights="pissa"),
    "fresh": _lora(init_lora_weights=True),
    "both adapters": _lora(_both_active),
    "second adapter": _lora(_second_active),
    "second beside": _lora(_add_second),
    "disabled": _lora(lambda model: model.base_model.disable_adapter_layers()),
    "merged": _lora(lambda model: model.merge_adapter()),
    "merged and back": _lora(lambda model: (model.merge_adapter(), model.unmerge_adapter())),
    "dropout 0.5": _lora(lora_dropout=0.5),
    "dropout set to 0": _lora(_set_dropout(0.0), lora_dropout=0.5),
    "dropout 1e-9": _lora(lora_dropout=1e-9),
    "scaling 0": _lora(lora_alpha=0),
    "head trained whole": _lora(modules_to_save=["lm_head", "score"]),
    "norms trained whole": _lora(modules_to_save=["norm", "input_layernorm"]),
    "lora on the head": _lora(target_modules=["q_proj", "lm_head", "query_key_value", "qkv_proj"]),
    "lora on the embedding": _lora(target_modules=["q_proj", "embed_tokens", "word_embeddings"]),
    "some tokens": _lora(trainable_token_indices=[3, 4, 50]),
    "layers shared": _lora(layer_replication=[(0, 2), (0, 2)]),
    "norms too": _lora(_train(("norm",))),
    "biases too": _lora(_train((".bias",))),
    "one base weight too": _lora(_train(("layers.0.self_attn.o_proj.base_layer", "h.0.mlp"))),
    "adalora": _other("AdaLoraConfig", target_modules="all-linear", init_r=4, target_r=2, total_step=10),
    "vera": _other("VeraConfig", r=4, target_modules=["q_proj", "query_key_value", "qkv_proj"], d_initial=0.5),
    "ia3": _other(
        "IA3Config", target_modules=["k_proj", "v_proj", "down_proj", "dense_4h_to_h"],
        feedforward_modules=["down_proj", "dense_4h_to_h"], init_ia3_weights=False,
    ),
    "loha": _other("LoHaConfig", r=4, target_modules="all-linear", init_weights=False),
    "lokr": _other("LoKrConfig", r=4, target_modules="all-linear", init_weights=False),
    "oft": _other("OFTConfig", r=0, oft_block_size=4, target_modules="all-linear", init_weights=False),
    "norm tuning": _other("LNTuningConfig", target_modules=["input_layernorm", "post_attention_layernorm"]),
    "prefix": _other("PrefixTuningConfig", task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prompt": _other("PromptTuningConfig", task_type="CAUSAL_LM", num_virtual_tokens=3),
}  # fmt: skip
"""Every one makes a `PeftModel`, with B ≠ 0 where there is one but for `fresh`."""

VIRTUAL_TOKENS = ("prefix", "prompt")
"""Adapters that change how many tokens there are: what is given a token must then be left out."""
