"""Measuring optimizer steps: time, loss, gradient norm, the work done, peak memory."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from fastft.data.sources import batch_sha256
from fastft.measure.memory import PeakMemory
from fastft.record import Memory

if TYPE_CHECKING:
    from fastft.training.session import Batch, Session


@dataclass
class Samples:
    """One value a step, the first steps (warm-up) included."""

    step_time_ms: list[float] = field(default_factory=list)
    step_tokens: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    gradient_norm: list[float] = field(default_factory=list)
    batch_sha256: list[str] = field(default_factory=list)
    memory: Memory | None = None


def measure_steps(
    session: "Session",
    batches: "Iterable[Batch]",
    on_step: Callable[[int, Samples], None] | None = None,
) -> Samples:
    """Run one optimizer step a global batch and measure each.

    The time of a step is wall-clock time between two points where the device is idle; making and hashing the batch
    lies outside of it.  `on_step(index, samples)` is called after each step.
    """
    samples = Samples()
    peak = PeakMemory(session.device)
    peak.start()
    for index, batch in enumerate(batches):
        samples.batch_sha256.append(batch_sha256(batch))
        samples.step_tokens.append(real_tokens(batch))
        _synchronize(session.device)
        started = time.perf_counter()
        result = session.step(batch)
        _synchronize(session.device)
        samples.step_time_ms.append(1000.0 * (time.perf_counter() - started))
        samples.loss.append(result.loss)
        samples.gradient_norm.append(result.gradient_norm)
        if on_step is not None:
            on_step(index, samples)
    samples.memory = peak.stop()
    return samples


def real_tokens(batch: "Batch") -> int:
    """Tokens of a batch without its padding."""
    mask = batch.get("attention_mask")
    return int(mask.sum()) if mask is not None else batch["input_ids"].numel()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
