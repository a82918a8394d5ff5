"""What a tuned run would do under other memory caps, from the evidence of its plan: nothing is measured.

Where a trial wins of those that fit, as the tuner ranks them, the answer is `measured`.  Where the solver promises more
from what the trials say of the layers' prices, it is `predicted`: `fastft tune --memory-cap …` confirms or refutes it.
"""

from dataclasses import dataclass, replace
from typing import Literal

from autotune.layer_costs import LayerCosts, all_layer_costs
from autotune.probe import judge_again
from autotune.ranking import NOISE, Standings
from autotune.space import MIXED_HEADROOM
from fastft.config import RunConfig
from fastft.hardware import Device
from fastft.models.shapes import ModelShape
from fastft.plan import Choices, Plan

RUNGS = 12
"""Caps that are looked at between the smallest and the largest peak, beside those that were measured."""


@dataclass(frozen=True)
class UnderCap:
    """What is best under a cap."""

    cap_bytes: int
    """The smallest of the caps looked at for which this is the best."""
    choices: Choices
    tokens_per_second: float
    peak_bytes: int
    basis: Literal["measured", "predicted"]


def explain(plan: Plan, config: RunConfig, shape: ModelShape, device: Device) -> list[UnderCap]:
    """The ladder of caps at which the best choices change, ascending; empty where nothing ran.

    Below the first cap nothing that was tried or solved fits; above the last more memory gains nothing.
    """
    trials = [judge_again(trial, None) for trial in plan.evidence.trials]
    standings = Standings(trials, plan.key.global_batch * plan.key.sequence_tokens, NOISE[device.kind])
    measured = [
        UnderCap(peak, choices, speed, peak, "measured")
        for choices in standings.order()
        if (speed := standings.speed(choices)) is not None and (peak := standings.peak(choices))
    ]
    if not measured:
        return []
    of_layers = all_layer_costs(trials, shape=shape, config=config, device=device)
    largest = max(measured, key=lambda each: each.tokens_per_second).peak_bytes
    least = [round(costs.base_bytes / MIXED_HEADROOM) for costs in of_layers]
    smallest = min([each.peak_bytes for each in measured] + least)
    rungs = {smallest + (largest - smallest) * step // RUNGS for step in range(RUNGS + 1)}
    ladder: list[UnderCap] = []

    def to_beat(rung: UnderCap) -> float:
        return (1 + standings.noise) * rung.tokens_per_second

    for cap in sorted(rungs | {each.peak_bytes for each in measured}):
        best = _best_under(cap, standings, measured, of_layers)
        # What more memory does not make faster, beyond the noise, is no rung.
        if best is not None and (not ladder or best.tokens_per_second > to_beat(ladder[-1])):
            ladder.append(best)
    return ladder


def _best_under(
    cap: int, standings: Standings, measured: list[UnderCap], of_layers: list[LayerCosts]
) -> UnderCap | None:
    fitting = [each for each in measured if each.peak_bytes <= cap]
    winner = standings.winner([each.choices for each in fitting])
    best = next((replace(each, cap_bytes=cap) for each in fitting if each.choices == winner), None)
    to_beat = max(((1 + standings.noise) * each.tokens_per_second for each in fitting), default=0.0)
    for costs in of_layers:
        solved = costs.solve(cap * MIXED_HEADROOM)
        if solved is None or solved[1] in standings.order():
            continue  # what was measured is known better
        time_ms, choices = solved
        speed = 1000.0 * standings.step_tokens / time_ms
        if speed > to_beat:
            best, to_beat = UnderCap(cap, choices, speed, costs.peak_of(choices.placement), "predicted"), speed
    return best
