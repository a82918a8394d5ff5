"""What `fastft train` costs over the plain loop: the same rows through both.

    python -m bench loop path/to/model --seq-len 2048 --batch-size 4 --packing --steps 200 --output runs/loop

The plain loop is `Session.step` over batches that were made before; the real one is `fastft.training.trainer.train`
with its data loading, logging, schedule and saving.  The plain one reads each step's loss, as plain loops do, and so
waits for the device at every step.  Both do what the same plan, or default, says.
"""

import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import BaseModel, ConfigDict

from bench.results import Result, facts
from fastft.config import RunConfig
from fastft.errors import ConfigError
from fastft.files import new_folder
from fastft.hardware import detect_device

LOOP = "loop.json"
LOOP_SCHEMA = 1
TARGET = 1.05
"""How much longer than the plain loop's a step of the real one may take."""


class Timed(BaseModel):
    """One loop: the steps after the warm-up."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seconds: float
    """From the end of the last warm-up step to the end of the last step, the device idle at both."""
    tokens: int
    """Without padding."""
    step_ms: list[float]
    """Between the ends of two steps on the host, which runs ahead of a GPU: their sum counts, and what stands out."""

    @property
    def tokens_per_second(self) -> float:
        """Of the steps that were timed."""
        return self.tokens / self.seconds


class Loops(Result):
    """`loop.json`."""

    loop: int = LOOP_SCHEMA
    plan_id: str | None
    choices: str
    plain: Timed
    trained: Timed

    @property
    def overhead(self) -> float:
        """Time a token of the real loop over that of the plain one, less 1."""
        return self.plain.tokens_per_second / self.trained.tokens_per_second - 1


def compare_loops(config: RunConfig, folder: Path, *, warmup: int, say: Callable[[str], None]) -> Loops:
    """Run both loops for `config.steps` steps, the first `warmup` of which do not count; write `folder/loop.json`.

    Raises:
        ConfigError: fewer steps than two beyond the warm-up.
        FastftError: whatever training raises.
    """
    from fastft.training.trainer import resolve_run

    if config.steps < warmup + 2:
        raise ConfigError("too few steps", got=config.steps, allowed=f"{warmup + 2} and more", fix="raise --steps")
    device = detect_device(config.device)
    resolution = resolve_run(config, device)
    new_folder(folder, what="output")
    say(resolution.message)
    # The plain loop first: what the device's clocks lose by warmth is then the real loop's loss.
    plain = _plain(config, resolution.choices, warmup)
    say(f"plain loop: {plain.tokens_per_second:,.0f} tokens/s, median step {median(plain.step_ms):.1f} ms")
    trained = _real(config.model_copy(update={"output": str(folder / "adapter")}), warmup)
    say(f"fastft train: {trained.tokens_per_second:,.0f} tokens/s, median step {median(trained.step_ms):.1f} ms")
    result = Loops(
        **facts(config, device), plan_id=None if resolution.plan is None else resolution.plan.id,
        choices=resolution.choices.summary(), plain=plain, trained=trained,
    )  # fmt: skip
    result.write(folder / LOOP)
    return result


class _Clock:
    """When each step ended; the device is waited for at the two ends of what is timed."""

    def __init__(self, first: int, last: int) -> None:
        self._ends = {first, last}
        self._steps, self._times = 0, list[float]()

    def step(self) -> None:
        """A step was launched."""
        import torch

        self._steps += 1
        if self._steps in self._ends and torch.cuda.is_available():
            torch.cuda.synchronize()
        if self._steps >= min(self._ends):
            self._times.append(time.perf_counter())

    def timed(self, tokens: int) -> Timed:
        """What was timed, with the tokens of those steps."""
        step_ms = [1e3 * (end - start) for start, end in pairwise(self._times)]
        return Timed(seconds=self._times[-1] - self._times[0], tokens=tokens, step_ms=step_ms)


def _real(config: RunConfig, warmup: int) -> Timed:
    import transformers

    from fastft.measure.memory import release_cached
    from fastft.training.trainer import train

    clock = _Clock(warmup, config.steps)

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.step()

    result = train(config, callbacks=[Watch()])
    # Every batch has as many samples, so the steps share the tokens evenly but for the rows' own lengths.
    tokens = result.tokens_per_second * result.seconds * (config.steps - warmup) / config.steps
    release_cached()
    return clock.timed(round(tokens))


def _plain(config: RunConfig, choices: Any, warmup: int) -> Timed:
    from fastft.data.sources import global_batches
    from fastft.measure.memory import release_cached
    from fastft.measure.steps import real_tokens
    from fastft.training.session import build_session
    from fastft.training.trainer import training_samples

    session = build_session(config, choices)
    samples, collate = training_samples(config, session.tokenizer, lambda line: None)
    groups = global_batches(samples, batch_size=config.batch_size, steps=config.steps, seed=config.seed)
    batches = [collate(group) for group in groups]
    clock = _Clock(warmup, config.steps)
    for batch in batches:
        session.step(batch)
        clock.step()
    timed = clock.timed(sum(map(real_tokens, batches[warmup:])))
    del session
    release_cached()
    return timed
