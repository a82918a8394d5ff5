"""The public API: names and arguments that people who fine-tune already know.

`FastLanguageModel` loads a model and adds adapters; for code that was written for stock PEFT there is
`fastft.hf_training`.  Either way the model stays a Hugging Face model in a `PeftModel`, and any loop or trainer can
train it.
"""

import functools
import logging
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from fastft.config import RunConfig
from fastft.engine import optimizer_step
from fastft.engine.patch import patch_model
from fastft.engine.state import Placed
from fastft.errors import ConfigError, ModelError, unknown_choice
from fastft.hardware import Device, detect_device
from fastft.hf_training import backend_name
from fastft.memory.fitting import fit, room_under, smallest
from fastft.memory.model import memory_terms
from fastft.models.loading import DTYPES, QUANTIZATIONS, load_model, load_tokenizer, resolve_model, torch_dtype
from fastft.models.shapes import ModelShape
from fastft.models.spec import SPECS
from fastft.notebook_arguments import others
from fastft.plan import POLICIES, Choices, Plan, Policy, keeps_input_only
from fastft.plan_store import PlanStore, read_foreign_plan
from fastft.plans.run_file import record_in_saves, run_facts
from fastft.plans.shipped import MAY_DIFFER, ShippedPlans, choices_here
from fastft.plans.verification import Verifications
from fastft.units import gib

log = logging.getLogger("fastft")

_REQUEST = "_fastft_request"


