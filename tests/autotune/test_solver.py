import itertools
import math
from collections.abc import Mapping, Sequence

from hypothesis import example, given, settings
from hypothesis import strategies as st

from autotune.solver import PolicyCost, solve, solve_equal, solve_unequal
from fastft.plan import POLICIES, Policy

Costs = Mapping[Policy, PolicyCost]

costs_of_a_layer = st.dictionaries(
    st.sampled_from(POLICIES),
    st.builds(PolicyCost, price_ms=st.integers(0, 40).map(lambda n: n / 8), saved_bytes=st.integers(0, 30)),
    min_size=1,
)


def price(placement: Sequence[Policy], layers: Sequence[Costs]) -> float:
    return sum(layer[policy].price_ms for policy, layer in zip(placement, layers, strict=True))


def used(placement: Sequence[Policy], layers: Sequence[Costs]) -> int:
    return sum(layer[policy].saved_bytes for policy, layer in zip(placement, layers, strict=True))


def brute_force(layers: Sequence[Costs], budget: int) -> float | None:
    prices = [price(p, layers) for p in itertools.product(*layers) if used(p, layers) <= budget]
    return min(prices, default=None)


@settings(max_examples=400)
@given(costs_of_a_layer, st.integers(1, 6), st.integers(-5, 190))
def test_equal_layers_are_solved_exactly(costs: Costs, count: int, budget: int) -> None:
    layers = [costs] * count
    best = brute_force(layers, budget)
    placement = solve_equal(costs, count, budget)
    if best is None:
        assert placement is None
        return
    assert placement is not None
    assert len(placement) == count
    assert used(placement, layers) <= budget
    assert math.isclose(price(placement, layers), best)
    order = [costs[policy].saved_bytes for policy in placement]
    assert order == sorted(order), "what saves most comes last"
    assert solve(layers, budget) == placement


costs_that_tie = st.dictionaries(
    st.sampled_from(POLICIES),
    st.builds(PolicyCost, price_ms=st.integers(0, 4).map(float), saved_bytes=st.integers(0, 4)),
    min_size=1,
)


@settings(max_examples=400)
@example({"full": PolicyCost(2.0, 0), "mlp": PolicyCost(1.0, 1), "light": PolicyCost(0.0, 2)}, 2, 2)
@given(costs_that_tie, st.integers(1, 5), st.integers(0, 20))
def test_of_equal_layers_with_one_price_the_rank_decides(costs: Costs, count: int, budget: int) -> None:
    """Fewer bytes, then more layers of the policy that saves less."""
    points = sorted({(cost.saved_bytes, cost.price_ms) for cost in costs.values()})

    def rank(chosen: Sequence[tuple[int, float]]) -> tuple[float, int, list[int]]:
        total = sum(price for _, price in chosen), sum(saved for saved, _ in chosen)
        return *total, [-chosen.count(point) for point in points]

    every = (
        c for c in itertools.combinations_with_replacement(points, count) if sum(saved for saved, _ in c) <= budget
    )
    best = min(every, key=rank, default=None)
    placement = solve_equal(costs, count, budget)
    assert (placement is None) == (best is None)
    if placement is not None and best is not None:
        assert rank([(costs[policy].saved_bytes, costs[policy].price_ms) for policy in placement]) == rank(best)


@settings(max_examples=300)
@given(st.lists(costs_of_a_layer, min_size=1, max_size=5), st.integers(-5, 120))
def test_unequal_layers_are_solved_exactly_where_bytes_are_few(layers: list[Costs], budget: int) -> None:
    best = brute_force(layers, budget)
    placement = solve_unequal(layers, budget)
    if best is None:
        assert placement is None
        return
    assert placement is not None
    assert used(placement, layers) <= budget
    assert math.isclose(price(placement, layers), best)


@settings(max_examples=300)
@given(st.lists(costs_of_a_layer, min_size=1, max_size=5), st.integers(0, 120), st.integers(1, 40))
def test_coarse_buckets_never_exceed_the_budget_and_lose_at_most_one_each(
    layers: list[Costs], budget: int, buckets: int
) -> None:
    placement = solve_unequal(layers, budget, buckets=buckets)
    quantum = max(1, -(-budget // buckets))
    reduced = brute_force(layers, budget - quantum * (len(layers) + 1))
    if placement is None:
        assert reduced is None
        return
    assert used(placement, layers) <= budget
    assert reduced is None or price(placement, layers) <= reduced + 1e-9


def test_both_solvers_agree_on_equal_layers() -> None:
    costs: Costs = {
        "keep": PolicyCost(0.0, 11), "light": PolicyCost(0.3, 8), "mlp": PolicyCost(1.9, 4), "full": PolicyCost(3.1, 1),
    }  # fmt: skip
    for budget in range(0, 150):
        one, two = solve_equal(costs, 12, budget), solve_unequal([costs] * 12, budget)
        assert (one is None) == (two is None)
        if one is not None and two is not None:
            assert math.isclose(price(one, [costs] * 12), price(two, [costs] * 12))


@settings(max_examples=200)
@given(costs_of_a_layer, costs_of_a_layer, st.lists(st.booleans(), min_size=1, max_size=6), st.integers(0, 150))
def test_of_two_kinds_of_layers_each_keeps_last(one: Costs, other: Costs, kinds: list[bool], budget: int) -> None:
    layers = [one if kind else other for kind in kinds]
    best, placement = brute_force(layers, budget), solve(layers, budget)
    assert (placement is None) == (best is None)
    if placement is None or best is None:
        return
    assert used(placement, layers) <= budget
    assert math.isclose(price(placement, layers), best)
    for costs in (one, other):
        saved = [costs[policy].saved_bytes for policy, layer in zip(placement, layers, strict=True) if layer == costs]
        assert saved == sorted(saved)


def test_a_policy_that_another_beats_in_both_is_not_used() -> None:
    costs: Costs = {"light": PolicyCost(0.0, 10), "mlp": PolicyCost(2.0, 4), "offload_mlp": PolicyCost(1.0, 3)}
    assert solve_equal(costs, 4, 26) == ["offload_mlp"] * 2 + ["light"] * 2
    assert solve_unequal([costs] * 4, 26) == ["offload_mlp"] * 2 + ["light"] * 2


def test_a_large_model_is_solved_at_once() -> None:
    costs: Costs = {
        "keep": PolicyCost(0.0, 900 * 2**20), "light": PolicyCost(0.2, 640 * 2**20),
        "mlp": PolicyCost(2.0, 300 * 2**20), "full": PolicyCost(3.0, 64 * 2**20), "offload": PolicyCost(4.0, 2**20),
    }  # fmt: skip
    placement = solve_equal(costs, 126, 30 * 2**30)
    assert placement is not None
    assert used(placement, [costs] * 126) <= 30 * 2**30


def test_nothing_to_place() -> None:
    assert solve_equal({}, 3, 100) is None
    assert solve_equal({"light": PolicyCost(1.0, 1)}, 0, 100) is None
    assert solve_unequal([], 100) is None
