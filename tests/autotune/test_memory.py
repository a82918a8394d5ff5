import pytest

from autotune.memory import fit_peaks, layer_costs, predicted_too_large
from fastft.config import RunConfig
from fastft.hardware import Device
from fastft.memory.model import recompute_flops, step_flops
from fastft.models.shapes import SHAPES
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
    assert {p: (c.price_ms, c.saved_bytes) for p, c in found.costs.items()} == {
        "light": (0.0, 900), "full": (2.0, 0), "mlp": (1.0, 401),
    }  # fmt: skip


def test_a_gpu_is_offered_its_host_s_memory_too() -> None:
    trials = [trial("full", 4, 10_000_000_000, times=(36.0,))]
    # Of long sequences; what is small stays on the device.
    long = CONFIG.model_copy(update={"sequence_tokens": 65536})
    found = layer_costs(trials, "eager", 4, shape=SHAPE, config=long, device=GPU)
    assert found is not None
    assert set(found.costs) == {"light", "mlp", "full", "offload_mlp", "offload"}
    assert found.costs["offload"].saved_bytes < found.costs["full"].saved_bytes


def test_what_did_not_run_is_taken_from_the_model() -> None:
    trials = [trial("light", 4, None, "out_of_memory", ()), trial("full", 4, 10_000_000, times=(36.0,))]
    found = layer_costs(trials, "eager", 4, shape=SHAPE, config=CONFIG, device=CPU)
    assert found is not None
    assert set(found.costs) == {"light", "mlp", "full"}
    assert found.costs["light"].saved_bytes > found.costs["mlp"].saved_bytes > found.costs["full"].saved_bytes == 0
    work = 1 + recompute_flops(SHAPE, "full", 128) / step_flops(SHAPE, 128)
    assert found.base_ms == pytest.approx(36.0 / work)
    assert found.costs["full"].price_ms == pytest.approx((36.0 - 36.0 / work) / 3)


def test_nothing_measured_gives_no_costs() -> None:
    trials = [trial("light", 4, None, "out_of_memory", ())]
    assert layer_costs(trials, "eager", 4, shape=SHAPE, config=CONFIG, device=GPU) is None
