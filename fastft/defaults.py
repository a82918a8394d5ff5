"""What a run does without a plan: rules that are safe, and the memory model's arithmetic where memory is short.

So a memory cap is useful before anything was tuned, and a run fits a small device.
"""

import importlib.util
import os
from typing import NamedTuple

from fastft.config import RunConfig
from fastft.errors import BackendError, PlanError, unknown_choice
from fastft.hardware import Device
from fastft.memory.fitting import fit, room_under, smallest
from fastft.memory.model import estimate_peak_bytes, memory_terms
from fastft.memory.work import step_work
from fastft.models.shapes import ModelShape
from fastft.plan import Choices
from fastft.plan_store import PLAN_BACKENDS
from fastft.units import gib

MICRO_BATCH_TOKENS = {"cuda": 8192, "cpu": 4096}
"""The default micro-batch is the largest divisor of the global batch whose full rows have up to so many tokens: with
more a step is hardly faster."""


class Default(NamedTuple):
    """What is done, and for what something was given up."""

    choices: Choices
    limit: str | None = None
    """The memory that the choices are estimated to stay under, in words; None where it does not matter."""
    warnings: tuple[str, ...] = ()


def default_for(config: RunConfig, shape: ModelShape, device: Device) -> Default:
    """`default_choices`, or what the memory model thinks is fastest under a memory cap, or on a small device.

    Raises:
        PlanError: the model, its adapters and optimizer alone need more than the cap.
    """
    choices = default_choices(config, shape, resolve_backend(config, device), device)
    cap, room = config.memory_cap_bytes, room_under(config.memory_cap_bytes, device)
    if cap is None and estimate_peak_bytes(shape, choices, config, device=device) <= room:
        return Default(choices)
    limit = f"this device's {gib(device.memory_bytes)}" if cap is None or cap > device.memory_bytes else gib(cap)
    fastest = _fastest_under(room, config, shape, device, choices)
    if fastest is not None:
        return Default(fastest, limit)
    one_row = _with_micro_batch(choices, config, config.micro_batch or 1)
    least = smallest(shape, one_row, config, device=device)
    need = memory_terms(shape, least, config, device).model
    if cap is not None and need > cap:
        raise PlanError(
            "memory_cap is below what the model itself needs", got=gib(cap), allowed=f"about {gib(need)} and more",
            fix="raise the cap, or quantize the base weights (quantization = \"nf4\")",
        )  # fmt: skip
    peak = estimate_peak_bytes(shape, least, config, device=device)
    return Default(least, limit, (f"the smallest choices are estimated at {gib(peak)}; there are {limit}",))


def default_choices(config: RunConfig, shape: ModelShape, backend: str, device: Device | None = None) -> Choices:
    """What a run does without a plan where memory does not matter.

    Args:
        backend: a resolved one, not `auto`.
        device: None stands for a GPU if `backend` is triton or `config.device` is cuda, else for a CPU.
    """
    on_gpu = device.kind == "cuda" if device is not None else backend == "triton" or config.device == "cuda"
    rows = max(1, MICRO_BATCH_TOKENS["cuda" if on_gpu else "cpu"] // config.sequence_tokens)
    micro_batch = config.micro_batch or max(d for d in divisors(config.batch_size) if d <= rows)
    return Choices(
        backend=backend,
        micro_batch=micro_batch,
        accumulation=config.batch_size // micro_batch,
        placement=[config.placement or "light"] * shape.layers,
    )


def resolve_backend(config: RunConfig, device: Device) -> str:
    """The backend of a run without a plan: `auto` is triton on a GPU where Triton is installed, else eager.

    Raises:
        BackendError: triton was asked for and cannot run here.
    """
    if config.backend != "auto":
        require_backend(config.backend, device)
        return config.backend
    return "triton" if device.kind == "cuda" and _triton_installed() else "eager"


def require_backend(backend: str, device: Device) -> None:
    """Check that a backend can run on the device.

    Raises:
        BackendError: it cannot.
        ConfigError: there is none of this name.
    """
    if backend not in PLAN_BACKENDS:
        raise unknown_choice("backend", backend, PLAN_BACKENDS)
    if backend != "triton":
        return
    if device.kind != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise BackendError(
            "backend triton needs a CUDA GPU", got=f"device {device.name}", allowed="eager, peft or auto here",
            fix="use --backend eager",
        )  # fmt: skip
    if not _triton_installed():
        raise BackendError("backend triton needs the package triton", got="none", fix="pip install triton, on Linux")


def divisors(number: int) -> list[int]:
    """The divisors of a positive number, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def _fastest_under(cap: int, config: RunConfig, shape: ModelShape, device: Device, default: Choices) -> Choices | None:
    """Over micro-batches up to the default's: the least work that fits; of equals the largest micro-batch."""
    sizes = [d for d in divisors(config.batch_size) if d <= default.micro_batch]
    fitted = [
        fit(cap, shape, _with_micro_batch(default, config, size), config, device=device)
        for size in ([config.micro_batch] if config.micro_batch else reversed(sizes))
    ]
    found = [choices for choices in fitted if choices is not None]
    return min(found, key=lambda choices: step_work(shape, choices, config, device), default=None)


def _with_micro_batch(choices: Choices, config: RunConfig, size: int) -> Choices:
    return choices.model_copy(update={"micro_batch": size, "accumulation": config.batch_size // size})


def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
