"""The placement solver: which layer saves what, so that the sum of prices is smallest under a budget of bytes.

A price is the time that a layer's policy costs a step; both prices and bytes come from measurements.  Pure
functions, no device.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from fastft.plan import POLICIES, Policy

_ROUNDING = 1e-9
"""Relative: sums of prices in another order differ by less."""


@dataclass(frozen=True)
class PolicyCost:
    """What one layer costs under one policy."""

    price_ms: float
    saved_bytes: int
    """Relative to any common base, at least 0."""


def solve(layers: Sequence[Mapping[Policy, PolicyCost]], budget_bytes: int) -> list[Policy] | None:
    """The placement with the smallest sum of prices whose bytes are at most `budget_bytes`; None if nothing fits.

    Equal layers are solved exactly.  Layers that differ are solved for a budget smaller by at most one 2048th a layer,
    and exactly if it has so few bytes (see `solve_unequal`).  Of layers that cost the same, those that save most are
    the last.
    """
    if layers and all(costs == layers[0] for costs in layers):
        return solve_equal(layers[0], len(layers), budget_bytes)
    return solve_unequal(layers, budget_bytes)


def solve_equal(costs: Mapping[Policy, PolicyCost], layers: int, budget_bytes: int) -> list[Policy] | None:
    """The exact optimum for `layers` equal layers; None if nothing fits.

    Equal layers make only the counts matter, and only of policies that no other beats in both price and bytes.  Counts
    are enumerated, but those that even fractions of layers (the convex hull of the policies' points) could not make
    better than the best so far; between the last two policies the dearer-in-time one is needed as rarely as the bytes
    allow, which is one division.  Ties: fewer bytes, then more layers of the policy that saves less.

    Returns:
        One policy a layer, those that save least first: the peak of a backward is at its start, and a last layer
        that recomputes nothing adds no buffers then.
    """
    names = _worth_having(costs)
    if layers < 1 or not names:
        return None
    hulls = [_hull([costs[name] for name in names[index:]]) for index in range(len(names))]
    best: tuple[float, int, tuple[int, ...]] | None = None

    def complete(index: int, counts: tuple[int, ...], left: int, budget: int, price: float) -> None:
        """Count the policies from `index` on, for `left` layers; `price` is that of the others."""
        nonlocal best
        if best is not None and price + _fractional_price(hulls[index], left, budget) > best[0] + _ROUNDING * best[0]:
            return
        cost = costs[names[index]]
        if index >= len(names) - 2:
            for rest in _last_counts([costs[name] for name in names[index:]], left, budget):
                found = (*counts, *rest)
                all_costs = [(count, costs[name]) for name, count in zip(names, found, strict=True)]
                used = sum(count * each.saved_bytes for count, each in all_costs)
                total = sum(count * each.price_ms for count, each in all_costs)
                rank = (total, used, tuple(-count for count in found))
                if used <= budget_bytes and (best is None or rank < best):
                    best = rank
            return
        for count in range(left + 1):
            complete(
                index + 1, (*counts, count), left - count, budget - count * cost.saved_bytes,
                price + count * cost.price_ms,
            )  # fmt: skip

    complete(0, (), layers, budget_bytes, 0.0)
    if best is None:
        return None
    return [name for name, count in zip(names, best[2], strict=True) for _ in range(-count)]


def solve_unequal(
    costs: Sequence[Mapping[Policy, PolicyCost]], budget_bytes: int, *, buckets: int = 2048
) -> list[Policy] | None:
    """Dynamic programming for layers that differ (windows, widths): layer i under policy p costs `costs[i][p]`.

    Bytes are rounded up to 1/`buckets` of the budget, so the answer never exceeds it; it is the exact optimum of
    a budget smaller by at most one bucket a layer, and of this budget where it has at most `buckets` bytes.

    Returns:
        One policy a layer, of equal layers those that save least first; None if nothing fits.
    """
    if not costs or budget_bytes < 0:
        return None
    quantum = max(1, -(-budget_bytes // buckets))
    room = budget_bytes // quantum
    infinite = float("inf")
    price_at = [0.0] + [infinite] * room  # price_at[u]: cheapest so far that uses exactly u quanta
    steps: list[list[Policy | None]] = []
    for layer in costs:
        then = [infinite] * (room + 1)
        step: list[Policy | None] = [None] * (room + 1)
        for policy in _worth_having(layer):
            cost = layer[policy]
            size = -(-cost.saved_bytes // quantum)
            for used in range(room - size + 1):
                price = price_at[used] + cost.price_ms
                if price < then[used + size]:
                    then[used + size], step[used + size] = price, policy
        price_at = then
        steps.append(step)
    used = min(range(room + 1), key=lambda quanta: price_at[quanta])
    if price_at[used] == infinite:
        return None
    placement: list[Policy] = []
    for layer, step in zip(reversed(costs), reversed(steps), strict=True):
        chosen = step[used]
        assert chosen is not None, "a finite price was reached through a policy in every layer"
        placement.append(chosen)
        used -= -(-layer[chosen].saved_bytes // quantum)
    return _kept_last(placement[::-1], costs)


def _kept_last(placement: Sequence[Policy], costs: Sequence[Mapping[Policy, PolicyCost]]) -> list[Policy]:
    """The placement with the policies of equal layers in the order of what they save, which changes no sum."""
    ordered = list(placement)
    for index, layer in enumerate(costs):
        if layer in costs[:index]:
            continue
        alike = [other for other, its_costs in enumerate(costs) if its_costs == layer]
        policies = sorted((placement[other] for other in alike), key=lambda policy: layer[policy].saved_bytes)
        for other, policy in zip(alike, policies, strict=True):
            ordered[other] = policy
    return ordered


def _worth_having(costs: Mapping[Policy, PolicyCost]) -> list[Policy]:
    """The policies that no other one beats, or equals, in price and in bytes, those that save least first."""
    ordered = [policy for policy in reversed(POLICIES) if policy in costs]
    best_first = sorted(ordered, key=lambda policy: (costs[policy].price_ms, costs[policy].saved_bytes))
    kept: list[Policy] = []
    for policy in best_first:
        if all(costs[policy].saved_bytes < costs[other].saved_bytes for other in kept):
            kept.append(policy)
    return kept[::-1]


def _hull(costs: Sequence[PolicyCost]) -> list[PolicyCost]:
    """The corners of the lower convex hull of the policies' points, the fewest bytes first, as `costs` are."""
    hull: list[PolicyCost] = []
    for cost in costs:
        while len(hull) >= 2 and _slope(hull[-2], cost) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(cost)
    return hull


def _slope(one: PolicyCost, other: PolicyCost) -> float:
    return (other.price_ms - one.price_ms) / (other.saved_bytes - one.saved_bytes)


def _fractional_price(hull: Sequence[PolicyCost], layers: int, budget: int) -> float:
    """What `layers` layers cost at least: mixtures within a layer are allowed.  Infinite where they do not fit."""
    if layers == 0:
        return 0.0 if budget >= 0 else float("inf")
    room = budget / layers
    if room < hull[0].saved_bytes:
        return float("inf")
    for low, high in pairwise(hull):
        if room < high.saved_bytes:
            return layers * (low.price_ms + (room - low.saved_bytes) * _slope(low, high))
    return layers * hull[-1].price_ms


def _last_counts(costs: Sequence[PolicyCost], layers: int, budget: int) -> Iterator[tuple[int, ...]]:
    """Counts of the last policy or two that contain an optimum; not each fits."""
    if len(costs) == 1:
        yield (layers,)
        return
    yield (layers, 0)
    yield (0, layers)
    first, second = costs
    # layers·first + k·more <= budget for the largest such k: the second saves more, and costs less.
    k = (budget - layers * first.saved_bytes) // (second.saved_bytes - first.saved_bytes)
    if 0 < k < layers:
        yield (layers - k, k)
