"""AdaLoRA's rank allocation in a `Trainer`.

PEFT asks for `update_and_allocate` after each optimizer step, and no trainer of transformers or TRL calls it: AdaLoRA
then never prunes a rank.  A script that calls it itself needs nothing from here.

    trainer.add_callback(fastft.AdaLoraCallback())

Source of the method: "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning",
https://huggingface.co/papers/2303.10512; the allocation itself is PEFT's `RankAllocator`.
"""

from typing import Any

from peft import PeftModel
from peft.tuners.adalora import AdaLoraModel
from transformers import TrainerCallback

from fastft.errors import ConfigError


class AdaLoraCallback(TrainerCallback):
    """Calls PEFT's `update_and_allocate` after each optimizer step, while the gradients are still there."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that there is something to call, and that PEFT's schedule ends with the training.

        Raises:
            ConfigError: the model has no AdaLoRA adapter, or its `total_step` is not the number of steps.
        """
        for config in _tuner(kwargs.get("model")).peft_config.values():
            total = getattr(config, "total_step", None)
            if total is not None and total != state.max_steps:
                raise ConfigError(
                    "AdaLoraConfig.total_step is not the number of optimizer steps", got=total,
                    allowed=state.max_steps, fix=f"set total_step={state.max_steps}",
                )  # fmt: skip

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Between the optimizer's step and `zero_grad`, as PEFT asks."""
        _tuner(kwargs.get("model")).update_and_allocate(state.global_step)


def _tuner(model: Any) -> Any:
    """The AdaLoRA tuner in a model, below what may be wrapped around it."""
    while hasattr(model, "module"):
        model = model.module
    tuner = model.base_model if isinstance(model, PeftModel) else model
    if not isinstance(tuner, AdaLoraModel):
        raise ConfigError(
            "AdaLoraCallback needs a model with an AdaLoRA adapter", got=type(tuner).__name__,
            fix="adapt it with peft.AdaLoraConfig, or leave the callback out",
        )  # fmt: skip
    return tuner
