import pytest

from autotune.space import EFFORTS, candidates, default_candidate, memory_limit, uniform_policy, why_skip
from fastft.config import RunConfig
from fastft.hardware import Device
from fastft.models.shapes import SHAPES
from fastft.plan import POLICIES, Choices, Policy, Trial

CPU = Device("cpu", "C", None, None, 2**35, 2)
GPU = Device("cuda", "H", "9.0", 132, 140 * 2**30, 8)
SHAPE = SHAPES["toy-llama"]
CONFIG = RunConfig(model="toy-llama", sequence_tokens=128)


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("device", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("batch_size", [1, 7, 16, 24])
def test_candidates_keep_the_global_batch_and_start_with_the_default(
    effort: str, device: Device, batch_size: int
) -> None:
    config = CONFIG.model_copy(update={"batch_size": batch_size})
    found = candidates(config, SHAPE, device, effort)  # type: ignore[arg-type]
    assert found[0] == default_candidate(config, SHAPE, device)
    assert all(choices.micro_batch * choices.accumulation == batch_size for choices in found)
    assert all(len(choices.placement) == SHAPE.layers for choices in found)
    assert len({choices.model_dump_json() for choices in found}) == len(found)
    backends = {choices.backend for choices in found}
    assert "peft" in backends
    assert ("triton" in backends) == (device.kind == "cuda")


def test_quick_on_a_cpu_is_short() -> None:
    assert len(candidates(CONFIG, SHAPE, CPU, "quick")) <= 6


def test_more_effort_tries_more() -> None:
    quick, full, exhaustive = (candidates(CONFIG, SHAPES["toy-qwen3"], GPU, effort) for effort in EFFORTS)
    assert len(quick) < len(full) <= len(exhaustive)
    assert all(choices in full for choices in quick)
    assert all(choices in exhaustive for choices in full)
    assert "eager" not in {choices.backend for choices in quick}
    assert "eager" in {choices.backend for choices in full}
    assert {choices.micro_batch for choices in exhaustive} == {1, 2, 4, 8, 16}
    assert {uniform_policy(choices) for choices in exhaustive} == set(POLICIES)
    # Where it saves the same, `keep` is another name for `light`.
    of_llama = candidates(CONFIG, SHAPES["toy-llama"], GPU, "exhaustive")
    assert {uniform_policy(choices) for choices in of_llama} == {*POLICIES} - {"keep"}


def test_what_cannot_fit_is_pruned_and_the_default_never() -> None:
    shape, small = SHAPES["llama-3-8b"], Device("cuda", "S", "8.9", 60, 24 * 2**30, 8)
    config = RunConfig(model="llama-3-8b", quantization="nf4", sequence_tokens=2048)
    kinds = {(c.micro_batch, uniform_policy(c)) for c in candidates(config, shape, small, "full")}
    assert (4, "light") in kinds  # the default: 30 GiB by the estimate
    assert (16, "light") not in kinds
    assert (4, "keep") not in kinds
    assert (1, "light") in kinds


def test_a_cap_makes_recomputation_a_candidate_on_a_cpu_too() -> None:
    capped = candidates(CONFIG.model_copy(update={"memory_cap": "1GiB"}), SHAPE, CPU, "quick")
    assert {"mlp", "full"} <= {uniform_policy(choices) for choices in capped}
    assert memory_limit(CONFIG.model_copy(update={"memory_cap": "1GiB"}), CPU) == 2**30
    assert memory_limit(CONFIG.model_copy(update={"memory_cap": "1000GiB"}), CPU) == CPU.memory_bytes


def trial(policy: Policy, micro_batch: int, verdict: str = "ok", speed: float = 1.0, backend: str = "eager") -> Trial:
    choices = Choices(backend=backend, micro_batch=micro_batch, accumulation=16 // micro_batch, placement=[policy] * 3)
    return Trial.model_validate({"choices": choices, "verdict": verdict, "tokens_per_second": speed})


def skipped(policy: Policy, micro_batch: int, *trials: Trial, effort: str = "quick", backend: str = "eager") -> bool:
    candidate = trial(policy, micro_batch, backend=backend).choices
    return why_skip(candidate, trials, effort) is not None  # type: ignore[arg-type]


@pytest.mark.parametrize("verdict", ["out_of_memory", "allocator_retry", "over_cap"])
def test_what_needs_more_memory_than_a_failure_is_skipped(verdict: str) -> None:
    failed = trial("light", 4, verdict)
    assert skipped("light", 8, failed)
    assert skipped("keep", 4, failed)
    assert not skipped("light", 2, failed)
    assert not skipped("mlp", 4, failed)
    assert not skipped("mlp", 8, failed)
    assert not skipped("light", 8, failed, backend="peft")
    assert not skipped("light", 8, trial("light", 4, "failed"))
    assert not skipped("light", 8, trial("light", 4, "timeout"))


def test_what_recomputes_more_than_what_fits_is_skipped() -> None:
    ran = trial("light", 4)
    assert skipped("mlp", 4, ran)
    assert skipped("full", 4, ran)
    assert not skipped("full", 8, ran)
    assert not skipped("full", 4, ran, effort="exhaustive")


def test_keep_is_tried_at_the_best_micro_batches_only() -> None:
    ran = [trial("light", 2, speed=1.0), trial("light", 4, speed=3.0), trial("light", 8, speed=2.0)]
    assert not skipped("keep", 4, *ran)
    assert skipped("keep", 8, *ran)
    assert not skipped("keep", 8, *ran, effort="full")
    assert skipped("keep", 2, *ran, effort="full")


def test_mixed_placements_decide_nothing() -> None:
    mixed = trial("light", 4, "over_cap").model_copy(
        update={"choices": trial("light", 4).choices.model_copy(update={"placement": ["full", "light", "light"]})}
    )
    assert not skipped("light", 4, mixed)
    assert why_skip(mixed.choices, [trial("full", 1, "out_of_memory")], "quick") is None


def test_left_over_memory_and_a_cap_add_what_arithmetic_fits() -> None:
    shape = SHAPES["llama-3-8b"]
    quantized = RunConfig(model="llama-3-8b", sequence_tokens=2048, quantization="nf4", dtype="bf16")
    dense = [c for c in candidates(quantized, shape, GPU, "quick") if c.resident_layers]
    assert {choices.micro_batch for choices in dense} >= {1, 4}
    assert all(set(choices.placement) == {"light"} for choices in dense if choices.micro_batch <= 4)
    capped = candidates(quantized.model_copy(update={"memory_cap": "7.8GiB"}), shape, GPU, "quick")
    assert any(choices.host_embedding and uniform_policy(choices) is None for choices in capped)
    plain = RunConfig(model="llama-3-8b", sequence_tokens=2048, dtype="bf16")
    assert all(uniform_policy(choices) for choices in candidates(plain, shape, GPU, "quick"))


def test_what_had_too_little_memory_for_dense_weights_rules_out_nothing_without() -> None:
    without = Choices(backend="triton", micro_batch=4, accumulation=4, placement=["light"] * SHAPE.layers)
    dense = without.model_copy(update={"resident_layers": 3})
    assert why_skip(without, [Trial(choices=dense, verdict="out_of_memory")], "quick") is None
    assert why_skip(without, [Trial(choices=without, verdict="out_of_memory")], "quick") is not None
