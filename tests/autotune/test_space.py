from dataclasses import replace
from typing import Any

import pytest

from autotune import space
from autotune.forecast import forecast
from autotune.space import (
    EFFORTS,
    LOSS_CHUNKS,
    candidates,
    default_candidate,
    memory_limit,
    refinements,
    uniform_policy,
    why_skip,
)
from devices import CPU, GPU
from fastft.config import RunConfig
from fastft.hardware import Device
from fastft.models.shapes import SHAPES, ModelShape
from fastft.plan import POLICIES, Choices, Policy, Trial

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
    found = candidates(config, shape, small, "full")
    assert found[0] == default_candidate(config, shape, small)
    assert (found[0].micro_batch, uniform_policy(found[0])) != (4, "light"), "30 GiB by the estimate"
    kinds = {(c.micro_batch, uniform_policy(c)) for c in found[1:]}
    assert (4, "light") not in kinds
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


def test_another_micro_batch_gives_up_no_more_than_it_must() -> None:
    """A default that computes its loss in small chunks, to have both rows at once, says nothing of one row."""
    run = RunConfig(
        model="llama-3.2-1b", sequence_tokens=4096, batch_size=2, quantization="nf4", dtype="bf16",
        optimizer="adamw_8bit", memory_cap="7.76GiB",
    )  # fmt: skip
    device = replace(GPU, memory_bytes=80 * 2**30)
    default = default_candidate(run, SHAPES["llama-3.2-1b"], device)
    small = default.model_copy(update={"loss_chunk_tokens": 512, "host_embedding": True})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(space, "default_candidate", lambda *_: small)
        found = candidates(run, SHAPES["llama-3.2-1b"], device, "quick")
    assert small.micro_batch == 2
    fitted = next(choices for choices in found if choices.micro_batch == 1)
    assert (fitted.loss_chunk_tokens, fitted.host_embedding, fitted.resident_layers) == (2048, False, 16)


def test_what_had_too_little_memory_for_dense_weights_rules_out_nothing_without() -> None:
    without = Choices(backend="triton", micro_batch=4, accumulation=4, placement=["light"] * SHAPE.layers)
    dense = without.model_copy(update={"resident_layers": 3})
    assert why_skip(without, [Trial(choices=dense, verdict="out_of_memory")], "quick") is None
    assert why_skip(without, [Trial(choices=without, verdict="out_of_memory")], "quick") is not None


