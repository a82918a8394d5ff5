"""The public API: names and arguments that people who fine-tune already know.

`FastLanguageModel` loads a model and adds adapters; `patch_hf_training` speeds up code that was written for stock
PEFT.  Either way the model stays a Hugging Face model in a `PeftModel`, and any loop or trainer can train it.
"""

import functools
import logging
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch
from torch import nn

from fastft.backends import load_backend
from fastft.config import RunConfig
from fastft.engine import optimizer_step
from fastft.engine.attach import list_in
from fastft.engine.patch import base_model, forget_the_gone, patch_model, unpatch_model
from fastft.engine.state import Placed
from fastft.errors import ConfigError, FastftError, ModelError, unknown_choice
from fastft.hardware import Device, detect_device
from fastft.memory.fitting import fit, room_under, smallest
from fastft.memory.model import memory_terms
from fastft.models.loading import DTYPES, QUANTIZATIONS, load_model, load_tokenizer, resolve_model, torch_dtype
from fastft.models.shapes import ModelShape, shape_of
from fastft.models.spec import SPECS
from fastft.plan import POLICIES, Choices, Plan, Policy, keeps_input_only
from fastft.plan_store import PlanStore, read_foreign_plan
from fastft.plans.run_file import record_in_saves, run_facts
from fastft.plans.shipped import MAY_DIFFER, ShippedPlans, choices_here, launches_hold
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
                `local_files_only`).
            max_seq_length: the longest sequence in tokens; what plans are looked up by.
            dtype: of weights and activations; None is bf16 on a GPU that has it, fp32 on a CPU.
            load_in_4bit: NF4 with double quantization, by bitsandbytes.
            load_in_8bit: int8, by bitsandbytes; `load_in_4bit` must then be off.
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
        model.__dict__[_REQUEST] = (config, resolved.shape, found)
        return model, tokenizer

    @staticmethod
    def get_peft_model(
        model: Any,
        r: int = 16,
        target_modules: Sequence[str] | str = "all-linear",
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: str = "none",
        use_gradient_checkpointing: bool | str = "auto",
        random_state: int = 3407,
        *,
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
                checkpoints every layer, False none; a policy's name is that policy for every layer.
            random_state: seed of the adapters.
            lora: further arguments of `peft.LoraConfig`.

        Raises:
            ModelError: `model` does not come from `from_pretrained`.
            ConfigError: a value that is not allowed, such as an unknown one of `use_gradient_checkpointing`.
        """
        from peft import LoraConfig as PeftLoraConfig
        from peft import get_peft_model

        if _REQUEST not in model.__dict__:
            raise ModelError(
                "get_peft_model needs a model from FastLanguageModel.from_pretrained", got=type(model).__name__,
                fix="load it there, or use peft.get_peft_model inside fastft.patch_hf_training()",
            )  # fmt: skip
        config, shape, device = model.__dict__[_REQUEST]
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


def patch_hf_training(*, backend: str = "auto", strict: bool = False) -> "HfPatch":
    """From now on, every `PeftModel` that is created runs on the fast backend.

    One line before code that was written for stock PEFT.  Defaults stay: checkpointing is what the code asks for,
    dtypes and initialisation are PEFT's.  Of plans for such a model on this device, only the launches of kernels are
    followed, which change no result but in the order of sums; the rest of a plan is for a batch that is not known here.
    Models of a family without a layer specification run part by part, and one line for each reason says what stays
    stock (see `fastft.patch_model`).  Undo it with `.undo()`, or use it as a context manager.

    Args:
        backend: auto (triton on a GPU, eager elsewhere), triton or eager.
        strict: what cannot run fused is an error.

    Raises:
        BackendError: the backend is unknown, or cannot run here.
    """
    return HfPatch(backend, strict)


class HfPatch:
    """What `patch_hf_training` did, and how to undo it."""

    def __init__(self, backend: str, strict: bool) -> None:
        import peft
        import transformers

        from fastft.training import methods

        self._backend = load_backend(_backend_name(backend, detect_device("auto"))).name
        self._strict = strict
        self._models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._original: Callable[..., None] | None = peft.PeftModel.__init__
        original, patch = peft.PeftModel.__init__, self

        @functools.wraps(original)
        def init_and_patch(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            patch._adopt(self)

        self._replacement = init_and_patch
        peft.PeftModel.__init__ = init_and_patch  # type: ignore[method-assign]
        self._adapted: weakref.WeakSet[Any] = weakref.WeakSet()
        self._trainers = transformers.Trainer.__init__
        of_trainers = transformers.Trainer.__init__

        @functools.wraps(of_trainers)
        def init_and_adapt(self: Any, *args: Any, **kwargs: Any) -> None:
            of_trainers(self, *args, **kwargs)
            if methods.put_in(self):
                patch._adapted.add(self)

        self._of_trainers = init_and_adapt
        transformers.Trainer.__init__ = init_and_adapt  # type: ignore[method-assign]

    def _adopt(self, model: nn.Module) -> None:
        try:
            kernels = _launches_known(model) if self._backend == "triton" else {}
            patch_model(model, backend=self._backend, strict=self._strict, kernels=kernels)
        except ModelError as error:
            if self._strict:
                raise
            log.warning("%s stays stock: %s", type(model).__name__, error)
            return
        for each in dict.fromkeys((base_model(model), model)):
            list_in(self._models, each)

    def undo(self) -> None:
        """Restore PEFT, and every model that was patched through it and still lives, its deep copies too."""
        import peft
        import transformers

        from fastft.training import methods

        if self._original is None:
            return
        if (peft.PeftModel.__init__, transformers.Trainer.__init__) != (self._replacement, self._of_trainers):
            raise FastftError("another patch lies over this one", fix="undo the later patch_hf_training() first")
        peft.PeftModel.__init__ = self._original  # type: ignore[method-assign]
        transformers.Trainer.__init__ = self._trainers  # type: ignore[method-assign]
        self._original = None
        for trainer in list(self._adapted):
            methods.take_out(trainer)
        for model in list(self._models):
            unpatch_model(model)
        forget_the_gone()

    def __enter__(self) -> "HfPatch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def _put_backend_in(
    adapted: Any, config: RunConfig, shape: ModelShape | None, device: Device, checkpointing: bool | str
) -> None:
    backend = _backend_name(config.backend, device)
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


def _backend_name(wanted: str, device: Device) -> str:
    from fastft.defaults import resolve_backend

    return resolve_backend(RunConfig.load(backend=wanted), device)


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


def _launches_known(model: Any) -> dict[str, list[int]]:
    """The launches in plans for models of these sizes and this rank; a bucket says itself for which tensors it is."""
    from fastft.planning import plan_key

    base = model.get_base_model()
    try:
        shape = shape_of(base.config)
    except (ModelError, AttributeError):
        return {}
    key = plan_key(RunConfig(), shape, detect_device("auto"))
    ranks = {getattr(config, "r", None) for config in model.peft_config.values()}
    launches: dict[str, list[int]] = {}
    for plan in [*PlanStore().entries(), *ShippedPlans().entries()]:
        same = plan.key.model_shape == key.model_shape and plan.key.lora_rank in ranks
        if same and launches_hold(plan.key, key):
            launches = {**plan.choices.kernels, **launches}
    return launches


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
