from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.layer_costs import MIXED_ERROR, LayerCosts, corrected_times, layer_costs
from devices import CPU, GPU
from fastft.config import RunConfig
from fastft.memory.work import recompute_flops, step_work
from fastft.models.shapes import SHAPES, ModelShape
from fastft.plan import Choices, Policy, Trial
from uniform_trials import CONFIG, SHAPE, trial


def test_measured_uniform_placements_become_costs_a_layer() -> None:
    trials = [
        trial("light", 4, 4000, "over_cap", (30.0, 31.0, 29.0)), trial("full", 4, 1300, times=(36.0, 36.0, 90.0)),
        trial("mlp", 4, 2501, times=(33.0,)), trial("full", 2, 7, times=(1.0,)),
    ]  # fmt: skip
    found = layer_costs(trials, "eager", 4, shape=SHAPE, config=CONFIG, device=CPU)
    assert found is not None
    assert (found.base_ms, found.base_bytes) == (30.0, 1300)
    assert len(found.layers) == SHAPE.layers
    for costs in found.layers:
        assert {p: (pytest.approx(c.price_ms), c.saved_bytes) for p, c in costs.items()} == {
            "light": (0.0, 900), "full": (2.0, 0), "mlp": (1.0, 401),
        }  # fmt: skip
    assert found.solve(1300 + 1301) == (pytest.approx(33.0), trials[0].choices.model_copy(update={"placement": [
        "mlp", "mlp", "mlp"]}))  # fmt: skip
    assert found.peak_of(["full", "mlp", "light"]) == 1300 + 1301


def test_a_gpu_is_offered_its_host_s_memory_too() -> None:
    trials = [trial("full", 4, 10_000_000_000, times=(36.0,))]
    # Of long sequences; what is small stays on the device.
    long = CONFIG.model_copy(update={"sequence_tokens": 65536})
    found = layer_costs(trials, "eager", 4, shape=SHAPE, config=long, device=GPU)
    assert found is not None
    costs = found.layers[0]
    assert set(costs) == {"light", "mlp", "full", "offload_mlp", "offload"}
    assert costs["offload"].saved_bytes < costs["full"].saved_bytes


def test_what_did_not_run_is_taken_from_the_model() -> None:
    trials = [trial("light", 4, None, "out_of_memory", ()), trial("full", 4, 10_000_000, times=(36.0,))]
    found = layer_costs(trials, "eager", 4, shape=SHAPE, config=CONFIG, device=CPU)
    assert found is not None
    costs = found.layers[0]
    assert set(costs) == {"light", "mlp", "full"}
    assert costs["light"].saved_bytes > costs["mlp"].saved_bytes > costs["full"].saved_bytes == 0
    full = trials[1].choices
    light = full.model_copy(update={"placement": ["light"] * 3})
    work = step_work(SHAPE, full, CONFIG, CPU) / step_work(SHAPE, light, CONFIG, CPU)
    assert found.base_ms == pytest.approx(36.0 / work)
    assert costs["full"].price_ms == pytest.approx((36.0 - 36.0 / work) / 3)


def test_nothing_measured_gives_no_costs() -> None:
    trials = [trial("light", 4, None, "out_of_memory", ())]
    assert layer_costs(trials, "eager", 4, shape=SHAPE, config=CONFIG, device=GPU) is None


def changed(of: Trial, **more: Any) -> Trial:
    return of.model_copy(update={"choices": of.choices.model_copy(update=more)})


def costs_of(trials: list[Trial], shape: ModelShape = SHAPE, **more: Any) -> LayerCosts:
    config = RunConfig(model="toy-llama", **{"sequence_tokens": 128, **more})
    found = layer_costs(trials, "eager", 4, shape=shape, config=config, device=CPU)
    assert found is not None
    return found


def test_the_group_with_most_policies_counts_and_of_equals_the_fastest() -> None:
    chunked = [changed(trial(p, 4, 9000, times=(50.0,)), loss_chunk_tokens=512) for p in ("light", "full")]
    alone = trial("light", 4, 4000, times=(30.0,))
    found = costs_of([alone, *chunked])
    assert (found.policies, found.like.loss_chunk_tokens, found.base_ms) == (2, 512, 50.0)
    faster = [changed(each, loss_chunk_tokens=1024, attention="sdpa") for each in chunked]
    faster = [each.model_copy(update={"step_time_ms": [40.0]}) for each in faster]
    found = costs_of([alone, *chunked, *faster])
    assert (found.like.loss_chunk_tokens, found.like.attention, found.base_ms) == (1024, "sdpa", 40.0)
    solved = found.solve(10**12)
    assert solved is not None
    assert solved[1].attention == "sdpa"


