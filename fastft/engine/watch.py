"""Noticing cheaply that a model's layers are no longer what the engine read.

Whether a layer may run fused depends on some fifty small facts about its modules: hooks, replaced forwards, the active
adapter, what is trained.  Asking for all of them in every step costs more than launching the layer's kernels.  A
`Watch` remembers them as flat lists that C code compares.
"""

from collections.abc import Iterable
from itertools import chain, repeat
from operator import attrgetter, is_
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn

_requires_grad = attrgetter("requires_grad")


class Watch:
    """The state of some modules, all their submodules included, at one moment."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        below = list(dict.fromkeys(chain.from_iterable(module.modules() for module in modules)))
        # What only holds others is never called.
        called = [m for m in below if not isinstance(m, (nn.ModuleDict, nn.ModuleList, nn.ParameterDict))]
        self._hooks = [
            hooks
            for m in called
            for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
        ]
        self._attributes = [m.__dict__ for m in called]
        self._forwards = self._now_forwards()
        # Only what holds something: whatever is added to a module without parts or weights changes no result, unless it
        # comes with another `forward` or a hook.
        self._registries: list[dict[str, Any]] = [r for m in below for r in (m._modules, m._parameters) if r]
        self._members = self._now_members()
        self._sizes = list(map(len, self._registries))
        self._adapted = [m.__dict__ for m in below if isinstance(m, LoraLayer)]
        self._dropouts = [m.__dict__ for m in below if isinstance(m, nn.Dropout)]
        self._frozen = [p for m in below for p in m._parameters.values() if p is not None]
        self._flags = self._now_flags()
        self.has_hooks = any(self._hooks)
        """Whether any of the modules had a hook; then nothing is taken to be unchanged."""

    def quiet(self) -> bool:
        """Whether none of the modules has a hook: calling them for nothing is then noticed by nobody."""
        return not self.has_hooks and not any(self._hooks)

    def unchanged(self) -> bool:
        """Whether everything is still as it was."""
        return (
            self.quiet()
            and self._sizes == list(map(len, self._registries))
            and all(map(is_, self._members, chain.from_iterable(map(dict.values, self._registries))))
            and all(map(is_, self._forwards, self._now_forwards()))
            and self._flags == self._now_flags()
        )

    def _now_forwards(self) -> list[Any]:
        return list(map(dict.get, self._attributes, repeat("forward")))

    def _now_members(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self._registries)))

    def _now_flags(self) -> list[Any]:
        flags: list[Any] = []
        for state in self._adapted:
            flags += (
                tuple(state["_active_adapter"]), state["_disable_adapters"], *state["merged_adapters"],
                *state["scaling"].values(),
            )  # fmt: skip
        flags.extend(state["training"] for state in self._dropouts)
        flags.extend(map(_requires_grad, self._frozen))
        return flags
