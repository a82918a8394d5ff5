"""Putting attributes of the engine on a module, as an instance, and taking them off again without a trace.

A patched module carries, in its own `__dict__`, its `forward`, its state, and the few methods below, so that copies,
replicas and pickles are what people expect: a deep copy is patched too, a replica of nn.DataParallel is stock, and what
is pickled is the stock module, which loads where fastft is not installed.

None of this refers to the module: it would be a circle, and a model that nobody needs any more would keep its memory
until Python's collector comes by, which on a GPU is too late.
"""

import copy
import inspect
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


class WeakMethod:
    """A function as a method of a module that it does not keep alive.

    Who looks at it sees the method that it stands for: its name, its signature, its source.
    """

    # Nothing of its own in its `__dict__`: `functools.wraps` would copy it, and somebody's wrapper would pass for this.
    # To have one is what torch.compile of 2.11 expects of any object.
    __slots__ = ("__dict__", "__func__", "_module", "_name")

    def __init__(self, function: Callable[..., Any], module: nn.Module, name: str) -> None:
        """`name` is under which it stands on the module."""
        self.__func__ = function
        self._module = weakref.ref(module)
        self._name = name

    @property
    def __self__(self) -> nn.Module:
        """The module.

        Raises:
            ReferenceError: it is gone.
        """
        module = self._module()
        if module is None:
            raise ReferenceError(f"the module whose {self._name} this was is gone: keep the module to go on calling it")
        return module

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        """Of what it stands for."""
        doc: str | None = self._stands_for().__doc__
        return doc

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """What the function gives for the module."""
        return self.__func__(self.__self__, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        stands_for = self._stands_for()
        if name == "__wrapped__":  # what `inspect` looks at in its place
            return stands_for
        return inspect.signature(stands_for) if name == "__signature__" else getattr(stands_for, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        module = self.__self__
        copied = memo.get(id(module))
        if copied is None:  # asked for by itself, it is copied with its module, as any method is
            return MethodType(self.__func__, copy.deepcopy(module, memo))
        return WeakMethod(self.__func__, copied, self._name)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.__self__, self._name)

    def _stands_for(self) -> Any:
        module = self.__self__
        attached = module.__dict__.get(_METHODS, {}).get(self._name)
        if attached is not None and attached.before is not None:
            return attached.before
        return getattr(type(module), self._name).__get__(module)


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
        module.__dict__[name] = WeakMethod(function, module, name)
    module.__dict__[_METHODS] = attached
    module.__dict__.update(more)


def stands_below(module: nn.Module, name: str) -> bool:
    """Whether somebody put something over an attached method."""
    attached = module.__dict__.get(_METHODS, {})
    return name in attached and not _is_of(module.__dict__.get(name), attached[name].function)


def lay_over(module: nn.Module, name: str) -> Any:
    """Put an attached method on top again of what somebody put over it since, which counts as what stood there before,
    and return that."""
    attached = dict(module.__dict__[_METHODS])
    before = module.__dict__.get(name)
    attached[name] = attached[name]._replace(before=before)
    module.__dict__[_METHODS] = attached
    module.__dict__[name] = WeakMethod(attached[name].function, module, name)
    return before


def take_from_below(module: nn.Module, name: str) -> None:
    """The inverse: what an attached method lies over is gone."""
    attached = dict(module.__dict__[_METHODS])
    attached[name] = attached[name]._replace(before=None)
    module.__dict__[_METHODS] = attached


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
    return _is_of(module.__dict__.get("forward"), function)


def _is_of(method: Any, function: Callable[..., Any]) -> bool:
    return type(method) is WeakMethod and method.__func__ is function


def _strip(attributes: dict[str, Any]) -> None:
    """Remove from `attributes`, a module's or a copy of them, what was attached to it."""
    for name, attached in attributes.pop(_METHODS, {}).items():
        if _is_of(attributes.get(name), attached.function):
            if attached.before is None:
                del attributes[name]
            else:
                attributes[name] = attached.before
    for name in [name for name in attributes if name.startswith("_fastft")]:
        del attributes[name]


def _getstate(self: nn.Module) -> dict[str, Any]:
    """What is pickled: the module as it is without the patch.  What is copied deeply: all, bound to the copy."""
    # A `__deepcopy__` on the instance would be found by wrappers that pass attributes on, and copy the wrong module.
    if sys._getframe(2).f_code is copy.deepcopy.__code__:  # beyond the call of the method that this is
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
