"""Putting attributes of the engine on a module, as an instance, and taking them off again without a trace.

A patched module carries, in its own `__dict__`, its `forward`, its state, and the few methods below, so that copies,
replicas and pickles are what people expect: a deep copy is patched too, a replica of nn.DataParallel is stock, and what
is pickled is the stock module, which loads where fastft is not installed.
"""

import copy
import sys
import weakref
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any, NamedTuple

from torch import nn

STATE = "_fastft"
"""The attribute under which a patched module keeps its `ModuleState`."""
_METHODS = "_fastft_methods"
"""The methods that stand on the module, by name."""
_LISTED = "_fastft_listed"
"""The sets in which the module stands."""


class _Attached(NamedTuple):
    function: Callable[..., Any]
    before: Any
    """What stood there, in the module's own `__dict__`."""


class WeakModule:
    """A module, while it lives; in a deep copy of a patched model, the copy."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)

    def __call__(self) -> nn.Module | None:
        """The module, or None."""
        return self._module()

    def __deepcopy__(self, memo: dict[int, Any]) -> "WeakModule":
        copied = memo.get(id(self._module()))
        return self if copied is None else WeakModule(copied)


class _Listed:
    """The sets in which a module stands, and in which a deep copy of it, patched as it is, shall stand too."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self.sets: list[weakref.WeakSet[nn.Module]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Listed":
        copied = memo.get(id(self._module()))
        if copied is None:  # attributes are copied without their module
            return self
        made = _Listed(copied)
        made.sets = list(self.sets)
        for modules in self.sets:
            modules.add(copied)
        return made


def attach(module: nn.Module, methods: Mapping[str, Callable[..., Any]], **more: Any) -> None:
    """Give `module` these methods, and attributes, until `detach`."""
    own: dict[str, Callable[..., Any]] = {
        **methods,
        "__getstate__": _getstate,
        "_replicate_for_data_parallel": _replicate,
    }
    attached = dict(module.__dict__.get(_METHODS, {}))
    for name, function in own.items():
        before = attached[name].before if name in attached else module.__dict__.get(name)
        attached[name] = _Attached(function, before)
        module.__dict__[name] = MethodType(function, module)
    module.__dict__[_METHODS] = attached
    module.__dict__.update(more)


def detach(module: nn.Module) -> None:
    """Take off what `attach` put on.  A method that somebody put over one of them stays: what lies below it is stock
    again."""
    if _METHODS in module.__dict__:
        _strip(module.__dict__)


def list_in(modules: "weakref.WeakSet[nn.Module]", module: nn.Module) -> None:
    """Add an attached `module` to `modules`, and from now on, until `detach`, every deep copy of it."""
    modules.add(module)
    module.__dict__.setdefault(_LISTED, _Listed(module)).sets.append(modules)


def is_ours(module: nn.Module, function: Callable[..., Any]) -> bool:
    """Whether `function` is called as it is: somebody's wrapper may checkpoint, or look."""
    return getattr(module.__dict__.get("forward"), "__func__", None) is function


def _strip(attributes: dict[str, Any]) -> None:
    """Remove from `attributes`, a module's or a copy of them, what was attached to it."""
    for name, attached in attributes.pop(_METHODS, {}).items():
        if getattr(attributes.get(name), "__func__", None) is attached.function:
            if attached.before is None:
                del attributes[name]
            else:
                attributes[name] = attached.before
    for name in [name for name in attributes if name.startswith("_fastft")]:
        del attributes[name]


def _getstate(self: nn.Module) -> dict[str, Any]:
    """What is pickled: the module as it is without the patch.  What is copied deeply: all, bound to the copy."""
    # A `__deepcopy__` on the instance would be found by wrappers that pass attributes on, and copy the wrong module.
    if sys._getframe(1).f_code is copy.deepcopy.__code__:
        return self.__dict__
    state = dict(self.__dict__)
    _strip(state)
    return state


def _replicate(self: nn.Module) -> Any:
    """A replica for nn.DataParallel, stock: the engine's methods would be those of the first device's module.

    Raises:
        BackendError: the model was patched with `strict`.
    """
    state = self.__dict__.get(STATE)  # the PeftModel around it has none
    if state is not None and state.settings.model() is self:
        state.settings.ledger.whole("nn.DataParallel runs replicas of the model, in threads of one process")
        state.settings.ledger.tell()
    made = type(self)._replicate_for_data_parallel(self)
    _strip(made.__dict__)
    return made
