"""What the probes say about memory and time, beyond the points they measured.

Two models, each fitted to one backend:  peak = model + a · tokens  over micro-batches of one placement, and
what a layer costs under each policy at one micro-batch, from the uniform placements.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from autotune.solver import PolicyCost
from autotune.space import uniform_policy
from fastft.config import RunConfig
from fastft.hardware import Device
from fastft.memory.model import memory_terms, recompute_flops, step_flops
from fastft.models.shapes import ModelShape
from fastft.plan import OFFLOADED, POLICIES, Choices, Policy, Trial

MEASURED = ("ok", "over_cap")
"""Verdicts of trials that ran to the end: their times and peaks count."""


@dataclass(frozen=True)
class PeakFit:
    """peak_bytes ≈ base_bytes + bytes_per_token · tokens of a micro-batch."""

    base_bytes: float
    bytes_per_token: float
    points: int

    def predict(self, tokens: int) -> float:
        """The peak for micro-batches of `tokens` tokens."""
        return self.base_bytes + self.bytes_per_token * tokens


def fit_peaks(trials: Iterable[Trial], sequence_tokens: int) -> dict[tuple[str, Policy], PeakFit]:
    """One fit a backend and uniform placement.

    Least squares where two or more micro-batches were measured; with one, the line from the measured model to
    the measured peak.  The slope is never negative.
    """
    points: dict[tuple[str, Policy], list[tuple[int, int, int]]] = {}
    for trial in trials:
        policy = uniform_policy(trial.choices)
        if trial.verdict in MEASURED and policy and trial.peak_bytes is not None and trial.model_bytes is not None:
            tokens = trial.choices.micro_batch * sequence_tokens
            points.setdefault((trial.choices.backend, policy), []).append((tokens, trial.peak_bytes, trial.model_bytes))
    fits = {}
    for which, measured in points.items():
        sizes = [tokens for tokens, _, _ in measured]
        mean_size = sum(sizes) / len(sizes)
        mean_peak = sum(peak for _, peak, _ in measured) / len(measured)
        if len(set(sizes)) == 1:
            model = min(model for _, _, model in measured)
            fits[which] = PeakFit(model, max(0.0, (mean_peak - model) / mean_size), 1)
            continue
        covariance = sum((tokens - mean_size) * (peak - mean_peak) for tokens, peak, _ in measured)
        slope = max(0.0, covariance / sum((tokens - mean_size) ** 2 for tokens in sizes))
        fits[which] = PeakFit(mean_peak - slope * mean_size, slope, len(set(sizes)))
    return fits


def predicted_too_large(
    candidate: Choices, trials: Iterable[Trial], sequence_tokens: int, limit_bytes: int, margin: float = 1.05
) -> bool:
    """Whether at least two measured micro-batches of the same kind say that `candidate` exceeds the limit clearly."""
    policy = uniform_policy(candidate)
    if policy is None:
        return False
    fit = fit_peaks(trials, sequence_tokens).get((candidate.backend, policy))
    tokens = candidate.micro_batch * sequence_tokens
    return fit is not None and fit.points >= 2 and fit.predict(tokens) > margin * limit_bytes


@dataclass(frozen=True)
class LayerCosts:
    """Prices and bytes of one layer by policy, at one backend and micro-batch."""

    costs: dict[Policy, PolicyCost]
    base_ms: float
    """A step's time beyond the layers' prices."""
    base_bytes: int
    """A step's peak beyond the layers' bytes."""


def layer_costs(
    trials: Sequence[Trial], backend: str, micro_batch: int, *, shape: ModelShape, config: RunConfig, device: Device
) -> LayerCosts | None:
    """What each policy costs a layer, relative to the one that saves least; None if no uniform placement ran.

    A measured uniform placement divides its time and peak by the number of layers.  A policy that did not run
    (it had too little memory) is taken from the nearest measured one and the analytic difference.  The result is
    a guess where it is mixed: a probe of the solved placement confirms or refutes it.
    """
    measured: dict[Policy, tuple[float, int]] = {}
    for trial in trials:
        policy = uniform_policy(trial.choices)
        same = trial.choices.backend == backend and trial.choices.micro_batch == micro_batch
        if policy and same and trial.verdict in MEASURED and trial.step_time_ms and trial.peak_bytes is not None:
            measured[policy] = (median(trial.step_time_ms), trial.peak_bytes)
    if not measured:
        return None
    some = next(t.choices for t in trials if t.choices.backend == backend and t.choices.micro_batch == micro_batch)
    uniform = {p: some.model_copy(update={"placement": [p] * shape.layers}) for p in POLICIES}
    peaks = {p: memory_terms(shape, uniform[p], config, device).peak(uniform[p].placement) for p in POLICIES}
    flops = step_flops(shape, config.sequence_tokens)
    work = {p: 1 + recompute_flops(shape, p, config.sequence_tokens, backend) / flops for p in POLICIES}
    # keep's gain over light is traffic, which FLOPs do not show: unmeasured, it is not offered to the solver.
    # On a CPU there is nowhere to offload to.
    offered = [p for p in POLICIES if p != "keep" and (p not in OFFLOADED or device.kind == "cuda")]
    for policy in (p for p in offered if p not in measured):
        anchor = min(measured, key=lambda p: abs(POLICIES.index(p) - POLICIES.index(policy)))
        time, peak = measured[anchor]
        measured[policy] = (time * work[policy] / work[anchor], peak + peaks[policy] - peaks[anchor])
    base_bytes = min(peak for _, peak in measured.values())
    base_ms = min(time for time, _ in measured.values())
    return LayerCosts(
        costs={
            policy: PolicyCost((time - base_ms) / shape.layers, -(-(peak - base_bytes) // shape.layers))
            for policy, (time, peak) in measured.items()
        },
        base_ms=base_ms,
        base_bytes=base_bytes,
    )
