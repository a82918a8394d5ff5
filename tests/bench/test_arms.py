"""What an arm with a measure against memory does."""

from typing import Any

import pytest

from bench.arms import ARMS, MEASURES, choices_for
from fastft import planning
from fastft.config import RunConfig
from fastft.hardware import Device
from fastft.memory.model import estimate_peak_bytes
from fastft.models.shapes import SHAPES

GPU = Device("cuda", "H", "9.0", 132, 140 * 2**30, 8)
CONFIG = RunConfig(model="llama-3-8b", quantization="nf4", batch_size=4, sequence_tokens=2048, dtype="bf16")


@pytest.fixture(autouse=True)
def _on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastft.hardware.detect_device", lambda *_: GPU)
    monkeypatch.setattr(planning, "_require_backend", lambda *_: None)


def peak(name: str, **more: Any) -> int:
    choices, plan = choices_for(name, CONFIG.model_copy(update=more))
    assert plan is None
    return estimate_peak_bytes(SHAPES["llama-3-8b"], choices, CONFIG, device=GPU)


@pytest.mark.parametrize("measure", MEASURES)
def test_each_measure_is_one_step_from_the_default(measure: str) -> None:
    light, _ = choices_for("triton+light", CONFIG)
    changed, _ = choices_for(f"triton+{measure}", CONFIG)
    assert changed.backend == "triton"
    assert (changed.micro_batch, changed.accumulation) == (light.micro_batch, light.accumulation)
    assert (changed != light) == (measure != "light")


def test_what_saves_saves_and_all_together_saves_most() -> None:
    peaks = {measure: peak(f"triton+{measure}") for measure in MEASURES}
    for measure in ("mlp", "full", "offload_mlp", "offload", "mlp_tiles", "small_loss", "host_embedding"):
        assert peaks[measure] < peaks["light"], measure
    assert peaks["mlp_tiles"] < peaks["mlp"]
    assert peaks["dense"] > peaks["light"]
    assert peaks["smallest"] == min(peaks.values())


def test_a_cap_does_not_reach_them() -> None:
    assert peak("triton+light", memory_cap="7.8GiB") == peak("triton+light")


def test_every_measure_is_an_arm() -> None:
    named = {name for name in ARMS if name.startswith("triton+")} - {"triton+default"}
    assert named == {f"triton+{measure}" for measure in MEASURES}


def test_the_default_arm_keeps_to_the_cap_and_looks_for_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("it asked for a plan")

    monkeypatch.setattr(planning, "resolve", refuse)
    assert choices_for("triton+default", CONFIG) == choices_for("triton+light", CONFIG)
    capped = CONFIG.model_copy(update={"memory_cap": "7.8GiB"})
    choices, plan = choices_for("triton+default", capped)
    assert plan is None
    assert estimate_peak_bytes(SHAPES["llama-3-8b"], choices, capped, device=GPU) <= 7.8 * 2**30
    with pytest.raises(AssertionError, match="asked for a plan"):
        choices_for("triton", capped)
