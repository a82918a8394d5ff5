"""The rig: one loaded model on which configuration after configuration is measured.

Loading costs more than measuring, so a grid loads once and changes how the model runs; `autotune.probe` measures the
same steps in a process of its own each.
"""

import gc
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from autotune.probe import is_out_of_memory, trial_of
from bench.weights import randomise_adapter
from fastft.config import RunConfig
from fastft.data.sources import random_batch
from fastft.engine.graphs import WARM_RUNS
from fastft.engine.patch import unpatch_model
from fastft.errors import MeasureError
from fastft.measure.steps import Samples, measure_steps
from fastft.plan import Choices, Trial
from fastft.training.session import build_session, put_in

EXACT_AGREEMENT, ROUNDED_AGREEMENT = 1e-3, 0.05
"""By how much losses and gradient norms of one batch may differ between configurations, as a fraction.  In fp32 only
the order of sums differs; in 16 bits the gradients' own rounding error against fp32 was measured as 0.057 on an H200.
What a configuration gets wrong (a micro-batch, a layer, a term of a gradient) is more."""
WARM_MICRO_BATCHES = WARM_RUNS + 1
"""CUDA graphs are recorded of a shape that came so often: earlier, a step is not yet what it will be."""


@dataclass(frozen=True)
class Outcome:
    """What the batches of a trial gave, by step."""

    loss: list[float]
    gradient_norm: list[float]


class Rig:
    """A model with adapters and its optimizer, loaded once.

    The learning rate is zero: the optimizer does all its work and the model stands still, so that hundreds of
    configurations see the same weights, and every one must come to the same losses and gradients.
    """

    def __init__(self, config: RunConfig, *, seed: int = 0) -> None:
        """Load `config.model`; `seed` is of the adapter and the batches."""
        self.config, self.seed = config, seed
        stock = Choices(backend="peft", micro_batch=config.batch_size, accumulation=1, placement=["light"])
        self.session = build_session(config, stock, seed=seed)
        # B starts at zero, and so would every gradient of A for as long as the model stands still.
        randomise_adapter(self.session.model, seed=seed)
        for group in self.session.optimizer.param_groups:
            group["lr"] = 0.0
        self._expected: Outcome | None = None

    def measure(self, choices: Choices, *, warmup_steps: int, timed_steps: int) -> Trial:
        """Full optimizer steps of `choices`; whatever fails is the trial's verdict.

        The peak is of all steps, the times are of the last `timed_steps`; before those are at least `warmup_steps`, and
        `WARM_MICRO_BATCHES` micro-batches.
        """
        warmup_steps = max(warmup_steps, -(-WARM_MICRO_BATCHES // choices.accumulation))
        found: Samples | None = None
        verdict, detail = "ok", ""
        try:
            self._put(choices)
            found = measure_steps(self.session, self._batches(warmup_steps + timed_steps))
        except Exception as error:
            verdict = "out_of_memory" if is_out_of_memory(error) else "failed"
            detail = f"{type(error).__name__}: {str(error)[:400]}"
        # Only here, with the exception and its frames gone, can what the failed step held be freed.
        if found is None or found.memory is None:
            peak = self._recover()
            return Trial(choices=choices, verdict=verdict, peak_bytes=peak, detail=detail)  # type: ignore[arg-type]
        trial = trial_of(choices, found, found.memory, warmup_steps, None)
        if (difference := self._difference(found)) is not None:
            return trial.model_copy(update={"verdict": "parity_failed", "detail": difference})
        return trial

    def require_device(self) -> None:
        """Check that the next configuration can be measured: after some errors a GPU answers this process no more.

        Raises:
            MeasureError: it does not.
        """
        if self.session.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise MeasureError(
                "the device does not answer any more", got=str(error).splitlines()[0], fix="start the process again"
            ) from error

    def _put(self, choices: Choices) -> None:
        """Make the model run as `choices` say."""
        model: Any = self.session.model
        self.session.choices = choices
        unpatch_model(model)
        if self.session.device.type == "cuda":
            # cuBLAS keeps a workspace for each stream that it ever ran on: those of the last configuration's recordings
            # must not count for this one.  Its graphs, which refer to them, go first.
            gc.collect()
            torch._C._cuda_clearCublasWorkspaces()
        model.gradient_checkpointing_disable()
        model.disable_input_require_grads()
        put_in(model, choices, strict=self.config.strict)

    def _batches(self, count: int) -> "list[dict[str, torch.Tensor]]":
        vocabulary = self.session.model.config.vocab_size
        return [
            random_batch(vocabulary, self.config.batch_size, self.config.sequence_tokens, seed=self.seed + step)
            for step in range(count)
        ]

    def _difference(self, found: Samples) -> str | None:
        """How what the steps computed differs from the first configuration's; None if it does not.

        Dropout draws its masks by micro-batch, so with it nothing can be compared.
        """
        if self.config.lora.dropout:
            return None
        outcome = Outcome(found.loss, found.gradient_norm)
        if self._expected is None:
            self._expected = outcome
            return None
        allowed = EXACT_AGREEMENT if self.session.dtype == torch.float32 else ROUNDED_AGREEMENT
        for name in ("loss", "gradient_norm"):
            pairs = zip(getattr(outcome, name), getattr(self._expected, name), strict=False)
            for step, (mine, first) in enumerate(pairs, 1):
                if not abs(mine - first) <= allowed * abs(first):
                    return f"{name} of step {step} is {mine:.6g}, the first configuration's {first:.6g}"
        return None

    def _recover(self) -> int | None:
        """Free everything that a failed step held; the peak that it reached on a GPU, a lower bound of its need."""
        with suppress(RuntimeError):  # of a device that is lost: `require_device` says so
            self.session.optimizer.zero_grad(set_to_none=True)
            unpatch_model(self.session.model)
            gc.collect()
            if self.session.device.type == "cuda":
                peak = int(torch.cuda.max_memory_allocated())
                torch.cuda.empty_cache()
                return peak
        return None
