"""A GPU that costs what a formula says: what the tests of the tuner measure on."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from autotune.probe import ProbeRequest, judge
from autotune.search import tune
from devices import GPU
from fastft.config import RunConfig
from fastft.models.shapes import SHAPES
from fastft.plan import Choices, Policy, Trial
from fastft.plan_store import PlanStore
from fastft.record import Memory

# With norms of heads, behind which `keep` keeps more than `light`.
SHAPE = replace(SHAPES["llama-3.2-1b"], family="qwen3")
CONFIG = RunConfig(model="llama-3.2-1b", sequence_tokens=1024)
GIB = 2**30

PRICE_MS: dict[Policy, float] = {"keep": 0.0, "light": 0.2, "mlp": 2.0, "full": 3.0, "offload_mlp": 3.5, "offload": 4.5}
SAVED_MIB: dict[Policy, int] = {"keep": 90, "light": 60, "mlp": 25, "full": 5, "offload_mlp": 1, "offload": 0}


class FakeGpu:
    """Deterministic costs: a step takes longer with small micro-batches, with recomputation, and with stock PEFT."""

    def __init__(self, memory_bytes: int = 140 * GIB, **change: Any) -> None:
        self.memory_bytes = memory_bytes
        self.requests: list[ProbeRequest] = []
        self.speed: Callable[[Choices], float] = change.get("speed", lambda choices: 1.0)

    def time_ms(self, choices: Choices) -> float:
        launch = 20.0 * choices.accumulation + (8.0 * choices.micro_batch if choices.micro_batch > 8 else 0.0)
        time = 200.0 + launch + sum(PRICE_MS[policy] for policy in choices.placement)
        return time * (1.5 if choices.backend == "peft" else 1.0) / self.speed(choices)

    def peak(self, choices: Choices) -> int:
        saved = sum(SAVED_MIB[policy] for policy in choices.placement) * 2**20 * choices.micro_batch
        return 3 * GIB + saved * (3 if choices.backend == "peft" else 1)

    def __call__(self, request: ProbeRequest) -> Trial:
        self.requests.append(request)
        choices, peak = request.choices, self.peak(request.choices)
        if peak > self.memory_bytes:
            return Trial(choices=choices, verdict="out_of_memory", peak_bytes=self.memory_bytes, detail="no memory")
        time = self.time_ms(choices)
        memory = Memory(kind="cuda_allocated", model_bytes=3 * GIB, peak_bytes=peak)
        verdict, detail = judge(memory, request.config.memory_cap_bytes)
        return Trial(
            choices=choices, verdict=verdict, step_time_ms=[time, time * 1.001, time * 0.999], model_bytes=3 * GIB,
            tokens_per_second=16 * 1024 * 1000 / time, peak_bytes=peak, detail=detail,
        )  # fmt: skip

    def probed(self) -> list[Choices]:
        return [request.choices for request in self.requests]


def run(store: PlanStore, gpu: Callable[[ProbeRequest], Trial], config: RunConfig = CONFIG, **more: Any) -> Any:
    return tune(config, run_probe=gpu, store=store, **{"shape": SHAPE, "device": GPU, **more})


def capped(gib: float | None) -> RunConfig:
    return CONFIG if gib is None else CONFIG.model_copy(update={"memory_cap": f"{gib}GiB"})
