"""What a run does without a plan: backend, micro-batch, and what is given up for memory."""

from dataclasses import replace

import pytest

from devices import CPU, GPU
from fastft import defaults
from fastft.config import RunConfig
from fastft.defaults import Default, default_choices, default_for, resolve_backend
from fastft.errors import BackendError, PlanError
from fastft.memory.model import estimate_peak_bytes
from fastft.models.shapes import SHAPES

SHAPE = SHAPES["toy-llama"]
CONFIG = RunConfig(model="toy-llama", sequence_tokens=128)

pytestmark = pytest.mark.usefixtures("no_interpreter")


def test_auto_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_backend(CONFIG, CPU) == "eager"
    monkeypatch.setattr(defaults, "_triton_installed", lambda: True)
    assert resolve_backend(CONFIG, GPU) == "triton"
    monkeypatch.setattr(defaults, "_triton_installed", lambda: False)
    assert resolve_backend(CONFIG, GPU) == "eager"
    with pytest.raises(BackendError, match="needs the package triton"):
        resolve_backend(CONFIG.model_copy(update={"backend": "triton"}), GPU)


def test_explicit_triton_needs_a_gpu_or_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIG.model_copy(update={"backend": "triton"})
    monkeypatch.setattr(defaults, "_triton_installed", lambda: True)
    with pytest.raises(BackendError, match="needs a CUDA GPU"):
        resolve_backend(config, CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve_backend(config, CPU) == "triton"


@pytest.mark.parametrize(
    ("batch_size", "tokens", "on_cpu", "on_gpu"),
    [
        (16, 2048, 2, 4), (16, 256, 16, 16), (64, 256, 16, 32), (7, 2048, 1, 1), (6, 2048, 2, 3), (1, 16, 1, 1),
        (34, 2048, 2, 2), (16, 32768, 1, 1), (4, 8192, 1, 1),
    ],
)  # fmt: skip
def test_the_default_micro_batch_is_a_divisor_with_so_many_tokens(
    batch_size: int, tokens: int, on_cpu: int, on_gpu: int
) -> None:
    config = CONFIG.model_copy(update={"batch_size": batch_size, "sequence_tokens": tokens})
    for device, expected in ((CPU, on_cpu), (GPU, on_gpu)):
        choices = default_choices(config, SHAPE, "eager", device)
        assert choices.micro_batch == expected
        assert choices.micro_batch * choices.accumulation == batch_size
        assert choices.placement == ["light"] * 3


def test_the_default_follows_what_the_run_sets() -> None:
    config = CONFIG.model_copy(update={"micro_batch": 2, "placement": "mlp"})
    choices = default_choices(config, SHAPE, "peft", CPU)
    assert (choices.micro_batch, choices.accumulation, choices.placement) == (2, 8, ["mlp"] * 3)
    assert default_choices(CONFIG.model_copy(update={"sequence_tokens": 2048}), SHAPE, "triton").micro_batch == 4


@pytest.mark.parametrize(("memory", "cap"), [(24, None), (24, "40GiB"), (16, None), (80, "20GiB")])
def test_a_default_that_a_gpu_does_not_hold_gives_something_up(memory: int, cap: str | None) -> None:
    shape, small = SHAPES["llama-3-8b"], replace(GPU, memory_bytes=memory * 2**30)
    config = RunConfig(
        model="llama-3-8b", quantization="nf4", sequence_tokens=2048, batch_size=4, optimizer="adamw_8bit",
        memory_cap=cap,
    )  # fmt: skip
    found = default_for(config, shape, small)
    room, words = (20, "20.00 GiB") if cap == "20GiB" else (memory, f"this device's {memory}.00 GiB")
    assert room * 2**29 < estimate_peak_bytes(shape, found.choices, config, device=small) < room * 2**30
    assert found.choices != default_choices(config, shape, "triton", small)
    assert found.limit == words
    assert found.warnings == ()


def test_a_default_that_fits_spends_no_more() -> None:
    """Memory that nobody needs is left: dense copies are a plan's to choose."""
    shape, config = SHAPES["llama-3-8b"], RunConfig(model="llama-3-8b", quantization="nf4", sequence_tokens=2048)
    assert default_for(config, shape, GPU) == Default(default_choices(config, shape, "triton", GPU))


def test_a_gpu_that_is_too_small_for_everything_is_told() -> None:
    shape, small = SHAPES["llama-3-8b"], replace(GPU, memory_bytes=8 * 2**30)
    found = default_for(RunConfig(model="llama-3-8b", sequence_tokens=2048), shape, small)
    assert (found.choices.micro_batch, set(found.choices.placement)) == (1, {"offload"})
    assert "there are this device's 8.00 GiB" in found.warnings[0]


@pytest.mark.parametrize("cap_gib", [7.8, 10, 20, 40])
def test_a_cap_without_a_plan_is_kept_by_the_estimate(cap_gib: float) -> None:
    shape = SHAPES["llama-3-8b"]
    config = RunConfig(
        model="llama-3-8b", quantization="nf4", optimizer="adamw_8bit", sequence_tokens=2048, memory_cap=f"{cap_gib}GiB"
    )
    found = default_for(config, shape, GPU)
    assert found.warnings == ()
    assert estimate_peak_bytes(shape, found.choices, config, device=GPU) <= cap_gib * 2**30
    assert found.limit == f"{cap_gib:.2f} GiB"
    if cap_gib == 40:
        assert found.choices.resident_layers > 0, "memory is left over"
        default = default_choices(config, shape, found.choices.backend, GPU)
        assert found.choices.model_copy(update={"resident_layers": 0}) == default


def test_a_cap_respects_what_the_run_sets() -> None:
    config = RunConfig(model="llama-3-8b", quantization="nf4", sequence_tokens=2048, memory_cap="13GiB", micro_batch=4)
    found = default_for(config, SHAPES["llama-3-8b"], GPU)
    assert found.choices.micro_batch == 4
    assert {"mlp", "offload_mlp"} & set(found.choices.placement)


def test_a_cap_below_the_model_is_refused() -> None:
    config = RunConfig(model="llama-3-8b", memory_cap="7GiB")
    with pytest.raises(PlanError, match=r"below what the model itself needs; got 7\.00 GiB"):
        default_for(config, SHAPES["llama-3-8b"], GPU)


def test_a_cap_that_only_just_holds_the_model_warns() -> None:
    config = RunConfig(model="llama-3-8b", quantization="nf4", sequence_tokens=4096, memory_cap="5GiB")
    found = default_for(config, SHAPES["llama-3-8b"], GPU)
    assert (found.choices.micro_batch, set(found.choices.placement)) == (1, {"offload"})
    assert found.warnings == ("the smallest choices are estimated at 5.63 GiB; there are 5.00 GiB",)
