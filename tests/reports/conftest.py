"""Synthetic records: plausible, deterministic, and with every field open to a test."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastft.record import Accuracy, Memory, Parity, Record, write_records

SPEED = {"peft": 1.0, "eager": 1.43, "triton": 1.86}
ABOVE = {"peft": 1.0, "eager": 0.52, "triton": 0.47}
MIB = 2**20


def make_record(arm: str = "eager", repetition: int = 0, **changes: Any) -> Record:
    """A finished run of `steps` (default 12) steps; any other keyword replaces a field of the record."""
    steps = changes.pop("steps", 12)
    backend = changes.pop("backend", arm.split("-")[0])
    seed = 100 + repetition
    # The data belong to the seed, the noise to the process.
    data = np.random.default_rng(seed)
    noise = np.random.default_rng([seed, *arm.encode()])
    tokens = data.integers(900, 1100, steps)
    times = 400.0 * tokens / 1000 / SPEED.get(backend, 1.2) * noise.normal(1.0, 0.01, steps) * noise.normal(1.0, 0.01)
    times[: min(2, steps)] *= 3
    loss = 0.9 + 1.6 * np.exp(-np.arange(steps) / (steps / 3)) + data.normal(0, 0.03, steps)
    above = int(820 * MIB * ABOVE.get(backend, 0.8) * noise.normal(1.0, 0.004))
    fields: dict[str, Any] = {
        "run_id": f"run-{arm}-{repetition}",
        "scenario": "embedded",
        "arm": arm,
        "backend": backend,
        "repetition": repetition,
        "seed": seed,
        "status": "ok",
        "warmup_steps": 2,
        "step_time_ms": times.round(3).tolist(),
        "step_tokens": tokens.tolist(),
        "loss": (loss * noise.normal(1.0, 1e-4, steps)).round(6).tolist(),
        "gradient_norm": np.abs(data.normal(1.0, 0.1, steps)).round(6).tolist(),
        "batch_sha256": [hashlib.sha256(f"{seed} {step}".encode()).hexdigest() for step in range(steps)],
        "memory": Memory(kind="rss", model_bytes=610 * MIB, peak_bytes=610 * MIB + above),
        "parity": Parity(
            passed=True, max_relative_error=1.1e-6, stock_max_relative_error=1.0e-6, tolerance=1.5e-6, tensors=56,
            worst_tensor="layers.0.self_attn.q_proj.lora_A",
        ),
        "accuracy": Accuracy(before=0.021, after=0.71 + 0.01 * float(noise.normal()), samples=256),
        "plan_id": None if backend == "peft" else "0123456789abcdef-01234567",
        "choices": {"backend": backend, "micro_batch": 4, "accumulation": 2, "placement": ["light"] * 3 + ["full"]},
        "ledger": {f"decoder_layer: fused ({backend})": 4},
        "model": {"name": "tiny", "shape": {"layers": 4, "model": 256}},
        "lora": {"rank": 16, "alpha": 16.0},
        "training": {"batch_size": 8, "sequence_tokens": 256, "dtype": "fp32", "learning_rate": 2e-4},
        "device": {"name": "CPU (2 cores)", "memory_bytes": 8 * 2**30},
        "versions": {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"},
        "git_commit": "fec6c94d0b1e2f3a4b5c6d7e8f90a1b2c3d4e5f6",
        "command": f"fastft bench embedded --arm {arm} --seed {seed}",
        "started_at": f"2026-01-0{1 + repetition % 9}T10:00:00+00:00",
    }  # fmt: skip
    return Record(**(fields | changes))


def make_records(arms: tuple[str, ...] = ("peft", "eager"), repetitions: int = 5, **changes: Any) -> list[Record]:
    """`repetitions` records of each arm."""
    return [make_record(arm, repetition, **changes) for arm in arms for repetition in range(repetitions)]


@pytest.fixture
def record() -> Callable[..., Record]:
    return make_record


@pytest.fixture
def records() -> Callable[..., list[Record]]:
    return make_records


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[list[Record]], Path]:
    """Writes records to a file and returns its path."""

    def save(found: list[Record], name: str = "records.jsonl") -> Path:
        path = tmp_path / "input" / name
        write_records(path, found)
        return path

    return save
