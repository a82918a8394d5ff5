"""From a model's name to a Hugging Face model: a local folder, a hub name, a shipped shape, or `tiny`.

Nothing is downloaded unless `offline=False`, and no code from a model's repository runs unless
`trust_remote_code=True`.
"""

import copy
import logging
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch

from fastft.errors import ConfigError, ModelError, unknown_choice
from fastft.hardware import Device, resolve_dtype
from fastft.models.quantized import is_quantized
from fastft.models.random_weights import random_model, random_quantized_model
from fastft.models.shapes import SHAPES, SUPPORTED_FAMILIES, ModelShape, shape_of
from fastft.models.spec import SPECS

log = logging.getLogger("fastft")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
QUANTIZATIONS = ("nf4", "fp4", "int8")
"""bitsandbytes'."""


@dataclass(frozen=True)
class ResolvedModel:
    """Where a model comes from, and its shape."""

    name: str
    kind: Literal["folder", "hub", "shape"]
    source: str
    """The folder, the hub name, or the shape's name."""
    shape: ModelShape | None
    """None for a family without a layer specification: backend peft trains it, nothing else does."""
    config: Any
    """The Hugging Face configuration."""

    @property
    def quantization(self) -> str:
        """What the stored weights are quantized to: nf4, fp4, int8, the name of another method, or none."""
        stored = getattr(self.config, "quantization_config", None)
        if stored is None:
            return "none"
        if stored.get("load_in_4bit"):
            return str(stored.get("bnb_4bit_quant_type", "fp4"))
        return "int8" if stored.get("load_in_8bit") else str(stored.get("quant_method", "unknown"))


def resolve_model(name: str, *, offline: bool = True, trust_remote_code: bool = False) -> ResolvedModel:
    """Find `name`: `tiny`, an existing folder, a shipped shape, else a hub name.

    Raises:
        ModelError: nothing by that name, or a folder that holds no readable model.
    """
    if name == "tiny":
        return _from_files(name, "folder", str(files("fastft.models") / "tiny"), True, trust_remote_code)
    if Path(name).is_dir():
        return _from_files(name, "folder", name, True, trust_remote_code)
    if name in SHAPES:
        return ResolvedModel(name, "shape", name, SHAPES[name], SHAPES[name].to_config())
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise unknown_choice("model", name, ["tiny", *SHAPES, "a local folder", "a hub name (owner/name)"], ModelError)
    return _from_files(name, "hub", name, offline, trust_remote_code)


def _from_files(name: str, kind: Any, source: str, offline: bool, trust_remote_code: bool) -> ResolvedModel:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source, local_files_only=offline, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        fix = (
            "check the folder's config.json"
            if kind == "folder"
            else "give a local folder, or allow the download with --no-offline"
        )
        raise ModelError(f"cannot read model {name}", got=_first_line(error), fix=fix) from error
    shape = shape_of(config) if config.model_type in SUPPORTED_FAMILIES else None
    return ResolvedModel(name, kind, source, shape, config)