class FastLanguageModel:
    """Loading and adapting, in two calls; then train with `transformers.Trainer`, TRL, or a plain loop."""

    @staticmethod
    def from_pretrained(
        model_name: str,
        max_seq_length: int = 2048,
        dtype: torch.dtype | str | None = None,
        load_in_4bit: bool = True,
        load_in_8bit: bool = False,
        *,
        load_in_16bit: bool = False,
        random_state: int | None = None,
        use_gradient_checkpointing: bool | str = "auto",
        plan: str = "auto",
        memory_cap: str | int | None = None,
        backend: str = "auto",
        device: str = "auto",
        strict: bool = False,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        **hugging_face: Any,
    ) -> tuple[Any, Any]:
        """The base model and its tokenizer (None for a shipped shape).

        Args:
            model_name: `tiny`, a local folder, a shipped shape, or a hub name (the hub client downloads it unless
                `local_files_only`); or the folder of a saved adapter, whose base model is then loaded under it.
            max_seq_length: the longest sequence in tokens; what plans are looked up by.
            dtype: of weights and activations; None is bf16 on a GPU that has it, fp32 on a CPU.
            load_in_4bit: NF4 with double quantization, by bitsandbytes.
            load_in_8bit: int8, by bitsandbytes; `load_in_4bit` must then be off.
            load_in_16bit: neither, whatever `load_in_4bit` says.
            random_state: has no effect: a loaded model has nothing random; `get_peft_model` has its own.
            use_gradient_checkpointing: what `get_peft_model` takes where it is not told.
            plan: `auto` follows a cached plan where one fits, else a shipped one for micro-batches up to its own;
                `none` the default; anything else is a plan file.
            memory_cap: `"7.8GiB"` or bytes: the placement with the least recomputation whose predicted peak is
                under it.
            backend: auto, triton, eager, or peft (stock).
            device: auto, cpu or cuda.
            strict: a module that cannot run fused is an error.
            hugging_face: further arguments of `AutoModelForCausalLM.from_pretrained`.

        Raises:
            FastftError: what cannot be found, read or run here, and how to fix it.
        """
        folder = Path(model_name)
        if (folder / "adapter_config.json").is_file():
            return _with_saved_adapter(
                folder, max_seq_length=max_seq_length, dtype=dtype, load_in_4bit=load_in_4bit,
                load_in_8bit=load_in_8bit, load_in_16bit=load_in_16bit, plan=plan,
                use_gradient_checkpointing=use_gradient_checkpointing,
                memory_cap=memory_cap, backend=backend, device=device, strict=strict,
                local_files_only=local_files_only, trust_remote_code=trust_remote_code, **hugging_face,
            )  # fmt: skip
        hugging_face = others(hugging_face)
        load_in_4bit = load_in_4bit and not load_in_16bit
        if load_in_4bit and load_in_8bit:
            raise ConfigError(
                "load_in_4bit and load_in_8bit exclude each other", got="both", fix="pass load_in_4bit=False"
            )
        found = detect_device(device)
        quantization = "nf4" if load_in_4bit else "int8" if load_in_8bit else "none"
        compute_dtype = torch_dtype(dtype, found)
        names = {value: name for name, value in DTYPES.items()}
        if compute_dtype not in names:
            raise unknown_choice("dtype", str(compute_dtype), map(str, names))
        # Before the weights, which take minutes to load.
        config = RunConfig.load(
            model=model_name,
            sequence_tokens=max_seq_length,
            quantization=quantization,
            dtype=names[compute_dtype],
            backend=backend,
            device=found.kind,
            plan=plan,
            memory_cap=None if memory_cap is None else str(memory_cap),
            strict=strict or None,
        )
        resolved = resolve_model(model_name, offline=local_files_only, trust_remote_code=trust_remote_code)
        if resolved.quantization in QUANTIZATIONS:
            # Weights that are stored quantized stay so: plans and estimates are for what they are.
            config = config.model_copy(update={"quantization": resolved.quantization})
        tokenizer = load_tokenizer(resolved, offline=local_files_only, trust_remote_code=trust_remote_code)
        model = load_model(
            resolved,
            dtype=compute_dtype,
            device=found.kind,
            quantization=quantization,
            offline=local_files_only,
            trust_remote_code=trust_remote_code,
            **hugging_face,
        )
        model.__dict__[_REQUEST] = (config, resolved.shape, found, use_gradient_checkpointing)
        return model, tokenizer

    @staticmethod
    def get_peft_model(
        model: Any,
        r: int = 16,
        target_modules: Sequence[str] | str = "all-linear",
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: str = "none",
        use_gradient_checkpointing: bool | str | None = None,
        random_state: int | None = 3407,
        *,
        max_seq_length: int | None = None,
        use_rslora: bool = False,
        **lora: Any,
    ) -> Any:
        """A `PeftModel` around `model` (from `from_pretrained`) on the chosen backend, in training mode.

        Args:
            r: rank.
            target_modules: names of linear layers; `"all-linear"` is all of the decoder's.
            lora_alpha: the adapter's output is scaled by alpha / r (alpha / √r with `use_rslora`).
            lora_dropout: on the adapters' input.
            bias: as in `peft.LoraConfig`.
            use_gradient_checkpointing: `auto` (also `"unsloth"`) places it by the plan or the memory there is; True
                checkpoints every layer, False none; a policy's name is that policy for every layer.  None is what
                `from_pretrained` was told.
            random_state: seed of the adapters; None draws them from PyTorch's generator as it is.
            max_seq_length: another than `from_pretrained` was told.
            lora: further arguments of `peft.LoraConfig`.

        Raises:
            ModelError: `model` does not come from `from_pretrained`.
            ConfigError: a value that is not allowed, such as an unknown one of `use_gradient_checkpointing`.
        """
        from peft import LoraConfig as PeftLoraConfig
        from peft import PeftModel, get_peft_model

        if isinstance(model, PeftModel):
            raise ModelError(
                "the model has adapters already", got=type(model).__name__,
                fix="train it as it is; from_pretrained opened a saved adapter",
            )  # fmt: skip
        lora = others(lora)
        if _REQUEST not in model.__dict__:
            raise ModelError(
                "get_peft_model needs a model from FastLanguageModel.from_pretrained", got=type(model).__name__,
                fix="load it there, or use peft.get_peft_model inside fastft.patch_hf_training()",
            )  # fmt: skip
        config, shape, device, checkpointing = model.__dict__[_REQUEST]
        if use_gradient_checkpointing is None:
            use_gradient_checkpointing = checkpointing
        if max_seq_length is not None:
            config = config.model_copy(update={"sequence_tokens": max_seq_length})
        targets = target_modules
        if isinstance(target_modules, str):
            if target_modules != "all-linear":
                raise ConfigError(
                    "target_modules is not a list of names", got=target_modules, allowed="a list, or all-linear",
                    fix="list the layers",
                )  # fmt: skip
            # Without a layer specification it is for PEFT to find them.
            targets = target_modules if shape is None else SPECS[shape.family].targets
        names = (targets,) if isinstance(targets, str) else tuple(targets)
        chosen = {"rank": r, "alpha": lora_alpha, "dropout": lora_dropout, "targets": names}
        config = RunConfig.of({**config.model_dump(), "lora": {**chosen, "rslora": use_rslora}})
        # A quantized model keeps its dtypes: see `fastft.training.session.add_adapters`.
        if random_state is not None:
            torch.manual_seed(random_state)
        adapted = get_peft_model(
            model,
            PeftLoraConfig(
                r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, bias=bias, use_rslora=use_rslora,  # type: ignore[arg-type]
                target_modules=targets if isinstance(targets, str) else list(targets), task_type="CAUSAL_LM", **lora,
            ),
        )  # fmt: skip
        _put_backend_in(adapted, config, shape, device, use_gradient_checkpointing)
        return adapted.train()

    @staticmethod
    def for_training(model: Any) -> Any:
        """The model in training mode."""
        return model.train()

    @staticmethod
    def for_inference(model: Any) -> Any:
        """The model in evaluation mode, in which it is stock's own."""
        return model.eval()


