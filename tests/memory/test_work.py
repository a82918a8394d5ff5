"""How much work a step is, by arithmetic, against what an H100 measured (reports/published): 340 configurations of
four models, micro-batches of 2,048 to 8,192 tokens.

Rates and counts of `fastft.memory.work` were chosen by three of them, a scale a model aside: what counts is which
choices are faster than which, and by how much.  The fourth, Llama-3.2-1B's, only had a say in what loss chunks cost.
"""

import math
from pathlib import Path
from statistics import median

import pytest

from bench.trial_file import TrialFile
from devices import CPU
from fastft.config import RunConfig
from fastft.hardware import Device
from fastft.memory.model import memory_terms
from fastft.memory.work import layer_flops, layer_windows, policy_work, recompute_flops, step_work
from fastft.models.shapes import SHAPES
from fastft.plan import Choices, Policy

SHAPE, LARGE = SHAPES["toy-llama"], SHAPES["llama-3-8b"]
H100 = Device("cuda", "NVIDIA H100 80GB HBM3", "9.0", 132, 79 * 2**30, 16)
PUBLISHED = Path(__file__).parents[2] / "reports" / "published"
RUN = RunConfig(model="llama-3-8b", sequence_tokens=2048, batch_size=4, dtype="bf16", quantization="nf4")
PLAIN = Choices(backend="triton", micro_batch=4, accumulation=1, placement=["light"] * 32)


def work(shape_run: RunConfig = RUN, device: Device = H100, **changes: object) -> float:
    return step_work(SHAPES[shape_run.model], PLAIN.model_copy(update=changes), shape_run, device)


@pytest.mark.parametrize(
    "record", ["2026-11-25-h100-regret-qwen2-0.5b", "2026-11-25-h100-regret-qwen2-1.5b",
    "2026-11-25-h100-regret-llama-3-8b", "2026-11-26-h100-regret-llama-3.2-1b"],
)  # fmt: skip
def test_times_of_a_grid_are_within_a_few_percent_of_a_line_through_zero(record: str) -> None:
    grid = TrialFile(PUBLISHED / record / "grid.jsonl")
    config = grid.header().config
    scales = [
        median(trial.step_time_ms) / step_work(SHAPES[config.model], trial.choices, config, H100)
        for trial in grid.trials()
        if trial.verdict == "ok" and trial.choices.backend == "triton"
    ]
    assert len(scales) >= 60
    errors = [scale / median(scales) - 1 for scale in scales]
    assert math.sqrt(sum(error**2 for error in errors) / len(errors)) <= 0.03
    assert max(map(abs, errors)) <= 0.08


def test_small_micro_batches_of_small_models_cost_most() -> None:
    """Measured: 35 % for rows one by one instead of four at once where a layer has 15 million weights, 5 % at 218."""
    small = RUN.model_copy(update={"model": "qwen2-0.5b", "quantization": "none"})
    large = RUN.model_copy(update={"quantization": "none"})
    one, four = (
        work(small, micro_batch=size, accumulation=4 // size, placement=["light"] * 24) for size in (1, 4)
    )  # fmt: skip
    assert one / four == pytest.approx(1.32, abs=0.04)
    one, four = (work(large, micro_batch=size, accumulation=4 // size) for size in (1, 4))
    assert one / four == pytest.approx(1.053, abs=0.02)


def test_every_choice_that_saves_memory_is_priced() -> None:
    plain = work()
    changes: list[dict[str, object]] = [
        {"placement": ["mlp"] * 32}, {"placement": ["offload"] * 32}, {"loss_chunk_tokens": 512},
        {"mlp_chunk_tokens": 2048}, {"host_embedding": True}, {"micro_batch": 1, "accumulation": 4},
    ]  # fmt: skip
    for change in changes:
        assert work(**change) > plain, change
    assert work(resident_layers=32) < work(resident_layers=16) < plain
    small = RUN.model_copy(update={"model": "qwen2-0.5b", "quantization": "none"})
    assert work(small, placement=["light"] * 24, graphs="off") > 1.5 * work(small, placement=["light"] * 24)
    # A larger chunk is no faster, and one beyond the micro-batch is all of it.
    assert work(loss_chunk_tokens=8192) == work(loss_chunk_tokens=2048) == plain


def test_a_cpu_launches_nothing_and_starts_quickly() -> None:
    on_cpu = RUN.model_copy(update={"quantization": "none", "dtype": "fp32"})
    one, four = (work(on_cpu, CPU, micro_batch=size, accumulation=4 // size) for size in (1, 4))
    assert four < one < 1.01 * four
    assert work(on_cpu, CPU, graphs="off") == four


def test_recomputation_counts_flops() -> None:
    sizes = SHAPE.linear_sizes
    weights = {name: i * o for name, (i, o) in sizes.items()}
    assert recompute_flops(SHAPE, "light", 128) == 0
    assert recompute_flops(SHAPE, "mlp", 128) == 2 * (weights["gate_proj"] + weights["up_proj"])
    full = recompute_flops(SHAPE, "full", 128)
    assert full == 2 * (sum(weights.values()) - weights["down_proj"]) + 2 * 128 * 64
    assert recompute_flops(SHAPE, "full", 128, "peft") == full + 2 * weights["down_proj"]
    assert full < layer_flops(SHAPE, 128)


def test_a_window_makes_attention_cheaper() -> None:
    shape = SHAPES["toy-gemma3"]  # a window of 7 in the first and the last layer
    assert layer_windows(shape) == [7, None, 7]
    assert layer_windows(SHAPES["toy-mistral"]) == [7, 7, 7]
    assert layer_windows(SHAPE) == [None] * 3
    seen = (7 * 128 - 7 * 7 / 2) / (128 * 128 / 2)
    attention = 2.0 * 128 * shape.heads * shape.head_dim
    everything = recompute_flops(shape, "full", 128)
    assert recompute_flops(shape, "full", 128, window=7) == pytest.approx(everything - attention * (1 - seen))
    assert layer_flops(shape, 128, window=7) == pytest.approx(layer_flops(shape, 128) - 3.5 * attention * (1 - seen))
    assert recompute_flops(shape, "full", 7, window=7) == recompute_flops(shape, "full", 7)


@pytest.mark.parametrize(("policy", "waits"), [("offload", False), ("offload_mlp", True)])
def test_a_copy_costs_what_outlasts_the_forward(policy: Policy, waits: bool) -> None:
    """What `offload_mlp` moves of a small layer takes longer than its forward; its input alone does not."""
    shape, run = SHAPES["qwen2-0.5b"], RUN.model_copy(update={"model": "qwen2-0.5b", "quantization": "none"})
    choices = PLAIN.model_copy(update={"placement": [policy] * 24})
    terms = memory_terms(shape, choices, run, H100)
    stays: Policy = "mlp" if policy == "offload_mlp" else "full"
    more = policy_work(policy, terms, shape, choices, run, H100) - policy_work(stays, terms, shape, choices, run, H100)
    assert more > 0
    assert (more > 0.05 * layer_flops(shape, 2048)) is waits
