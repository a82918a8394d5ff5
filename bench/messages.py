"""What the runner and its workers say to each other, and the record fields that both fill in alike."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from bench.scenarios import Scenario
from fastft.config import RunConfig
from fastft.plan import Choices
from fastft.record import Parity, Record

MARKER = "FASTFT-BENCH "
"""Begins the line of stdout that is the answer; libraries print there too."""


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GateRequest(_Message):
    """Run the parity gate of one arm."""

    task: Literal["gate"] = "gate"
    scenario: Scenario
    arm: str


class GateReply(_Message):
    """The gate's verdict and what every repetition of the arm then does."""

    parity: Parity
    reason: str | None
    setup: dict[str, Any]
    choices: Choices
    plan_id: str | None
    device: dict[str, Any]
    versions: dict[str, str]


class RepetitionRequest(_Message):
    """Run one repetition of one arm."""

    task: Literal["repetition"] = "repetition"
    run_id: str
    scenario: Scenario
    arm: str
    repetition: int
    gate: GateReply
    initial_adapter: Path
    """A safetensors file: written by the first process of a seed, loaded by all others."""
    accuracy_before: float | None = None
    """Of the untouched base, if another process of this seed measured it."""
    git_commit: str | None = None
    command: str = ""


class TrialsRequest(_Message):
    """Measure one configuration after another on a model that is loaded once."""

    task: Literal["trials"] = "trials"
    config: RunConfig
    choices: list[Choices]
    """In this order; what stands there twice is measured twice."""
    warmup_steps: int = Field(ge=0)
    timed_steps: int = Field(ge=3)
    file: Path
    """A `bench.trial_file.TrialFile` with a header, to which each trial is appended at once."""
    seconds: float | None = None
    """No configuration is begun that would not end by then, counted from the worker's start; None knows no end."""


Request = TypeAdapter[GateRequest | RepetitionRequest | TrialsRequest](GateRequest | RepetitionRequest | TrialsRequest)


class Answer(_Message):
    """What a worker prints: one of the four."""

    gate: GateReply | None = None
    record: Record | None = None
    trials: int | None = None
    """How many were measured."""
    error: str | None = Field(default=None, min_length=1)


def identify(request: RepetitionRequest, *, started_at: str) -> dict[str, Any]:
    """The fields of a record that are known before anything ran."""
    gate = request.gate
    return {
        "run_id": request.run_id,
        "scenario": request.scenario.name,
        "arm": request.arm,
        "backend": gate.choices.backend,
        "repetition": request.repetition,
        "seed": request.scenario.seed(request.repetition),
        "warmup_steps": request.scenario.warmup_steps,
        "parity": gate.parity,
        "plan_id": gate.plan_id,
        "choices": gate.choices.model_dump(),
        "lora": request.scenario.config.lora.model_dump(mode="json"),
        "training": training_facts(request.scenario, gate),
        "device": gate.device,
        "versions": gate.versions,
        "git_commit": request.git_commit,
        "command": request.command,
        "started_at": started_at,
    }


def training_facts(scenario: Scenario, gate: GateReply) -> dict[str, Any]:
    """What is trained and how the gate looked at it; the same for every arm of a scenario."""
    config = scenario.config
    return {
        "batch_size": config.batch_size,
        "sequence_tokens": config.sequence_tokens,
        "steps": scenario.total_steps,
        "optimizer": config.optimizer,
        "learning_rate": config.learning_rate,
        "schedule": config.schedule,
        "weight_decay": config.weight_decay,
        "max_gradient_norm": config.max_gradient_norm,
        "quantization": config.quantization,
        "dtype": gate.setup.get("dtype", config.dtype),
        "data": config.data if scenario.data == "rows" else "random tokens",
        "packing": config.packing,
        "parity_gate": {
            name: gate.setup[name]
            for name in ("layers", "whole_model", "batch_size", "sequence_tokens")
            if name in gate.setup
        },
    }