def torch_dtype(dtype: str | torch.dtype | None, device: Device) -> torch.dtype:
    """A dtype's name as torch's; `auto` or None is what `hardware.resolve_dtype` chooses for the device.

    Raises:
        ConfigError: unknown name.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    name = resolve_dtype(dtype or "auto", device)
    if name not in DTYPES:
        raise unknown_choice("dtype", name, [*DTYPES, "auto"])
    return DTYPES[name]


def load_model(
    resolved: ResolvedModel,
    *,
    dtype: torch.dtype,
    device: str,
    quantization: str = "none",
    offline: bool = True,
    trust_remote_code: bool = False,
    seed: int = 0,
    task: Literal["CAUSAL_LM", "SEQ_CLS"] = "CAUSAL_LM",
    **more: Any,
) -> Any:
    """The base model on `device` with weights in `dtype` and SDPA attention; a shape gets random weights from `seed`.

    For task SEQ_CLS the model has, in place of its head, one that gives a sequence one score: an fp32 layer `score`
    with random weights, which is to be trained, so it is never quantized.

    Weights are quantized one by one, so the model is never dense on the device.  Those that are stored quantized stay
    as they are, with `quantization` none too.  `more` goes to Hugging Face's `from_pretrained`, or to its `from_config`
    for a shape.

    Raises:
        ModelError: the weights cannot be read, or bitsandbytes quantizes none of the model's layers.
        ConfigError: an unknown quantization, or another than that of the stored weights.
    """
    import transformers
    from safetensors import SafetensorError

    if resolved.kind == "shape":
        model = _random_model(resolved, dtype, device, quantization, seed, more)
    else:
        options: dict[str, Any] = {
            "dtype": dtype,
            "device_map": {"": device},
            "attn_implementation": _attention_of(resolved.config),
            "local_files_only": offline or resolved.kind == "folder",
            "trust_remote_code": trust_remote_code,
            **_quantization_options(resolved, quantization, dtype),
            **more,
        }
        kind: Any = transformers.AutoModelForCausalLM
        if task == "SEQ_CLS":
            kind = transformers.AutoModelForSequenceClassification
            _ask_for_one_score(options)
        try:
            model = kind.from_pretrained(resolved.source, **options)
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelError(
                f"cannot load model {resolved.name}", got=_first_line(error), fix="check that its weights are complete"
            ) from error
    if resolved.quantization in QUANTIZATIONS:
        _cast_what_is_dense(model, dtype)
    if task == "SEQ_CLS":
        model.score.to(torch.float32)  # what is trained is in fp32, as adapters are
    if quantization != "none" and not any(map(is_quantized, model.modules())):
        raise ModelError(
            f"bitsandbytes quantizes no layer of {resolved.name}", got=quantization, fix="leave quantization out"
        )
    if device != "cpu":
        # What loading and quantizing needed in between; under a cap, training has no room for it.
        torch.cuda.empty_cache()
    return model


def _ask_for_one_score(options: dict[str, Any]) -> None:
    """Change what `from_pretrained` is told, so that the model scores a sequence."""
    if "config" in options:
        options["config"].num_labels = 1
    else:
        options["num_labels"] = 1
    if "quantization_config" in options:
        options["quantization_config"].llm_int8_skip_modules = ["score"]


def _attention_of(config: Any) -> str:
    """Stock's attention: PyTorch's, which knows no soft-cap."""
    spec = SPECS.get(config.model_type)
    return "sdpa" if spec is None or spec.softcap is None else "eager"


def quantization_config(quantization: str, dtype: torch.dtype) -> Any:
    """bitsandbytes' configuration for `nf4`, `fp4` (double quantization) or `int8`.

    Raises:
        ConfigError: unknown name.
    """
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if quantization not in QUANTIZATIONS:
        raise unknown_choice("quantization", quantization, ["none", *QUANTIZATIONS])
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _random_model(
    resolved: ResolvedModel, dtype: torch.dtype, device: str, quantization: str, seed: int, more: dict[str, Any]
) -> Any:
    options = {"attn_implementation": _attention_of(resolved.config), **more}
    if quantization == "none":
        return random_model(resolved.config, dtype, device, seed, **options)
    chosen = quantization_config(quantization, dtype)
    return random_quantized_model(resolved.config, chosen, dtype, device, seed, **options)


def _quantization_options(resolved: ResolvedModel, quantization: str, dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` is told, so that the weights come in `quantization` or as they are stored."""
    stored = resolved.quantization
    if stored == "none":
        return {} if quantization == "none" else {"quantization_config": quantization_config(quantization, dtype)}
    if quantization not in ("none", stored):
        raise ConfigError(
            f"the weights of {resolved.name} are quantized already", got=quantization, allowed=f"none, {stored}",
            fix=f"set quantization to {stored}, or give the model that was not quantized",
        )  # fmt: skip
    if stored not in ("nf4", "fp4"):
        return {}
    # Stored with them is what the layers computed in when they were quantized.
    config = copy.deepcopy(resolved.config)
    config.quantization_config["bnb_4bit_compute_dtype"] = str(dtype).removeprefix("torch.")
    return {"config": config}


def _cast_what_is_dense(model: Any, dtype: torch.dtype) -> None:
    """Beside weights that are stored quantized, transformers leaves all others in the dtype that they are stored in."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point() and not (is_quantized(module) and name == "weight"):
                parameter.data = parameter.data.to(dtype)


def load_tokenizer(resolved: ResolvedModel, *, offline: bool = True, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer, or None for a shape.

    Raises:
        ModelError: the folder has none.
    """
    if resolved.kind == "shape":
        return None
    from transformers import AutoTokenizer

    what = f"cannot load the tokenizer of {resolved.name}"
    fix = "put tokenizer.json and tokenizer_config.json beside the weights"
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            resolved.source,
            local_files_only=offline or resolved.kind == "folder",
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(what, got=_first_line(error), fix=fix) from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        # Some classes are made without their files, and then turn every text into nothing.
        raise ModelError(what, got="no vocabulary", fix=fix)
    return tokenizer


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
