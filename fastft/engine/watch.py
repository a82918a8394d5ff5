"""Noticing cheaply that a model's layers are no longer what the engine read.

Whether a layer may run fused depends on some fifty small facts about its modules: their classes, hooks, replaced
forwards, constants, the active adapter, what is trained.  Asking for all of them in every step costs more than
launching the layer's kernels.  A `Watch` remembers them as flat lists that C code compares.
"""

from collections.abc import Iterable
from itertools import chain, repeat
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch.nn.modules.module as torch_module
from peft.tuners.lora import LoraLayer
from torch import nn

from fastft.adapters.lora import has_hooks
from fastft.models.identity import Bound

_requires_grad = attrgetter("requires_grad")
_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict)
_WITHOUT_CONSTANTS = (nn.Linear, nn.Identity)
"""What these hold beside their parameters changes nothing that they compute."""
_CONSTANT = (bool, int, float, str, type(None))
_OF_CLASS = ("forward", "__call__", "__getattr__")
_GLOBAL_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)


def has_global_hooks() -> bool:
    """Whether somebody watches every module of the process."""
    return any(_GLOBAL_HOOKS)


class Watch:
    """The state of some modules, all their submodules included, at one moment."""

    def __init__(self, modules: Iterable[nn.Module], bound: Iterable[Bound] = (), config: Any = None) -> None:
        """`bound` are attributes beside the modules that count, `config` an object whose constants do."""
        self._below = list(dict.fromkeys(chain.from_iterable(module.modules() for module in modules)))
        self._types = list(map(type, self._below))
        # What only holds others is never called.
        called = [m for m in self._below if not isinstance(m, _CONTAINERS)]
        kinds = dict.fromkeys(map(type, called))
        self._bound = [*bound, *((kind, name, getattr(kind, name)) for kind in kinds for name in _OF_CLASS)]
        self._hooks = [
            hooks
            for m in called
            for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
        ]
        self._attributes = [m.__dict__ for m in called]
        self._forwards = self._now_forwards()
        # Only what holds something: whatever is added to a module without parts or weights changes no result, unless it
        # comes with another `forward` or a hook.
        self._registries: list[dict[str, Any]] = [r for m in self._below for r in (m._modules, m._parameters) if r]
        self._members = self._now_members()
        self._sizes = list(map(len, self._registries))
        self._adapted = [m.__dict__ for m in self._below if isinstance(m, LoraLayer)]
        self._frozen = [p for m in self._below for p in m._parameters.values() if p is not None]
        self._flags = self._now_flags()
        holders = [m.__dict__ for m in called if not isinstance(m, (*_WITHOUT_CONSTANTS, LoraLayer))]
        holders += [] if config is None else [config.__dict__]
        self._readers = [(read, holder) for holder in holders if (read := _constants_of(holder)) is not None]
        self._constants = self._now_constants()
        self._hooked = self._now_hooked()
        self.quiet = not any(map(has_hooks, called))
        """Whether none of the modules has a hook that anybody hears of."""

    def unchanged(self) -> bool:
        """Whether everything is still as it was."""
        try:
            return (
                self._hooked == self._now_hooked()
                and self._types == list(map(type, self._below))
                and self._sizes == list(map(len, self._registries))
                and all(map(is_, self._members, chain.from_iterable(map(dict.values, self._registries))))
                and all(map(is_, self._forwards, self._now_forwards()))
                and self._flags == self._now_flags()
                and all(getattr(holder, name, None) is value for holder, name, value in self._bound)
                and self._constants == self._now_constants()
            )
        except KeyError:  # a constant was deleted
            return False

    def _now_hooked(self) -> list[Any]:
        return [list(hooks.values()) for hooks in self._hooks if hooks]

    def _now_forwards(self) -> list[Any]:
        return list(map(dict.get, self._attributes, repeat("forward")))

    def _now_members(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self._registries)))

    def _now_constants(self) -> list[Any]:
        # The number of attributes too: a new one may stand before what the class has.
        return [(len(holder), read(holder)) for read, holder in self._readers]

    def _now_flags(self) -> list[Any]:
        flags: list[Any] = []
        for state in self._adapted:
            active = state["_active_adapter"]
            flags += (
                active if isinstance(active, str) else tuple(active), state["_disable_adapters"],
                state["training"], *state["merged_adapters"], *state["scaling"].values(), *state["lora_variant"],
            )  # fmt: skip
        flags.extend(map(_requires_grad, self._frozen))
        return flags


def _constants_of(holder: dict[str, Any]) -> "itemgetter[Any] | None":
    """What reads the plain values of a module or configuration, or None where it has none."""
    names = [name for name, value in holder.items() if isinstance(value, _CONSTANT) or _is_plain_list(value)]
    return itemgetter(*names) if names else None


def _is_plain_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(each, _CONSTANT) for each in value)