CHANGES: list[dict[str, Any]] = [
    {"loss_chunk_tokens": 512}, {"mlp_chunk_tokens": 64}, {"resident_layers": 2}, {"host_embedding": True},
    {"graphs": "on"}, {"attention": "flash"},
]  # fmt: skip


@settings(max_examples=100)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["light", "mlp", "full"]), st.sampled_from([{}, *CHANGES]), st.integers(10, 99),
            st.integers(10**6, 10**7), st.booleans(),
        ),
        min_size=1, max_size=12,
    )
)  # fmt: skip
def test_only_trials_that_are_alike_are_combined(
    drawn: list[tuple[Policy, dict[str, Any], int, int, bool]],
) -> None:
    trials = []
    for policy, change, time, peak, launched in drawn:
        launches = {"kernels": {"x": [1]}} if launched else {}
        trials.append(changed(trial(policy, 4, peak, times=(float(time),)), **change, **launches))
    found = costs_of(trials)
    names = set(Choices.model_fields) - {"placement", "kernels"}
    alike = [t for t in trials if all(getattr(t.choices, n) == getattr(found.like, n) for n in names)]
    policies = {t.choices.placement[0] for t in alike}
    assert found.policies == len(policies)
    for other in trials:
        of_other = [t for t in trials if t.choices.model_dump(include=names) == other.choices.model_dump(include=names)]
        assert len({t.choices.placement[0] for t in of_other}) <= found.policies
    for policy in policies:
        time = found.base_ms + sum(costs[policy].price_ms for costs in found.layers)
        assert time == pytest.approx(min(t.step_time_ms[0] for t in alike if t.choices.placement[0] == policy))


def test_a_mixed_placement_alone_is_enough_to_start_from() -> None:
    mixed = changed(trial("full", 4, 10_000_000, times=(36.0,)), placement=["full", "mlp", "light"])
    found = costs_of([mixed])
    assert found.policies == 0
    config = RunConfig(model="toy-llama", sequence_tokens=128)
    light = mixed.choices.model_copy(update={"placement": ["light"] * 3})
    ratio = step_work(SHAPE, mixed.choices, config, CPU) / step_work(SHAPE, light, config, CPU)
    assert found.base_ms == pytest.approx(36.0 / ratio)
    time = found.base_ms + sum(c[p].price_ms for c, p in zip(found.layers, mixed.choices.placement, strict=True))
    assert time == pytest.approx(36.0)


def test_layers_with_a_window_cost_less_to_compute_again() -> None:
    shape = SHAPES["toy-gemma3"]  # a window of 7 in the first and the last layer
    found = costs_of([trial(p, 4, 10**6, times=(t,)) for p, t in (("light", 30.0), ("full", 36.0))], shape)
    first, second, third = (costs["full"].price_ms for costs in found.layers)
    assert first == third < second
    assert first + second + third == pytest.approx(6.0)
    attention = 2.0 * 128 * shape.heads * shape.head_dim
    everything = recompute_flops(shape, "full", 128)
    seen = (7 * 128 - 7 * 7 / 2) / (128 * 128 / 2)
    assert first / second == pytest.approx((everything - attention * (1 - seen)) / everything)
    short = costs_of([trial(p, 4, 10**6, times=(t,)) for p, t in (("light", 30.0), ("full", 36.0))], shape,
                     sequence_tokens=8)  # fmt: skip
    assert short.layers[0]["full"].price_ms < short.layers[1]["full"].price_ms


def test_a_window_decides_which_layer_is_computed_again() -> None:
    trials = [
        trial("light", 4, 4000, "over_cap", (30.0,)), trial("mlp", 4, 3997, times=(34.0,)),
        trial("full", 4, 1000, times=(36.0,)),
    ]  # fmt: skip
    found = costs_of(trials, SHAPES["toy-gemma3"])
    solved = found.solve(found.base_bytes + 2 * 1000)  # room for two
    assert solved is not None
    assert solved[1].placement == ["full", "light", "light"], "full attention is the dearest to compute again"


