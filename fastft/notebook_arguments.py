"""Arguments that notebooks written for Unsloth pass: honoured, or one clear error that says what to use instead.

Those that fastft has itself are in `fastft.api`; here are the others.
"""

import logging
from typing import Any

from fastft.errors import ConfigError

log = logging.getLogger("fastft")

_REFUSED = {
    "full_finetuning": ("fastft trains adapters over a frozen model", "leave it out, and call get_peft_model"),
    "fast_inference": ("generation by vLLM is not part of fastft yet", "leave it out; model.generate works"),
    "load_in_fp8": ("fastft computes with bf16, NF4, FP4 and int8 weights", "use load_in_4bit or load_in_8bit"),
    "float8_kv_cache": ("fastft keeps keys and values in the model's dtype", "leave it out"),
    "qat_scheme": ("fastft does not simulate quantization in training", "leave it out"),
    "finetune_vision_layers": ("vision models are not part of fastft yet", "train the language model's layers"),
}  # fmt: skip
_WITHOUT_EFFECT = {
    "gpu_memory_utilization": "it is vLLM's", "max_lora_rank": "it is vLLM's", "disable_log_stats": "it is vLLM's",
    "fix_tokenizer": "the tokenizer stays as it is stored", "use_exact_model_name": "names are exact",
    "unsloth_tiled_mlp": "memory_cap decides what runs in tiles",
    "temporary_location": "nothing is written while a model loads",
}  # fmt: skip
_ALWAYS = ("finetune_language_layers", "finetune_attention_modules", "finetune_mlp_modules")
"""What is trained as `target_modules` says, and cannot be left out by another name."""
_AS_BY_DEFAULT: dict[str, Any] = {
    "device_map": "sequential", "rope_scaling": None, "loftq_config": None, "layers_to_transform": None,
    "layers_pattern": None, "modules_to_save": None, "init_lora_weights": True, "use_dora": False, "token": None,
    "revision": None, "attn_implementation": None, "resize_model_vocab": None, "quantization_config": None,
}  # fmt: skip
"""Values that mean what is done anyhow; others go on to Hugging Face or PEFT."""


def others(given: dict[str, Any]) -> dict[str, Any]:
    """Of further arguments those that Hugging Face or PEFT shall get.

    Raises:
        ConfigError: one asks for what fastft does not do.
    """
    for name, (why, fix) in _REFUSED.items():
        if given.get(name):
            raise ConfigError(f"{name} is not possible: {why}", got=given[name], allowed=False, fix=fix)
    for name in _ALWAYS:
        if not given.get(name, True):
            raise ConfigError(f"{name} is not possible", got=False, allowed=True, fix="name target_modules instead")
    for name in sorted(_WITHOUT_EFFECT.keys() & given.keys()):
        log.info("%s has no effect: %s", name, _WITHOUT_EFFECT[name])
    known = {*_REFUSED, *_WITHOUT_EFFECT, *_ALWAYS}
    return {
        name: value
        for name, value in given.items()
        if name not in known and not (name in _AS_BY_DEFAULT and value == _AS_BY_DEFAULT[name])
    }
