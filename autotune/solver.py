"""The placement solver: which layer saves what, so that the sum of prices is smallest under a budget of bytes.

A price is the time that a layer's policy costs a step; both prices and bytes come from measurements.  Pure
functions, no device.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fastft.plan import POLICIES, Policy


@dataclass(frozen=True)
class PolicyCost:
    """What one layer costs under one policy."""

    price_ms: float
    saved_bytes: int
    """Relative to any common base, at least 0."""


def solve_equal(costs: Mapping[Policy, PolicyCost], layers: int, budget_bytes: int) -> list[Policy] | None:
    """The exact optimum for `layers` equal layers; None if nothing fits.

    Equal layers make only the counts matter.  All but two policies' counts are enumerated; between the last two
    the dearer-in-time one is needed as rarely as the bytes allow, which is one division.  At most O(layers²) for
    four policies.  Ties: fewer bytes, then more layers of the policy that saves less.

    Returns:
        One policy a layer, those that save least first: the peak of a backward is at its start, and a last layer
        that recomputes nothing adds no buffers then.
    """
    names = [policy for policy in reversed(POLICIES) if policy in costs]  # from the fewest bytes up
    if layers < 1 or not names:
        return None
    best: tuple[float, int, tuple[int, ...]] | None = None
    for counts in _counts(names, costs, layers, budget_bytes):
        price = sum(count * costs[name].price_ms for name, count in zip(names, counts, strict=True))
        used = sum(count * costs[name].saved_bytes for name, count in zip(names, counts, strict=True))
        rank = (price, used, tuple(-count for count in counts))
        if used <= budget_bytes and (best is None or rank < best):
            best = rank
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
        One policy a layer, or None if nothing fits.
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
        for policy in reversed(POLICIES):
            cost = layer.get(policy)
            if cost is None:
                continue
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
    return placement[::-1]


def _counts(
    names: Sequence[Policy], costs: Mapping[Policy, PolicyCost], layers: int, budget: int
) -> Iterator[tuple[int, ...]]:
    """Counts a policy that contain an optimum; each sums to `layers`, not each fits."""
    if len(names) == 1:
        yield (layers,)
        return
    if len(names) > 2:
        for count in range(layers + 1):
            left = budget - count * costs[names[0]].saved_bytes
            for rest in _counts(names[1:], costs, layers - count, left):
                yield (count, *rest)
        return
    first, second = costs[names[0]], costs[names[1]]
    yield (layers, 0)
    yield (0, layers)
    more = second.saved_bytes - first.saved_bytes
    if more != 0:
        # layers·first + k·more <= budget: the largest such k if the second takes more, the smallest if it takes less.
        slack = budget - layers * first.saved_bytes
        k = slack // more if more > 0 else -(slack // -more)
        if 0 < k < layers:
            yield (layers - k, k)
