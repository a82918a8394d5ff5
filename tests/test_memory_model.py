import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft.config import RunConfig
from fastft.hardware import Device
from fastft.memory_model import (
    MemoryTerms,
    best_placement_under,
    estimate_peak_bytes,
    memory_terms,
    recompute_flops,
    step_flops,
)
from fastft.models.shapes import SHAPES
from fastft.plan import POLICIES, Choices, Policy

SHAPE = SHAPES["toy-llama"]
GPU = Device("cuda", "H", "9.0", 132, 140 * 2**30, 8)
CPU = Device("cpu", "C", None, None, 2**35, 2)
GIB = 2**30


def choices(placement: list[Policy], backend: str = "eager", micro_batch: int = 4) -> Choices:
    return Choices(backend=backend, micro_batch=micro_batch, accumulation=16 // micro_batch, placement=placement)


def test_policies_are_ordered_by_what_they_save() -> None:
    for name, shape in SHAPES.items():
        for backend in ("eager", "peft"):
            terms = memory_terms(shape, choices(["light"], backend), RunConfig(), GPU)
            saved = [terms.saved[policy] for policy in POLICIES]
            assert saved == sorted(saved, reverse=True), name
            assert terms.saved["full"] < terms.saved["light"]


def test_light_saves_what_the_engine_saves() -> None:
    """One token of the toy in fp32, counted by hand: D 64, F 172, Q 64, K 32, 4 heads, rank 16."""
    config = RunConfig(sequence_tokens=8)
    terms = memory_terms(SHAPE, choices(["light"], micro_batch=1), config, CPU)
    elements = {
        "x and x2": 2 * 64, "q, k, v": 64 + 2 * 32, "attention": 64, "gate and up": 2 * 172,
        "narrow": 3 * 16 + 16 + 2 * 16 + 16,
    }  # fmt: skip
    statistics = 4 + 2  # log-sum-exp of four heads, two norms; fp32
    assert terms.saved["light"] == 8 * 4 * (sum(elements.values()) + statistics)
    assert terms.saved["full"] == 8 * 4 * (64 + elements["narrow"])
    # RMS norms, none of heads: nothing that they give is read again.
    assert terms.saved["keep"] == terms.saved["light"]


def test_the_model_part_counts_weights_adapters_and_optimizer() -> None:
    config = RunConfig()
    trainable = SHAPE.lora_parameters(16, SHAPE.spec.targets)
    terms = memory_terms(SHAPE, choices(["light"]), config, GPU)
    assert terms.model == 2 * SHAPE.parameters + trainable * (4 + 4 + 2 + 8)
    small = memory_terms(SHAPE, choices(["light"]), RunConfig(optimizer="adamw_8bit"), GPU)
    assert 0 < terms.model - small.model < 6 * trainable


def test_a_quantized_8b_has_the_published_size() -> None:
    """Llama-3-8B in NF4 with double quantization: 5.3 GiB with bf16 embedding and head."""
    shape = SHAPES["llama-3-8b"]
    config = RunConfig(quantization="nf4", optimizer="adamw_8bit")
    adapters = shape.lora_parameters(16, shape.spec.targets) * 10
    assert (memory_terms(shape, choices(["light"]), config, GPU).model - adapters) / GIB == pytest.approx(5.3, abs=0.1)


def test_against_a_measured_peak_of_stock() -> None:
    """Stock PEFT on an H200, bf16, 4×2048 tokens, 8-bit AdamW: 80.2 GiB without and 29.1 with checkpoints."""
    shape = SHAPES["llama-3-8b"]
    config = RunConfig(sequence_tokens=2048, optimizer="adamw_8bit")
    for policy, measured in (("light", 80.2), ("full", 29.1)):
        candidate = choices([policy] * 32, "peft")  # type: ignore[list-item]
        assert estimate_peak_bytes(shape, candidate, config, device=GPU) / GIB == pytest.approx(measured, rel=0.2)


def test_a_cpu_pays_for_fp32_and_the_process() -> None:
    candidate = choices(["light"] * 3)
    config = RunConfig(sequence_tokens=64)
    on_cpu, on_gpu = (estimate_peak_bytes(SHAPE, candidate, config, device=device) for device in (CPU, GPU))
    assert on_cpu > on_gpu + 300 * 2**20
    assert estimate_peak_bytes(SHAPE, candidate, config) == on_gpu


@given(st.sampled_from(POLICIES), st.sampled_from([1, 2, 4, 8]), st.integers(8, 4096))
def test_more_tokens_need_more(policy: Policy, micro_batch: int, tokens: int) -> None:
    def peak(size: int, length: int) -> int:
        config = RunConfig(sequence_tokens=length)
        return estimate_peak_bytes(SHAPE, choices([policy] * 3, micro_batch=size), config, device=GPU)

    assert peak(micro_batch, tokens) < peak(2 * micro_batch, tokens)
    assert peak(micro_batch, tokens) < peak(micro_batch, tokens + 1)


def test_the_peak_follows_the_backward() -> None:
    terms = MemoryTerms(
        model=100,
        saved={"keep": 40, "light": 30, "mlp": 20, "full": 10},
        working={"keep": 5, "light": 15, "mlp": 25, "full": 35},
        head=8,
    )
    assert terms.peak(["full", "light"]) == 100 + 40 + 15  # the last layer's, while all is saved
    assert terms.peak(["light", "full"]) == 100 + 40 + 35
    assert terms.peak(["keep", "keep"]) == 100 + 80 + 8  # the head's
    assert terms.peak(["full", "keep"]) == 100 + 50 + 8


def test_recomputation_counts_flops() -> None:
    sizes = SHAPE.linear_sizes
    weights = {name: i * o for name, (i, o) in sizes.items()}
    assert recompute_flops(SHAPE, "light", 128) == 0
    assert recompute_flops(SHAPE, "mlp", 128) == 2 * (weights["gate_proj"] + weights["up_proj"])
    full = recompute_flops(SHAPE, "full", 128)
    assert full == 2 * (sum(weights.values()) - weights["down_proj"]) + 2 * 128 * 64
    assert recompute_flops(SHAPE, "full", 128, "peft") == full + 2 * weights["down_proj"]
    assert full < step_flops(SHAPE, 128)


@settings(max_examples=40)
@given(st.floats(0.0, 1.1), st.sampled_from([128, 512]))
def test_the_best_placement_fits_and_none_that_fits_recomputes_less(share: float, tokens: int) -> None:
    config = RunConfig(sequence_tokens=tokens)
    base = choices(["light"] * 3)
    smallest, largest = (
        estimate_peak_bytes(SHAPE, choices([policy] * 3), config, device=GPU) for policy in ("full", "light")
    )  # type: ignore[misc]
    cap = int(smallest + share * (largest - smallest))
    found = best_placement_under(cap, SHAPE, base, config, device=GPU)
    prices = {
        placement: sum(recompute_flops(SHAPE, policy, tokens) for policy in placement)
        for placement in itertools.product(("light", "mlp", "full"), repeat=3)
        if estimate_peak_bytes(SHAPE, choices(list(placement)), config, device=GPU) <= cap
    }
    if found is None:
        assert not prices
    else:
        assert prices[tuple(found)] == min(prices.values())
        order = [POLICIES.index(policy) for policy in found]
        assert order == sorted(order, reverse=True), "layers that save most come last"


def test_nothing_fits_under_a_tiny_cap() -> None:
    assert best_placement_under(1000, SHAPE, choices(["light"] * 3), RunConfig(), device=GPU) is None


def test_stock_checkpoints_all_layers_or_none() -> None:
    config, base = RunConfig(sequence_tokens=512), choices(["light"] * 3, "peft")
    light = estimate_peak_bytes(SHAPE, base, config, device=GPU)
    assert best_placement_under(light, SHAPE, base, config, device=GPU) == ["light"] * 3
    assert best_placement_under(light - 1, SHAPE, base, config, device=GPU) == ["full"] * 3
