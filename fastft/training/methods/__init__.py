"""TRL's trainers whose own code would hold all logits: that one step is fastft's here, a file a method.

Data, losses and metrics stay TRL's.  All other methods of TRL ask for log-probabilities, which the engine answers
(`fastft.engine.trl_head`).
"""

import sys
from types import ModuleType
from typing import Any

from fastft.training.methods import orpo

_METHODS: dict[tuple[str, str], ModuleType] = {("trl.experimental.orpo.orpo_trainer", "ORPOTrainer"): orpo}
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
    for (module, name), method in _METHODS.items():
        kind = getattr(sys.modules.get(module), name, None)
        if kind is not None and isinstance(trainer, kind):
            return method
    return None
