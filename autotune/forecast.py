"""How long a step of a candidate takes in comparison with others, before it was measured: arithmetic.

It orders the candidates, so that the first measurements are the promising ones, and drops those that are far behind
something measured.  What is close is left to the probes.
"""

from collections.abc import Sequence
from statistics import median

from autotune.ranking import MEASURED
from fastft.config import RunConfig
from fastft.hardware import Device
from fastft.memory.work import step_work
from fastft.models.shapes import ModelShape
from fastft.plan import Choices, Trial

SLOWER_BACKEND = {"triton": 1.0, "eager": 1.2, "peft": 1.5}
"""Assumed step times over the Triton engine's (docs/log.md: stock PEFT 1.49 to 1.88); replaced by a ratio of measured
times as soon as the backend ran once."""
FAR_BEHIND, FAR_BEHIND_UNSEEN = 0.10, 0.20
"""A candidate whose forecast is slower than the best measured step by more than this share is not tried; the second
where no trial had its micro-batch, as how a device takes to few tokens is what arithmetic knows least of."""


def forecast(choices: Choices, config: RunConfig, shape: ModelShape, device: Device) -> float:
    """A step's time, in FLOPs a token that the Triton engine does in it."""
    return SLOWER_BACKEND.get(choices.backend, 1.0) * step_work(shape, choices, config, device)


def far_behind(
    candidate: Choices, trials: Sequence[Trial], config: RunConfig, shape: ModelShape, device: Device
) -> str | None:
    """Why the candidate's forecast is hopeless after `trials`; None where it is not, or its backend never ran.

    The forecast is the step time of the trial with the same backend and the nearest micro-batch, times the ratio of
    their forecasts.
    """
    ran = [trial for trial in trials if trial.verdict in MEASURED and trial.step_time_ms]
    fits = [median(trial.step_time_ms) for trial in ran if trial.verdict == "ok"]
    of_backend = [trial for trial in ran if trial.choices.backend == candidate.backend]
    if not fits or not of_backend:
        return None
    anchor = min(of_backend, key=lambda t: (abs(t.choices.micro_batch - candidate.micro_batch), median(t.step_time_ms)))
    ratio = forecast(candidate, config, shape, device) / forecast(anchor.choices, config, shape, device)
    time_ms = median(anchor.step_time_ms) * ratio
    seen = anchor.choices.micro_batch == candidate.micro_batch
    if time_ms <= (1 + (FAR_BEHIND if seen else FAR_BEHIND_UNSEEN)) * min(fits):
        return None
    return f"forecast {time_ms:,.0f} ms a step, {time_ms / min(fits):.2f}× the best measured"


def beaten_by_one_alike(
    candidate: Choices, trials: Sequence[Trial], config: RunConfig, shape: ModelShape, device: Device
) -> str | None:
    """Why a candidate is not worth a probe: one of the same backend and micro-batch fits and is forecast to be faster.

    Choices that are fitted with some headroom are for the case that the default, fitted with less, does not fit.  A
    uniform candidate is worth a probe all the same where its policy did not run as one: the solver wants its price.
    """
    policies = set(candidate.placement)
    for trial in trials:
        other = trial.choices
        alike = (other.backend, other.micro_batch) == (candidate.backend, candidate.micro_batch)
        if not alike or trial.verdict != "ok" or (len(policies) == 1 and policies != set(other.placement)):
            continue
        if forecast(other, config, shape, device) < forecast(candidate, config, shape, device):
            return f"forecast slower than {other.summary()}, which fits"
    return None
