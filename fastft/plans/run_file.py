"""The run file: what a saved adapter says about its making, beside PEFT's own files, which stay as they are."""

import types
from pathlib import Path
from typing import Any

from fastft.config import RunConfig
from fastft.files import canonical_json, write_atomically
from fastft.hardware import software_versions
from fastft.plan import Choices, Plan

RUN_FILE = "fastft.json"
"""Beside every saved adapter and checkpoint: the plan's id, the choices, the configuration, the versions."""
_FACTS = "_fastft_run_facts"


def run_facts(config: RunConfig, plan: Plan | None, choices: Choices | None) -> dict[str, Any]:
    """What a saved adapter is told about its making: enough to run it again.

    Args:
        plan: what was followed; None for the default.
        choices: None where they are made for each batch.
    """
    return {
        "plan_id": None if plan is None else plan.id,
        "choices": None if choices is None else choices.model_dump(),
        "config": config.model_dump(),
        "versions": software_versions(),
    }


def record_in_saves(model: Any, facts: dict[str, Any]) -> None:
    """From now on `model.save_pretrained`, whoever calls it, writes the run file too.

    PEFT fixes what is in the header of `adapter_model.safetensors` and rejects no file beside it.

    Args:
        model: a `PeftModel`; its class stays untouched.
    """
    model.__dict__[_FACTS] = facts
    model.__dict__["save_pretrained"] = types.MethodType(_save_pretrained, model)


def _save_pretrained(model: Any, save_directory: Any, *arguments: Any, **more: Any) -> Any:
    # Bound to the model, so that a deep copy saves itself.
    result = type(model).save_pretrained(model, save_directory, *arguments, **more)
    if more.get("is_main_process", True):
        write_atomically(Path(save_directory) / RUN_FILE, canonical_json(model.__dict__[_FACTS]) + "\n")
    return result