@pytest.mark.parametrize("device", [CPU, GPU], ids=["cpu", "gpu"])
def test_the_promising_come_first_and_stock_soon(device: Device) -> None:
    config = RunConfig(model="llama-3-8b", sequence_tokens=2048, quantization="nf4", dtype="bf16")
    others = candidates(config, SHAPES["llama-3-8b"], device, "full")[1:]
    assert "peft" in {choices.backend for choices in others[:2]}
    fused = [c for c in others if c.backend != "peft" and not c.resident_layers and uniform_policy(c) == "light"]
    times = [forecast(choices, config, SHAPES["llama-3-8b"], device) for choices in fused]
    fitting = times[: len(times) // 2]  # what may not fit is at the end
    assert fitting == sorted(fitting)


def test_the_efforts_keep_to_their_minutes_on_an_h200() -> None:
    """An 8B model in NF4 at 2,048 tokens: 7 s a probe and 5 for the check of the gradients (docs/log.md); up to 20 and
    25 with what a slow disk adds."""
    for name in ("quick", "full"):
        effort = EFFORTS[name]
        assert effort.probes is not None
        assert effort.minutes is not None
        assert effort.uniform_probes is not None
        assert effort.kernel_seconds + 20 * effort.probes + 25 <= 60 * effort.minutes
        assert effort.uniform_probes + effort.mixed_probes + effort.repetitions <= effort.probes


# Refinements

LEADER = Trial(
    choices=Choices(backend="triton", micro_batch=4, accumulation=4, placement=["light"] * 3),
    verdict="ok", step_time_ms=[1.0], peak_bytes=2**30,
    other_attention=["flash", "efficient", "sdpa"],
)  # fmt: skip
LONG = CONFIG.model_copy(update={"sequence_tokens": 4096})


def refined(
    effort: str, leader: Trial = LEADER, config: RunConfig = LONG, device: Device = GPU, shape: ModelShape = SHAPE
) -> list[dict[str, Any]]:
    """What each refinement changes."""
    before = leader.choices.model_dump()
    changes = []
    for choices in refinements(leader, config, shape, device, effort):  # type: ignore[arg-type]
        changes.append({name: value for name, value in choices.model_dump().items() if value != before[name]})
    return changes


def test_a_refinement_changes_one_thing_and_effort_changes_more_things() -> None:
    assert refined("quick") == [{"attention": "flash"}, {"graphs": "off"}, {"loss_chunk_tokens": 4096}]
    assert refined("full") == [
        {"attention": "flash"}, {"attention": "efficient"}, {"graphs": "off"}, {"loss_chunk_tokens": 4096},
        {"loss_chunk_tokens": 8192},
    ]  # fmt: skip
    exhaustive = refined("exhaustive")
    assert {"attention": "sdpa"} in exhaustive
    assert {c["loss_chunk_tokens"] for c in exhaustive if "loss_chunk_tokens" in c} == {*LOSS_CHUNKS} - {2048}


def test_what_changes_nothing_or_does_not_fit_is_no_refinement() -> None:
    # 4 × 128 rows are 512: no chunk above that differs from the present one.
    assert refined("exhaustive", config=CONFIG) == [c for c in refined("exhaustive") if "loss_chunk_tokens" not in c]
    assert refined("exhaustive", LEADER.model_copy(update={"other_attention": []}), CONFIG, CPU) == []
    at_flash = LEADER.model_copy(update={"choices": LEADER.choices.model_copy(update={"attention": "flash"})})
    assert {"attention": "flash"} not in refined("exhaustive", at_flash)
    assert {"attention": "auto"} in refined("exhaustive", at_flash)
    # With so many words the logits are the peak: 2,048 rows more of them are 4 GiB.
    large, wide = LONG.model_copy(update={"memory_cap": "4GiB"}), replace(SHAPE, vocabulary=2**20)
    assert {"loss_chunk_tokens": 4096} not in refined("exhaustive", config=large, shape=wide)
    assert {"loss_chunk_tokens": 1024} in refined("exhaustive", config=large, shape=wide)
    assert {"loss_chunk_tokens": 4096} in refined("exhaustive", config=LONG, shape=wide)
    stock = LEADER.model_copy(update={"choices": LEADER.choices.model_copy(update={"backend": "peft"})})
    assert refined("exhaustive", stock) == []
    assert {"attention": "sdpa"} not in refined("quick", LEADER.model_copy(update={
        "other_attention": ["sdpa"]}), device=CPU)  # fmt: skip


def test_a_refinement_fits_by_what_was_measured_and_the_estimated_difference() -> None:
    """The leader needs more than is estimated; 2,048 rows more of 65,536 logits are a quarter of a GiB."""
    config, shape = LONG.model_copy(update={"memory_cap": "4GiB"}), replace(SHAPE, vocabulary=2**16)
    for peak_gib, fits in ((3.5, True), (3.9, False)):
        leader = LEADER.model_copy(update={"peak_bytes": int(peak_gib * 2**30)})
        assert ({"loss_chunk_tokens": 4096} in refined("exhaustive", leader, config, shape=shape)) == fits


def test_graphs_are_recorded_or_not_whatever_auto_does() -> None:
    large = RunConfig(model="llama-3-8b", sequence_tokens=2048, dtype="bf16")
    wide = LEADER.model_copy(update={"choices": LEADER.choices.model_copy(update={"placement": ["light"] * 32})})

    def graphs(config: RunConfig, shape: ModelShape, leader: Trial, mode: str, device: Device = GPU) -> list[str]:
        now = leader.model_copy(update={"choices": leader.choices.model_copy(update={"graphs": mode})})
        return [c["graphs"] for c in refined("exhaustive", now, config, device, shape) if "graphs" in c]

    of_small = [graphs(CONFIG, SHAPE, LEADER, mode) for mode in ("auto", "on", "off")]
    assert of_small == [["off"], ["off"], ["auto"]], "auto records small steps"
    of_large = [graphs(large, SHAPES["llama-3-8b"], wide, mode) for mode in ("auto", "on", "off")]
    assert of_large == [["on"], ["auto"], ["on"]]
    assert graphs(CONFIG, SHAPE, LEADER, "auto", CPU) == []
    dropped = CONFIG.model_copy(update={"lora": CONFIG.lora.model_copy(update={"dropout": 0.1})})
    assert graphs(dropped, SHAPE, LEADER, "auto") == []


def test_keep_is_tried_from_what_leads_where_it_saves_more() -> None:
    qwen3 = SHAPES["toy-qwen3"]
    assert refined("quick", shape=qwen3)[0] == {"placement": ["keep"] * 3}
    assert all("placement" not in change for change in refined("exhaustive"))
    mixed = LEADER.model_copy(update={"choices": LEADER.choices.model_copy(update={"placement": ["mlp"] * 3})})
    assert {"placement": ["keep"] * 3} not in refined("exhaustive", mixed, shape=qwen3)
