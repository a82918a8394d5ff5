"""The methods of `fastft train --method`, a file and a row each: rows, trainer, settings and measure of one.

The trainers are TRL's own.  Those whose code would hold all logits get one step from fastft, in the method's file;
data, losses and metrics stay TRL's.  All others ask for log-probabilities, which the engine answers
(`fastft.engine.trl_head`).
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fastft.training.methods import orpo

if TYPE_CHECKING:
    from fastft.training.methods.method import Method

METHODS = {
    "sft": "fastft.training.methods.sft",
    "dpo": "fastft.training.methods.dpo",
    "orpo": "fastft.training.methods.orpo",
    "kto": "fastft.training.methods.kto",
    "reward": "fastft.training.methods.reward",
    "grpo": "fastft.training.methods.grpo",
    "rloo": "fastft.training.methods.rloo",
    "ppo": "fastft.training.methods.ppo_method",
}
"""Name → the module that holds its `METHOD`, imported when it is asked for."""


def method_named(name: str) -> "Method":
    """The method of that name, which is one of `METHODS`."""
    found: Method = importlib.import_module(METHODS[name]).METHOD
    return found


_STEPS: dict[tuple[str, str], ModuleType] = {("trl.experimental.orpo.orpo_trainer", "ORPOTrainer"): orpo}
"""By module and class of TRL's trainer: what puts fastft's step into one, and takes it out again."""


def put_in(trainer: Any) -> bool:
    """Put fastft's step into a trainer of TRL's, if it has one that needs it, and say whether."""
    method = _method_of(trainer)
    return method is not None and bool(method.put_in(trainer))


def take_out(trainer: Any) -> None:
    """The inverse of `put_in`; nothing where that did nothing."""
    method = _method_of(trainer)
    if method is not None:
        method.take_out(trainer)


def _method_of(trainer: Any) -> ModuleType | None:
    for (module, name), method in _STEPS.items():
        kind = getattr(sys.modules.get(module), name, None)
        if kind is not None and isinstance(trainer, kind):
            return method
    return None
