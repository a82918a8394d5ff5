"""What the probes say about memory and time, beyond the points they measured.

Two models, each fitted to one backend:  peak = model + a · tokens  over micro-batches of one placement, and
what a layer costs under each policy at one micro-batch, from the uniform placements.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from autotune.ranking import MEASURED
from autotune.solver import PolicyCost, solve
from autotune.space import uniform_policy
from fastft.config import RunConfig
from fastft.files import canonical_json
from fastft.hardware import Device
from fastft.memory.model import memory_terms
from fastft.memory.work import layer_windows, recompute_flops, step_work
from fastft.models.shapes import ModelShape
from fastft.plan import OFFLOADED, POLICIES, Choices, Policy, Trial


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
    """Prices and bytes of each layer by policy, at one backend and micro-batch."""

    layers: list[dict[Policy, PolicyCost]]
    """From the first layer to the last."""
    base_ms: float
    """A step's time beyond the layers' prices."""
    base_bytes: int
    """A step's peak beyond the layers' bytes."""
    like: Choices
    """What was measured: all but its placement holds for what is solved."""
    policies: int
    """How many policies were measured, not inferred."""

    def solve(self, budget_bytes: float) -> tuple[float, Choices] | None:
        """(predicted step time in ms, choices) of the best placement whose predicted peak is at most the budget."""
        placement = solve(self.layers, int(budget_bytes - self.base_bytes))
        if placement is None:
            return None
        chosen = [costs[policy] for costs, policy in zip(self.layers, placement, strict=True)]
        time_ms = self.base_ms + sum(cost.price_ms for cost in chosen)
        return time_ms, self.like.model_copy(update={"placement": placement})

    def peak_of(self, placement: Sequence[Policy]) -> int:
        """The predicted peak in bytes."""
        costs = zip(self.layers, placement, strict=True)
        return self.base_bytes + sum(of_layer[policy].saved_bytes for of_layer, policy in costs)


def layer_costs(
    trials: Sequence[Trial], backend: str, micro_batch: int, *, shape: ModelShape, config: RunConfig, device: Device
) -> LayerCosts | None:
    """What each policy costs a layer, relative to the one that saves least; None if nothing ran.

    Trials are combined only if they are alike in everything but placement and launches: of such groups, the one that
    measured most policies, or of equals the fastest.  A measured uniform placement gives its time and peak.  A policy
    that did not run as one (it had too little memory) is taken from the nearest that did, or where none did from the
    fastest mixed placement, and the analytic difference.  The result is a guess where it is mixed: a probe of the
    solved placement confirms or refutes it.

    Layers that save alike may still differ in what recomputing them costs: attention of a layer with a window is
    cheaper.  The difference of two times is shared out by the layers' own FLOPs.  What dense copies of quantized
    weights (`Choices.resident_layers`) save a layer that recomputes is not told apart: they only take memory that is
    left over, where nothing is recomputed, and no measured pair of steps differs in them alone.
    """
    group = _group(trials, backend, micro_batch)
    if group is None:
        return None
    like = group.like
    measured, placed = dict(group.uniform), like.placement
    uniform = {p: like.model_copy(update={"placement": [p] * shape.layers}) for p in POLICIES}
    terms = memory_terms(shape, like, config, device)
    peaks = {p: terms.peak(uniform[p].placement) for p in POLICIES}
    work = {p: step_work(shape, uniform[p], config, device) for p in POLICIES}
    # keep's gain over light is traffic, which FLOPs do not show: unmeasured, it is not offered to the solver.
    # On a CPU there is nowhere to offload to.
    offered: list[Policy] = [p for p in POLICIES if p != "keep" and (p not in OFFLOADED or device.kind == "cuda")]
    for policy in offered:
        if policy in group.uniform:
            continue
        if group.uniform:
            rank = POLICIES.index(policy)
            anchor = min(group.uniform, key=lambda p: abs(POLICIES.index(p) - rank))
            (time, peak), work_then, peak_then = group.uniform[anchor], work[anchor], peaks[anchor]
        else:
            time, peak = group.mixed
            work_then, peak_then = step_work(shape, like, config, device), terms.peak(placed)
        measured[policy] = (time * work[policy] / work_then, peak + peaks[policy] - peak_then)
    base_bytes = min(peak for _, peak in measured.values())
    base_ms = min(time for time, _ in measured.values())
    layers: list[dict[Policy, PolicyCost]] = [{} for _ in range(shape.layers)]
    for policy, (time, peak) in measured.items():
        saved = -(-(peak - base_bytes) // shape.layers)
        for costs, share in zip(layers, _shares(shape, policy, config, backend), strict=True):
            costs[policy] = PolicyCost((time - base_ms) * share, saved)
    return LayerCosts(layers, base_ms, base_bytes, like, len(group.uniform))


@dataclass
class _Group:
    """What was measured of candidates that are alike in everything but placement and launches."""

    like: Choices
    """The fastest of them."""
    uniform: dict[Policy, tuple[float, int]]
    """Policy → step time in ms, peak in bytes."""
    mixed: tuple[float, int]
    """The fastest of all: time and peak."""


def _group(trials: Sequence[Trial], backend: str, micro_batch: int) -> _Group | None:
    """The group with most measured policies; of equals the one with the fastest trial."""
    groups: dict[str, _Group] = {}
    for trial in trials:
        choices = trial.choices
        same = choices.backend == backend and choices.micro_batch == micro_batch
        if not (same and trial.verdict in MEASURED and trial.step_time_ms and trial.peak_bytes is not None):
            continue
        time, peak = median(trial.step_time_ms), trial.peak_bytes
        group = groups.setdefault(
            canonical_json(choices.model_dump(exclude={"placement", "kernels"})), _Group(choices, {}, (time, peak))
        )
        if time < group.mixed[0]:
            group.like, group.mixed = choices, (time, peak)
        policy = uniform_policy(choices)
        if policy is not None:
            # Of several trials the fastest counts, as in `ranking`, and the highest peak.
            earlier_time, earlier_peak = group.uniform.get(policy, (time, peak))
            group.uniform[policy] = min(earlier_time, time), max(earlier_peak, peak)
    return max(groups.values(), key=lambda group: (len(group.uniform), -group.mixed[0]), default=None)


def _shares(shape: ModelShape, policy: Policy, config: RunConfig, backend: str) -> list[float]:
    """Each layer's part of what the policy costs in all; they sum to 1."""
    again = _recomputed(shape, policy, config, backend)
    total = sum(again)
    return [flops / total if total else 1 / shape.layers for flops in again]


def _recomputed(shape: ModelShape, policy: Policy, config: RunConfig, backend: str) -> list[float]:
    """FLOPs a token that each layer spends again."""
    tokens = config.sequence_tokens
    return [recompute_flops(shape, policy, tokens, backend, window=window) for window in layer_windows(shape)]