FastModel = FastLanguageModel
"""The name that newer notebooks have for it."""


def _needs_no_patch(method: str) -> Callable[[], None]:
    def patch() -> None:
        log.info(
            "TRL's trainer for %s needs no patch of its own: a model from FastLanguageModel runs fused in it", method
        )

    patch.__doc__ = f"What notebooks call before they import TRL's trainer for {method}; there is nothing to do."
    return patch


PatchDPOTrainer = _needs_no_patch("DPO")
PatchKTOTrainer = _needs_no_patch("KTO")


def _with_saved_adapter(folder: Path, **given: Any) -> tuple[Any, Any]:
    """The model that an adapter was saved for, with the adapter, to train further or to use; and the tokenizer."""
    from peft import PeftConfig, PeftModel
    from transformers import AutoTokenizer

    saved = PeftConfig.from_pretrained(str(folder))
    if saved.base_model_name_or_path is None:
        raise ModelError(
            "the adapter does not say which model it is for", got=str(folder),
            fix="put base_model_name_or_path into its adapter_config.json",
        )  # fmt: skip
    model, tokenizer = FastLanguageModel.from_pretrained(saved.base_model_name_or_path, **given)
    config, shape, device, checkpointing = model.__dict__[_REQUEST]
    adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    targets = saved.target_modules or ()
    chosen = {"rank": saved.r, "alpha": saved.lora_alpha, "dropout": saved.lora_dropout, "rslora": saved.use_rslora}
    names = (targets,) if isinstance(targets, str) else tuple(sorted(targets))
    config = RunConfig.of({**config.model_dump(), "lora": {**chosen, "targets": names}})
    _put_backend_in(adapted, config, shape, device, checkpointing)
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder)
    return adapted.train(), tokenizer


def _put_backend_in(
    adapted: Any, config: RunConfig, shape: ModelShape | None, device: Device, checkpointing: bool | str
) -> None:
    backend = backend_name(config.backend, device)
    if checkpointing not in (True, False, "auto", "unsloth", *POLICIES):
        raise unknown_choice(
            "use_gradient_checkpointing", str(checkpointing), ["auto", "unsloth", "True", "False", *POLICIES]
        )
    plan = _find_plan(config, shape, device) if shape is not None and backend != "peft" else None
    record_in_saves(adapted, run_facts(config, plan, plan.choices if plan is not None else None))
    if plan is not None:
        log.info("plan %s (%s): %s", plan.id, plan.origin, plan.choices.summary())
        if config.backend == "auto":
            backend = plan.choices.backend
    if backend == "peft" or shape is None:
        # Hugging Face checkpoints all layers or none; left to choose without a plan, it takes what always fits.
        if checkpointing in ("auto", "unsloth"):
            checkpointing = plan is None or any(map(keeps_input_only, plan.choices.placement))
        if checkpointing is True or (checkpointing in POLICIES and keeps_input_only(checkpointing)):
            adapted.gradient_checkpointing_enable({"use_reentrant": False})
            adapted.enable_input_require_grads()
        if backend != "peft":
            patch_model(adapted, backend=backend, strict=config.strict)
        return
    automatic = functools.partial(_AutoPlacement, adapted, shape=shape, device=device, backend=backend)
    placement: Any
    if checkpointing in ("auto", "unsloth"):
        placement = automatic(config, residents=True)
        if plan is not None:
            # Who tuned a plan chose its batch; who did not may well train larger ones than it holds.
            shipped = functools.partial(_up_to_its_own_batch, plan, placement)
            placement = shipped if plan.origin == "shipped" else plan.choices.placement
    elif isinstance(checkpointing, bool):
        placement = "full" if checkpointing else "light"
    else:
        placement = checkpointing
    planned: dict[str, Any] = {} if plan is None else plan.choices.for_model
    if plan is None and isinstance(placement, str) and (config.memory_cap is not None or config.quantization != "none"):
        # Who checkpoints wants memory, not dense copies of quantized weights.
        given = config.model_copy(update={"placement": placement})
        placement = automatic(given, residents=not keeps_input_only(cast(Policy, placement)))
    patch_model(adapted, backend=backend, strict=config.strict, **{**planned, "placement": placement})


