"""Trials of uniform placements of a toy model, by hand."""

from fastft.config import RunConfig
from fastft.models.shapes import SHAPES
from fastft.plan import Choices, Policy, Trial

SHAPE = SHAPES["toy-llama"]
CONFIG = RunConfig(model="toy-llama", sequence_tokens=128)


def trial(
    policy: Policy, size: int, peak: int | None, verdict: str = "ok", times: tuple[float, ...] = (10.0,)
) -> Trial:
    choices = Choices(backend="eager", micro_batch=size, accumulation=16 // size, placement=[policy] * 3)
    return Trial.model_validate(
        {"choices": choices, "verdict": verdict, "peak_bytes": peak, "model_bytes": 1000, "step_time_ms": times}
    )