TIMES: dict[Policy, float] = {"light": 100.0, "mlp": 116.0, "full": 128.0, "offload_mlp": 118.0, "offload": 130.0}
GUESSED: dict[Policy, float] = {"light": 0.05, "full": 0.05, "offload_mlp": 0.5, "offload": 0.5}


def mixed_step(truth: dict[Policy, float], *parts: tuple[Policy, int]) -> tuple[tuple[Policy, ...], float]:
    placement = tuple(policy for policy, count in parts for _ in range(count))
    return placement, sum(truth[policy] for policy in placement) / len(placement)


def test_a_slow_bus_is_found_out_by_mixed_placements() -> None:
    truth: dict[Policy, float] = {**TIMES, "offload_mlp": 190.0, "light": 102.0}
    found = corrected_times(TIMES, GUESSED, dict([mixed_step(truth, ("offload_mlp", 13), ("mlp", 1), ("light", 14))]))
    assert found["offload_mlp"] == pytest.approx(190, rel=0.03), "what may be most wrong is corrected most"
    assert found["light"] == pytest.approx(100, rel=0.03)
    assert (found["mlp"], found["full"], found["offload"]) == (116.0, 128.0, 130.0), "nothing was told of these"


def test_without_mixed_placements_or_doubt_nothing_changes() -> None:
    assert corrected_times(TIMES, GUESSED, {}) == TIMES
    step = mixed_step({**TIMES, "full": 300.0}, ("full", 1), ("light", 1))
    assert corrected_times(TIMES, {}, dict([step])) == TIMES
    kept = mixed_step({**TIMES, "keep": 90.0}, ("keep", 1), ("light", 1))
    assert corrected_times(TIMES, GUESSED, dict([kept])) == TIMES, "of a policy that is not offered nothing is known"


FACTOR = st.floats(0.9, 1.1)


@settings(max_examples=100)
@given(
    st.fixed_dictionaries({"light": FACTOR, "full": FACTOR, "offload_mlp": st.floats(0.8, 2.0),
                           "offload": st.floats(0.8, 2.0)}),
    st.lists(st.lists(st.sampled_from(sorted(TIMES)), min_size=8, max_size=8), min_size=1, max_size=6),
)  # fmt: skip
def test_what_was_measured_is_explained_whatever_its_order(
    factors: dict[Policy, float], placements: list[list[Policy]]
) -> None:
    truth = {policy: time * factors.get(policy, 1.0) for policy, time in TIMES.items()}
    steps = [mixed_step(truth, *((policy, 1) for policy in placement)) for placement in placements]
    found = corrected_times(TIMES, GUESSED, dict(steps))
    backwards = corrected_times(TIMES, GUESSED, dict(steps[::-1]))
    assert found == pytest.approx(backwards)
    for placement, time in steps:
        unknown = [policy for policy in placement if policy in GUESSED]
        before, after = (sum(of[p] for p in placement) / len(placement) for of in (TIMES, found))
        if unknown:
            assert abs(after - time) <= abs(before - time) + 3 * MIXED_ERROR * time
        else:
            assert after == before
    assert found["mlp"] == TIMES["mlp"]


def test_the_solver_leaves_a_slow_bus_alone_once_a_mixed_placement_was_measured() -> None:
    """Under a cap, with `mlp` measured and a mixed default that moves half of its layers, slower than all of `mlp`."""
    shape, run = (
        SHAPES["qwen2-1.5b"],
        RunConfig(model="qwen2-1.5b", dtype="bf16", sequence_tokens=8192, batch_size=1, optimizer="adamw_8bit"),
    )

    def measured(placement: list[Policy], milliseconds: float, gib: float) -> Trial:
        choices = Choices(backend="triton", micro_batch=1, accumulation=1, placement=placement)
        return Trial(
            choices=choices, verdict="ok", peak_bytes=round(gib * 2**30), model_bytes=2**30,
            step_time_ms=[milliseconds],
        )  # fmt: skip

    of_mlp = measured(["mlp"] * 28, 186.0, 6.6)
    default = measured(["offload_mlp"] * 13 + ["mlp"] + ["light"] * 14, 213.0, 8.82)
    for trials, moves in (([of_mlp], True), ([of_mlp, default], False)):
        found = layer_costs(trials, "triton", 1, shape=shape, config=run, device=GPU)
        assert found is not None
        solved = found.solve(8.9 * 2**30)
        assert solved is not None
        assert ("offload_mlp" in solved[1].placement) is moves
        assert solved[1].placement.count("light") > 5
