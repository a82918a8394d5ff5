"""Session: a model with adapters, its optimizer, and one optimizer step at a time.

What the tuner's probes and the bench's workers run: a plain loop without logging or saving, so that what is
measured is the training step and nothing else.  `fastft train` runs `training.trainer` instead.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastft.config import RunConfig
from fastft.engine.clipping import clip_gradients_
from fastft.engine.loss import IGNORED
from fastft.engine.packed import tell_documents
from fastft.engine.patch import ledger_of, patch_model
from fastft.errors import ConfigError, MeasureError
from fastft.hardware import detect_device
from fastft.models.loading import load_model, load_tokenizer, resolve_model, torch_dtype
from fastft.models.spec import SPECS
from fastft.plan import Choices, keeps_input_only
from fastft.training.optimizers import make_optimizer

Batch = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gave."""

    loss: float
    """Σ cross-entropy over the global batch's labelled tokens, over their count."""
    gradient_norm: float
    """The 2-norm over all adapter gradients, before clipping."""


class Session:
    """One model being trained; see `build_session`."""

    def __init__(
        self, model: Any, tokenizer: Any, config: RunConfig, choices: Choices, device: str, dtype: torch.dtype
    ) -> None:
        self.model, self.tokenizer, self.config, self.choices = model, tokenizer, config, choices
        self.device, self.dtype = torch.device(device), dtype
        # `from_pretrained` leaves the base model in evaluation mode, and PEFT's wrapper does not change that.
        model.train()
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(
            config.optimizer, self.parameters, learning_rate=config.learning_rate, weight_decay=config.weight_decay
        )
        self._scaler = torch.amp.GradScaler(self.device.type) if dtype == torch.float16 else None

    @property
    def gradient_scale(self) -> float:
        """By how much `forward_backward`'s gradients are larger than the loss's: fp16 trains with a scaled loss."""
        return 1.0 if self._scaler is None else float(self._scaler.get_scale())

    def ledger(self) -> dict[str, int]:
        """How many modules run on each path; `{"model: stock": 1}` for backend peft."""
        ledger = ledger_of(self.model)
        return ledger.counts() if ledger is not None else {"model: stock": 1}

    def step(self, batch: Batch) -> StepResult:
        """One optimizer step on a global batch (B × S tensors on the CPU; see `docs/design.md`).

        Raises:
            MeasureError: the loss or the gradient is not finite; an infinite gradient is none in fp16, where the loss
                scale is still being found.
        """
        loss = self.forward_backward(batch)
        if self._scaler is not None:
            self._scaler.unscale_(self.optimizer)
        limit = self.config.max_gradient_norm or float("inf")
        norm = clip_gradients_(self.parameters, limit)
        if self._scaler is not None:
            self._scaler.step(self.optimizer)
            self._scaler.update()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        result = StepResult(float(loss), float(norm))
        if not (math.isfinite(result.loss) and (self._scaler is not None or math.isfinite(result.gradient_norm))):
            raise MeasureError("training diverged", got=f"loss {result.loss}, gradient norm {result.gradient_norm}")
        return result

    def told(self, micro_batch: Batch) -> dict[str, Any]:
        """A micro-batch on the CPU with all that the model's forward can use: where packed documents start, if the
        engine runs it.  Stock models of some families would refuse to be told."""
        engine_runs = self.choices.backend != "peft" and self.model.config.model_type in SPECS
        return tell_documents(micro_batch) if engine_runs else dict(micro_batch)

    def forward_backward(self, batch: Batch) -> torch.Tensor:
        """Add the global batch's gradients to the adapters; its loss, detached, on the device."""
        items = int((batch["labels"][:, 1:] != IGNORED).sum())
        total = torch.zeros((), device=self.device)
        for part in micro_batches(batch, self.choices.micro_batch):
            inputs = {name: _moved(value, self.device) for name, value in self.told(part).items()}
            with self._autocast():
                loss = self.model(**inputs, num_items_in_batch=max(items, 1), use_cache=False).loss
            total += loss.detach().float()
            (loss if self._scaler is None else self._scaler.scale(loss)).backward()
            # Held over the next forward, the outputs would keep a whole step's tensors alive.
            del loss, inputs
        return total

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value


