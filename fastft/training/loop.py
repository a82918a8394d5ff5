"""What the loops of all methods share: how a run is told to a trainer, and what is counted of it."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from fastft.config import RunConfig
from fastft.hardware import Device
from fastft.plan import Choices


@dataclass(frozen=True)
class Loop:
    """A trainer that is ready to train."""

    trainer: Any
    model: Any
    """A `PeftModel`."""
    tokenizer: Any
    device: Any
    """A `torch.device`."""
    counter: "TokenCounter | None"
    """None where the trainer counts its tokens itself."""
    evaluates: bool
    """Whether the trainer has held-out rows."""

    def count(self) -> Callable[[], int]:
        """From now on, count the tokens that are trained; what is returned says how many it were."""
        watch = _Watch(self.counter)
        self.trainer.add_callback(watch)
        return watch.tokens


class TokenCounter:
    """A collator that counts the real tokens of each batch, and knows how many batches were trained.

    The loader makes batches ahead of the loop, some that it never comes to.
    """

    def __init__(self, collate: Callable[..., dict[str, Any]], masks: Sequence[str] = ("attention_mask",)) -> None:
        """`masks` are those of a batch whose ones are its tokens; without any, all of its `input_ids` are."""
        self._collate, self._masks = collate, masks
        self._tokens: list[int] = []
        self.trained = 0

    def __call__(self, samples: list[Any]) -> dict[str, Any]:
        """A batch of `samples`."""
        batch = self._collate(samples)
        masks = [batch[name] for name in self._masks if name in batch]
        self._tokens.append(sum(int(mask.sum()) for mask in masks) if masks else batch["input_ids"].numel())
        return batch

    @property
    def tokens(self) -> int:
        """Of the batches that were trained."""
        return sum(self._tokens[: self.trained])


class _Watch(transformers.TrainerCallback):
    """Notes what was trained."""

    def __init__(self, counter: TokenCounter | None) -> None:
        self._counter = counter
        self._before = self._after = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._before = state.num_input_tokens_seen

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        if self._counter is not None:
            self._counter.trained += 1

    on_step_end = on_substep_end  # a step's last micro-batch

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._after = state.num_input_tokens_seen

    def tokens(self) -> int:
        """That were trained."""
        return self._after - self._before if self._counter is None else self._counter.tokens


def training_arguments(config: RunConfig, choices: Choices, device: Device, dtype: Any, output: Path) -> dict[str, Any]:
    """What `transformers.TrainingArguments`, and every class that extends it, is given for this run."""
    import torch

    return {
        "output_dir": str(output),
        "per_device_train_batch_size": choices.micro_batch,
        "gradient_accumulation_steps": choices.accumulation,
        "max_steps": config.steps,
        "num_train_epochs": config.epochs,
        "learning_rate": config.learning_rate,
        # transformers' `constant` has no warm-up.
        "lr_scheduler_type": "constant_with_warmup" if config.schedule == "constant" else config.schedule,
        "warmup_steps": config.warmup_steps,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_gradient_norm,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "use_cpu": device.kind == "cpu",
        "seed": config.seed,
        "logging_steps": config.log_steps,
        # A loss that is no number is to be seen, and to look for one the host would wait for the device at every step.
        "logging_nan_inf_filter": False,
        "save_strategy": "steps" if config.save_steps else "no",
        "save_steps": config.save_steps or 500,
        "report_to": [],
        "dataloader_pin_memory": device.kind == "cuda",
        # From pinned memory; the host then does not wait for the step before to copy a batch.
        "accelerator_config": {"non_blocking": device.kind == "cuda"},
        "disable_tqdm": not sys.stderr.isatty(),
    }