_CALLERS_OWN = {"global_batch", "optimizer", "packing"}
"""Fields of a plan's key that whoever calls chooses later, in a loop or trainer of their own."""


def _find_plan(config: RunConfig, shape: ModelShape, device: Device) -> Plan | None:
    """The plan file, or the cached plan for this work at any batch size: whoever calls chooses the batch here."""
    from fastft.planning import plan_key

    if config.plan == "none":
        return None
    key = plan_key(config, shape, device)
    if config.plan != "auto":
        plan = read_foreign_plan(Path(config.plan))
        differences = set(key.difference(plan.key)) - _CALLERS_OWN
        if differences:
            raise ConfigError(
                "the plan was made for something else", got=", ".join(sorted(differences)), fix="run `fastft tune`"
            )
        return plan
    store = PlanStore()
    for plan in store.entries():
        if set(key.difference(plan.key)) <= _CALLERS_OWN:
            return plan
    for plan in ShippedPlans().entries():
        if set(key.difference(plan.key)) <= _CALLERS_OWN | MAY_DIFFER:
            # What `fastft train` found out about it, which chooses as the plan does.
            whole = key.model_copy(update={name: getattr(plan.key, name) for name in _CALLERS_OWN})
            verification = Verifications(store.cache).load(whole, plan)
            if verification is None or verification.verdict == "verified":
                return plan.model_copy(update={"choices": choices_here(plan, key)})
    return None


def _up_to_its_own_batch(plan: Plan, automatic: "_AutoPlacement", batch: int, tokens: int) -> Placed:
    """What a plan does for memory, for micro-batches that need no more than its own; else what fits by estimate."""
    if batch <= plan.choices.micro_batch and tokens <= plan.key.sequence_tokens:
        return Placed.of(plan.choices)
    return automatic(batch, tokens)


class _AutoPlacement:
    """Chooses what is given up for memory when the batch is known: the least extra work that fits the cap, or the
    device."""

    def __init__(
        self, model: nn.Module, config: RunConfig, shape: ModelShape, device: Device, backend: str, *, residents: bool
    ) -> None:
        self._model = weakref.ref(model)
        self._config, self._shape, self._device, self._backend = config, shape, device, backend
        self._residents = residents
        self._cap = room_under(config.memory_cap_bytes, device)
        self._now: Choices | None = None
        self._steps = optimizer_step.steps()

    def __call__(self, batch: int, tokens: int) -> Placed:
        """What micro-batches of `batch` rows of `tokens` tokens do for memory."""
        config = self._config.model_copy(update={"sequence_tokens": tokens, "batch_size": batch})
        shape, device = self._shape, self._device
        placement = [config.placement or "light"] * shape.layers
        default = Choices(backend=self._backend, micro_batch=batch, accumulation=1, placement=placement)
        cap = self._cap - self._beyond_prediction(config)
        fitted = fit(cap, shape, default, config, device=device)
        if fitted is not None:
            chosen = fitted
            log.info("no plan is cached; by estimate: %s", chosen.summary())
        else:
            chosen = smallest(shape, default, config, device=device)
            log.warning("nothing is predicted to fit %s; taking the smallest", gib(self._cap))
        if not self._residents:
            chosen = chosen.model_copy(update={"resident_layers": 0})
        self._now = chosen
        return Placed.of(chosen)

    def _beyond_prediction(self, config: RunConfig) -> int:
        """By how many bytes more than predicted stands on the device when a step begins (fewer: negative).

        Zero at first: how large an optimizer's states are is known when it has made a step.
        """
        model = self._model()
        if self._now is None or model is None or self._device.kind != "cuda" or optimizer_step.steps() == self._steps:
            return 0
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        predicted = memory_terms(self._shape, self._now, config, self._device).model + gradients
        return torch.cuda.memory_allocated() - predicted