def micro_batches(batch: Batch, size: int) -> Iterator[dict[str, torch.Tensor]]:
    """The global batch in parts of `size` rows, each cut to its own longest row where it is padded to the right."""
    for start in range(0, batch["input_ids"].shape[0], size):
        part = {name: tensor[start : start + size] for name, tensor in batch.items()}
        if "attention_mask" in part:
            mask = part["attention_mask"]
            columns = mask.any(0).nonzero()
            longest = int(columns[-1]) + 1 if columns.numel() else 1
            part = {name: tensor[:, :longest] for name, tensor in part.items()}
        yield part


def build_session(config: RunConfig, choices: Choices, *, seed: int | None = None) -> Session:
    """Load the model, add LoRA, put the backend in, make the optimizer.

    `choices.backend` peft is stock: no patch, and gradient checkpointing where the placement is `full`.  `seed`
    (default: the configuration's) fixes the initial adapter.

    Raises:
        FastftError: whatever loading and patching raise.
    """
    found = detect_device(config.device)
    device = found.kind
    dtype = torch_dtype(config.dtype, found)
    seed = config.seed if seed is None else seed
    resolved = resolve_model(config.model, offline=config.offline, trust_remote_code=config.trust_remote_code)
    model = load_model(
        resolved,
        dtype=dtype,
        device=device,
        quantization=config.quantization,
        offline=config.offline,
        trust_remote_code=config.trust_remote_code,
    )
    model = add_adapters(model, config, seed=seed)
    put_in(model, choices, strict=config.strict)
    tokenizer = load_tokenizer(resolved, offline=config.offline, trust_remote_code=config.trust_remote_code)
    return Session(model, tokenizer, config, choices, device, dtype)


def put_in(model: Any, choices: Choices, *, strict: bool) -> None:
    """Make an adapted model that is stock run as `choices` say; see `build_session`.

    Raises:
        FastftError: as `fastft.engine.patch.patch_model`.
    """
    if choices.backend != "peft":
        patch_model(model, backend=choices.backend, strict=strict, **choices.for_model)
    elif all(map(keeps_input_only, choices.placement)):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()


def add_adapters(model: Any, config: RunConfig, *, seed: int) -> Any:
    """The `PeftModel` around `model` that `config.lora` describes; initialised from `seed` as PEFT does.

    A quantized model keeps its norms and its head in the compute dtype.  `prepare_model_for_kbit_training` would make
    them fp32, and with them every activation between the layers, which doubles those.
    """
    from peft import get_peft_model

    torch.manual_seed(seed)
    return get_peft_model(model, adapter_config(model, config))


def adapter_config(model: Any, config: RunConfig, *, task: str = "CAUSAL_LM") -> Any:
    """PEFT's configuration of the adapter that `config.lora` describes, for `model`.

    Raises:
        ConfigError: a target that names no module.
    """
    from peft import LoraConfig

    lora = config.lora
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=_targets(model, lora.targets),
        use_rslora=lora.rslora,
        bias="none",
        task_type=task,
    )


def _targets(model: Any, chosen: tuple[str, ...] | None) -> list[str] | str:
    """What PEFT is to adapt: `chosen`, or every linear layer of the decoder layers."""
    family = model.config.model_type
    if chosen is None:
        return list(SPECS[family].targets) if family in SPECS else "all-linear"
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    missing = [target for target in chosen if target.rpartition(".")[2] not in names]
    if missing:
        linears = SPECS[family].targets if family in SPECS else sorted(_linear_names(model))
        raise ConfigError(
            "lora.targets names no module of this model", got=", ".join(missing), allowed=linears, fix="leave it out"
        )
    return list(chosen)


def _linear_names(model: Any) -> set[str]:
    return {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
