"""How long a step of a candidate takes in comparison with others, before it was measured: arithmetic.

It orders the candidates, so that the first measurements are the promising ones, and drops those that are far behind
something measured.  What is close is left to the probes.
"""

from collections.abc import Sequence
from statistics import median

from autotune.ranking import MEASURED
from fastft.config import RunConfig
from fastft.hardware import Device
from fastft.memory.model import recompute_flops, step_flops
from fastft.models.shapes import ModelShape
from fastft.plan import OFFLOADED, Choices, Trial

HALF_SPEED_TOKENS = {"cuda": 256, "cpu": 16}
"""Assumed micro-batch at which a device runs at half its speed."""
SLOWER_BACKEND = {"triton": 1.0, "eager": 1.2, "peft": 1.5}
"""Assumed step times over the Triton engine's (docs/log.md: stock PEFT 1.49 to 1.88); replaced by a ratio of measured
times as soon as the backend ran once."""
DEQUANTIZED_FLOPS = 1000
"""What a GPU computes while it dequantizes one weight forward and backward: an H200 650e12 FLOP/s over 4.8e12 byte/s,
three times 2.5 bytes."""
OFFLOADED_SHARE = 0.02
"""Assumed share of a step by which copies to the host that are hidden behind the computation still slow it down."""
FAR_BEHIND = 0.10
"""A candidate whose forecast is slower than the best measured step by more than this share is not tried."""


def relative_time(choices: Choices, config: RunConfig, shape: ModelShape, device: Device) -> float:
    """A step's time in multiples of one that computes nothing again, at full speed, on the Triton engine."""
    tokens = choices.micro_batch * config.sequence_tokens
    of_step = shape.layers * step_flops(shape, config.sequence_tokens)
    again = sum(recompute_flops(shape, p, config.sequence_tokens, choices.backend) for p in choices.placement)
    if config.quantization != "none":
        again += (shape.layers - choices.resident_layers) * shape.linear_weights * DEQUANTIZED_FLOPS / tokens
    moved = OFFLOADED_SHARE * sum(policy in OFFLOADED for policy in choices.placement) / shape.layers
    speed = tokens / (tokens + HALF_SPEED_TOKENS[device.kind])
    return SLOWER_BACKEND.get(choices.backend, 1.0) * (1 + again / of_step + moved) / speed


def far_behind(
    candidate: Choices, trials: Sequence[Trial], config: RunConfig, shape: ModelShape, device: Device
) -> str | None:
    """Why the candidate's forecast is hopeless after `trials`; None where it is not, or its backend never ran.

    The forecast is the step time of the trial with the same backend and the nearest micro-batch, times the ratio of
    `relative_time`.
    """
    ran = [trial for trial in trials if trial.verdict in MEASURED and trial.step_time_ms]
    fits = [median(trial.step_time_ms) for trial in ran if trial.verdict == "ok"]
    of_backend = [trial for trial in ran if trial.choices.backend == candidate.backend]
    if not fits or not of_backend:
        return None
    anchor = min(of_backend, key=lambda t: (abs(t.choices.micro_batch - candidate.micro_batch), median(t.step_time_ms)))
    ratio = relative_time(candidate, config, shape, device) / relative_time(anchor.choices, config, shape, device)
    forecast = median(anchor.step_time_ms) * ratio
    if forecast <= (1 + FAR_BEHIND) * min(fits):
        return None
    return f"forecast {forecast:,.0f} ms a step, {forecast / min(fits):.2f}× the best measured"
