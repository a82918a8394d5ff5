"""What a layer costs under each policy, in time and bytes, by what was measured of uniform and mixed placements."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
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

UNSURE, UNSURE_MOVED = 0.05, 0.5
"""By what share a policy's time, if it was not measured, may differ from arithmetic; the second where it moves tensors
to the host and back, as buses differ more than anything else."""
MIXED_ERROR = 0.01
"""By what share a mixed placement's time may differ from its layers' shares (`test_recorded_regret.py`)."""


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
    fastest mixed placement, and the analytic difference; its time is then corrected by what mixed placements took.  The
    result is a guess where it is mixed: a probe of the solved placement confirms or refutes it.

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
            time, peak = group.fastest
            work_then, peak_then = step_work(shape, like, config, device), terms.peak(placed)
        measured[policy] = (time * work[policy] / work_then, peak + peaks[policy] - peak_then)
    times = corrected_times(
        {policy: time for policy, (time, _) in measured.items()},
        {policy: UNSURE_MOVED if policy in OFFLOADED else UNSURE for policy in offered if policy not in group.uniform},
        group.mixed,
    )
    base_bytes = min(peak for _, peak in measured.values())
    base_ms = min(times.values())
    layers: list[dict[Policy, PolicyCost]] = [{} for _ in range(shape.layers)]
    for policy, (_, peak) in measured.items():
        saved = -(-(peak - base_bytes) // shape.layers)
        for costs, share in zip(layers, _shares(shape, policy, config, backend), strict=True):
            costs[policy] = PolicyCost((times[policy] - base_ms) * share, saved)
    return LayerCosts(layers, base_ms, base_bytes, like, len(group.uniform))


def all_layer_costs(
    trials: Sequence[Trial], *, shape: ModelShape, config: RunConfig, device: Device
) -> list[LayerCosts]:
    """`layer_costs` of every backend and micro-batch that ran, but of stock, which checkpoints all layers or none."""
    kinds = sorted({(trial.choices.backend, trial.choices.micro_batch) for trial in trials})
    found = (
        layer_costs(trials, *kind, shape=shape, config=config, device=device) for kind in kinds if kind[0] != "peft"
    )
    return [costs for costs in found if costs is not None]


@dataclass
class _Group:
    """What was measured of candidates that are alike in everything but placement and launches."""

    like: Choices
    """The fastest of them."""
    uniform: dict[Policy, tuple[float, int]]
    """Policy → step time in ms, peak in bytes."""
    fastest: tuple[float, int]
    """Of all: time and peak."""
    mixed: dict[tuple[Policy, ...], float] = field(default_factory=dict)
    """Mixed placement → step time in ms."""


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
        if time < group.fastest[0]:
            group.like, group.fastest = choices, (time, peak)
        policy = uniform_policy(choices)
        if policy is None:
            placement = tuple(choices.placement)
            group.mixed[placement] = min(time, group.mixed.get(placement, time))
        else:
            # Of several trials the fastest counts, as in `ranking`, and the highest peak.
            earlier_time, earlier_peak = group.uniform.get(policy, (time, peak))
            group.uniform[policy] = min(earlier_time, time), max(earlier_peak, peak)
    return max(groups.values(), key=lambda group: (len(group.uniform), -group.fastest[0]), default=None)


def corrected_times(
    times: Mapping[Policy, float], unsure: Mapping[Policy, float], mixed: Mapping[tuple[Policy, ...], float]
) -> dict[Policy, float]:
    """`times` (policy → step time if all layers had it), where they are guesses, by what mixed placements took.

    A mixed step takes its layers' shares of these times, within `MIXED_ERROR`.  The guesses are independent Gaussians,
    updated by one such sum after the other (Kalman 1960, "A new approach to linear filtering and prediction problems").

    Args:
        unsure: the policies that were not measured, and the share by which each time may be wrong.
    """
    found = dict(times)
    covariance = {(p, q): (unsure[p] * times[p]) ** 2 if p == q else 0.0 for p, q in product(unsure, repeat=2)}
    for placement, time in mixed.items():
        shares = {policy: count / len(placement) for policy, count in Counter(placement).items()}
        if not shares.keys() <= found.keys():
            continue  # a policy that is not offered
        pull = {p: sum(covariance[p, q] * shares.get(q, 0.0) for q in unsure) for p in unsure}
        variance = sum(shares.get(p, 0.0) * pull[p] for p in unsure) + (MIXED_ERROR * time) ** 2
        residual = time - sum(share * found[policy] for policy, share in shares.items())
        for p in unsure:
            found[p] += pull[p] * residual / variance
        for p, q in covariance:
            covariance[p, q] -= pull[p] * pull[q] / variance
    # A guess that was refuted beyond reason is still no gift.
    return {policy: max(time, 0.5 * times[policy]) for policy, time in found.items()}


def _shares(shape: ModelShape, policy: Policy, config: RunConfig, backend: str) -> list[float]:
    """Each layer's part of what the policy costs in all; they sum to 1."""
    again = _recomputed(shape, policy, config, backend)
    total = sum(again)
    return [flops / total if total else 1 / shape.layers for flops in again]


def _recomputed(shape: ModelShape, policy: Policy, config: RunConfig, backend: str) -> list[float]:
    """FLOPs a token that each layer spends again."""
    tokens = config.sequence_tokens
    return [recompute_flops(shape, policy, tokens, backend, window=window) for window in layer_windows(shape)]
