from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.memory import LayerCosts, fit_peaks, layer_costs, predicted_too_large
from fastft.config import RunConfig
from fastft.hardware import Device
from fastft.memory.work import recompute_flops, step_work
from fastft.models.shapes import SHAPES, ModelShape
from fastft.plan import Choices, Policy, Trial

CPU = Device("cpu", "C", None, None, 2**35, 2)
GPU = Device("cuda", "H", "9.0", 132, 140 * 2**30, 8)
SHAPE = SHAPES["toy-llama"]
CONFIG = RunConfig(model="toy-llama", sequence_tokens=128)


def trial(
    policy: Policy, size: int, peak: int | None, verdict: str = "ok", times: tuple[float, ...] = (10.0,)
) -> Trial:
    choices = Choices(backend="eager", micro_batch=size, accumulation=16 // size, placement=[policy] * 3)
    return Trial.model_validate(
        {"choices": choices, "verdict": verdict, "peak_bytes": peak, "model_bytes": 1000, "step_time_ms": times}
    )


def test_a_line_is_recovered() -> None:
    trials = [trial("light", size, 1500 + 7 * size * 100) for size in (1, 2, 4)]
    fit = fit_peaks(trials, 100)["eager", "light"]
    assert fit.base_bytes == pytest.approx(1500)
    assert fit.bytes_per_token == pytest.approx(7)
    assert fit.predict(800) == pytest.approx(1500 + 5600)


def test_one_point_starts_at_the_model() -> None:
    fit = fit_peaks([trial("full", 2, 1400)], 100)["eager", "full"]
    assert (fit.base_bytes, fit.bytes_per_token, fit.points) == (1000, 2.0, 1)


def test_only_what_ran_counts_and_the_slope_is_not_negative() -> None:
    trials = [trial("light", 1, 2000), trial("light", 2, 1900), trial("light", 4, 9000, "out_of_memory")]
    assert fit_peaks(trials, 100)["eager", "light"].bytes_per_token == 0
    assert fit_peaks([trial("mlp", 1, None)], 100) == {}


def test_prediction_needs_two_points_and_a_clear_excess() -> None:
    one = [trial("light", 1, 2000)]
    two = [*one, trial("light", 2, 3000)]
    large = trial("light", 8, None).choices  # 9000 by the line
    assert not predicted_too_large(large, one, 100, 2500)
    assert predicted_too_large(large, two, 100, 8500)
    assert not predicted_too_large(large, two, 100, 8900)
    assert not predicted_too_large(trial("full", 8, None).choices, two, 100, 10)


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
