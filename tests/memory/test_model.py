import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices import CPU, GPU
from fastft.config import RunConfig
from fastft.memory.model import (
    _GPU_RUNTIME_BYTES,
    MemoryTerms,
    dense_layer_bytes,
    estimate_peak_bytes,
    memory_terms,
)
from fastft.models.shapes import SHAPES
from fastft.plan import OFFLOADED, POLICIES, Choices, Policy

SHAPE = SHAPES["toy-llama"]
GIB = 2**30


def choices(placement: list[Policy], backend: str = "eager", micro_batch: int = 4) -> Choices:
    return Choices(
        backend=backend, micro_batch=micro_batch, accumulation=16 // micro_batch, placement=placement, graphs="off"
    )


def test_policies_are_ordered_by_what_they_save() -> None:
    for name, shape in SHAPES.items():
        for backend in ("eager", "peft"):
            terms = memory_terms(shape, choices(["light"], backend), RunConfig(), GPU)
            saved = [terms.saved[policy] for policy in POLICIES if policy not in OFFLOADED]
            assert saved == sorted(saved, reverse=True), name
            assert terms.saved["full"] < terms.saved["light"]


def test_what_goes_to_the_host_is_large_and_the_rest_stays() -> None:
    """8,192 tokens of an 8B: of x, q, k, v, attention's output, its statistics and x₂, not of the narrow products."""
    shape = SHAPES["llama-3-8b"]
    config = RunConfig(sequence_tokens=2048, dtype="bf16")
    terms = memory_terms(shape, choices(["light"] * 32, "triton"), config, GPU)
    assert terms.moved == {"offload": 8192 * 2 * 4096, "offload_mlp": 8192 * (2 * (4 * 4096 + 2 * 1024) + 4 * 32)}
    for policy, of in OFFLOADED.items():
        assert terms.saved[policy] == terms.saved[of] - terms.moved[policy]
        assert 0 < terms.saved[policy] <= 8192 * (2 * 7 * 16 + 8)
    # The last layer's share is needed again at once, so it stays.
    assert (
        terms.peak(["offload"] * 32) >= terms.model + terms.head + 32 * terms.saved["offload"] + terms.moved["offload"]
    )


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
    assert terms.model == 2 * SHAPE.parameters + trainable * (4 + 2 + 8) + _GPU_RUNTIME_BYTES
    assert terms.gradients == 4 * trainable
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


# Of a layer that goes to the host, a tensor leaves as soon as it is large enough: one token more may need less.
@given(st.sampled_from(sorted(set(POLICIES) - set(OFFLOADED))), st.sampled_from([1, 2, 4, 8]), st.integers(8, 4096))
def test_more_tokens_need_more(policy: Policy, micro_batch: int, tokens: int) -> None:
    def peak(size: int, length: int) -> int:
        config = RunConfig(sequence_tokens=length)
        return estimate_peak_bytes(SHAPE, choices([policy] * 3, micro_batch=size), config, device=GPU)

    # With very few tokens the adapters' gradients are all that counts.
    assert peak(micro_batch, tokens) <= peak(micro_batch, tokens + 1) <= peak(2 * micro_batch, tokens)
    if tokens >= 512:
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


def test_the_layer_before_is_on_its_way_while_a_layer_runs() -> None:
    terms = MemoryTerms(
        model=100, saved={"offload": 0, "light": 30}, working={"offload": 5, "light": 5}, head=1, moved={"offload": 20}
    )  # type: ignore[typeddict-item]
    assert terms.peak(["offload", "light"]) == 100 + 30 + 5 + 20
    assert terms.peak(["light", "light"]) == 100 + 2 * 30 + 5
    assert terms.peak(["offload", "light", "light"]) == 100 + 2 * 30 + 5  # it comes when one is done
    assert terms.peak(["offload", "offload"]) == 100 + 5 + 2 * 20
    assert terms.peak(["light", "offload"]) == 100 + 30 + 5 + 20


def test_a_forward_holds_all_that_it_made() -> None:
    terms = MemoryTerms(
        model=100, saved={"offload": 0, "full": 10, "light": 30}, working={"offload": 5, "full": 5, "light": 5}, head=1,
        moved={"offload": 20}, forward={"offload": 70, "full": 70, "light": 70},
    )  # type: ignore[typeddict-item]  # fmt: skip
    assert terms.peak(["full", "light"]) == 100 + 10 + 70
    assert terms.peak(["offload", "light"]) == 100 + 20 + 70
    assert terms.peak(["light", "light", "offload"]) == 100 + 2 * 30 + 70


@pytest.mark.parametrize("rows", [1, 8])
def test_a_recording_has_tensors_of_its_own(rows: int) -> None:
    shape, config = SHAPES["llama-3-8b"], RunConfig(sequence_tokens=1024, dtype="bf16", batch_size=4)
    launched, recorded, automatic = (
        memory_terms(shape, choices(["light"] * 32, "triton", rows).model_copy(update={"graphs": graphs}), config, GPU)
        for graphs in ("off", "on", "auto")
    )
    own = rows * 1024 * 3 * 4096 * 2 + 32 * 2**20
    assert (launched.recording, recorded.recording) == (0, own)
    assert automatic.recording == (own if rows == 1 else 0), "large steps are not recorded"
    assert recorded.peak(["light"] * 32) == launched.peak(["light"] * 32) + own


def test_gradients_pile_up_where_nothing_is_saved() -> None:
    terms = MemoryTerms(
        model=100, saved={"offload": 0, "light": 30}, working={"offload": 5, "light": 5}, head=1, gradients=40
    )  # type: ignore[typeddict-item]
    assert terms.peak(["offload"] * 4) == 100 + 2 * 40  # joined at the end
    assert terms.peak(["light"] * 4) == 100 + 4 * 30 + 5


def test_each_measure_saves_what_it_says() -> None:
    shape = SHAPES["llama-3-8b"]
    config = RunConfig(sequence_tokens=2048, quantization="nf4", dtype="bf16", batch_size=4)
    plain = choices(["offload"] * 32, "triton")
    peak = estimate_peak_bytes(shape, plain, config, device=GPU)

    def saves(**measure: object) -> int:
        return peak - estimate_peak_bytes(shape, plain.model_copy(update=measure), config, device=GPU)

    assert saves(host_embedding=True) == shape.vocabulary * shape.hidden * 2
    assert saves(mlp_chunk_tokens=2048) > 0
    # A layer more that stays dense costs its weights, and the last one spares the place to dequantize to.
    assert saves(resident_layers=8) == -8 * dense_layer_bytes(shape, config, GPU)
    assert saves(resident_layers=32) > -32 * dense_layer_bytes(shape, config, GPU)


def test_a_tile_as_large_as_the_whole_changes_nothing() -> None:
    config = RunConfig(sequence_tokens=512)
    whole = choices(["mlp"] * 3, "triton")
    tiled = whole.model_copy(update={"mlp_chunk_tokens": 4096})
    assert estimate_peak_bytes(SHAPE, tiled, config) == estimate_peak_bytes(SHAPE, whole, config)
