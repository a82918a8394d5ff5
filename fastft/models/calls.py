"""Which functions a `forward` reaches: its helper methods, the functions of its module, PyTorch's.

What a layer computes is more than the lines of its `forward`.  The names in a function's code say which methods of its
class, functions of its module and functions of PyTorch it may call; those that are a model's own code are looked into
in turn.  All of them must be the libraries' own, and stay the ones that they were.
"""

import contextlib
import functools
import inspect
import sys
from collections.abc import Iterable, Iterator
from operator import is_
from pathlib import Path
from types import CodeType, FunctionType, GenericAlias, ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")
_LOOKED_INTO = (
    "transformers.models.", "transformers.integrations.", "transformers.masking_utils", "transformers.activations",
    "transformers.modeling_", "transformers.pytorch_utils", "transformers.loss.", "peft.tuners.", "torch.nn.",
)  # fmt: skip
"""Where models' own code is.  What else is reached must be the one that it was, whatever it calls itself."""

_CONTEXTS = contextlib.__file__

_OF_C = ("_C", "_nn", "_VF")
"""Where PyTorch keeps its functions in C."""

Bound = tuple[Any, str, Any]
"""An object, the name of an attribute, and what it was: what a `Watch` compares."""


class Calls(NamedTuple):
    """What some functions reach, as it was when it was looked up."""

    holders: list[Any]
    names: list[str]
    values: list[Any]
    """What each holder has under that name."""
    methods: frozenset[str]
    """The names that were found on the class: an instance must not have one of its own under them."""
    mentioned: frozenset[str]
    """All names in the code."""
    reason: str | None
    """Why that is not what the libraries define, or None."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Calls":
        """The same: it is of classes and modules, which no copy has of its own."""
        return self

    def hold(self) -> bool:
        """Whether all of it is still there."""
        try:
            return all(map(is_, map(getattr, self.holders, self.names), self.values))
        except AttributeError:
            return False


_known: dict[Any, tuple[Any, Calls]] = {}
"""By class or function: the function that was looked into, and what came of it."""


def calls_of(kind: type[nn.Module]) -> Calls:
    """What the `forward` of this class reaches."""
    return _looked_up(kind.forward, kind)


def calls_of_function(function: Any) -> Calls:
    """What a function that belongs to no class reaches."""
    return _looked_up(function, None)


def together(all_calls: Iterable[Calls], more: Iterable[Bound] = ()) -> Calls:
    """Several of them, and single attributes, as one: nothing is compared twice."""
    found: dict[tuple[int, str], Bound] = {(id(holder), name): (holder, name, value) for holder, name, value in more}
    for calls in all_calls:
        for bound in zip(calls.holders, calls.names, calls.values, strict=True):
            found.setdefault((id(bound[0]), bound[1]), bound)
    return _calls(found.values())


def code_below(function: Any) -> CodeType | None:
    """The code of the innermost function below decorators, if it and they are all of the libraries."""
    inner = _below(function)
    return None if inner is None else inner.__code__


def is_library(function: Any) -> bool:
    """Whether a function, and what decorators put around it, is code of the libraries."""
    return _below(function) is not None


def _looked_up(function: Any, kind: Any) -> Calls:
    key = function if kind is None else kind
    looked_into, known = _known.get(key, (None, None))
    # What stood in a replaced function's place calls something else, so all is looked up again.
    if known is None or looked_into is not function or not known.hold():
        walk = _Walk()
        # Whose code the first one is, others ask.
        walk.enter(_below(function) or inspect.unwrap(function), kind)
        known = _calls(walk.found.values(), walk.methods, walk.mentioned, walk.reason)
        _known[key] = function, known
    return known


def _calls(
    found: Iterable[Bound], methods: Iterable[str] = (), mentioned: Iterable[str] = (), reason: Any = None
) -> Calls:
    holders, names, values = map(list, zip(*found, strict=True)) if (found := list(found)) else ([], [], [])
    return Calls(holders, names, values, frozenset(methods), frozenset(mentioned), reason)


class _Walk:
    """Collects what is reached from one function."""

    def __init__(self) -> None:
        self.found: dict[tuple[int, str], Bound] = {}
        self.methods: set[str] = set()
        self.mentioned: set[str] = set()
        self.reason: str | None = None
        self._entered: set[tuple[CodeType, Any]] = set()

    def enter(self, inner: Any, kind: Any) -> None:
        """Look into the code of a function, `kind` being the class whose instance it is called on, if any."""
        if not isinstance(inner, FunctionType) or (inner.__code__, kind) in self._entered:
            return
        self._entered.add((inner.__code__, kind))
        names = set(_names(inner.__code__))
        module = sys.modules.get(inner.__globals__.get("__name__", ""))
        if module is not None and vars(module) is inner.__globals__:
            self._attributes(module, names, set())
        self._methods(torch.Tensor, names, None)
        if kind is not None:
            self.mentioned |= names
            self.methods |= self._methods(kind, names, kind)

    def _attributes(self, module: ModuleType, names: set[str], seen: set[ModuleType]) -> None:
        """What these names are in a module, and in the modules that some of them are."""
        seen.add(module)
        for name in names & vars(module).keys():
            value = vars(module)[name]
            if isinstance(value, ModuleType):
                # PyTorch's private modules are its compiler's.
                if _package(value.__name__) in _LIBRARIES and (name[0] != "_" or name in _OF_C):
                    self._is_new(module, name, value)
                    if sys.modules.get(value.__name__) is not value:
                        self._replaced(module, name)
                    if value not in seen:
                        self._attributes(value, names, seen)
            elif self._is_new(module, name, value):
                self._value(module, name, value, None)
                if _package(type(value).__module__) in _LIBRARIES and hasattr(type(value), "__getitem__"):
                    # A registry of functions, which is asked for one.
                    self._methods(type(value), names, type(value))

    def _methods(self, kind: type, names: set[str], called_on: Any) -> set[str]:
        """The names that are functions of the class, but for those that every module has."""
        methods = set()
        for name in names:
            value = _in_class(kind, name)
            if value is _NOWHERE:
                continue
            function = getattr(value, "__func__", getattr(value, "fget", value))
            # `forward` is asked for by itself, and is the engine's in what it patched.
            if callable(function) and not isinstance(function, type) and name != "forward":
                methods.add(name)
            now = getattr(kind, name, None)
            # A class method is made anew each time.
            if now is getattr(kind, name, None) and self._is_new(kind, name, now):
                self._value(kind, name, function, called_on)
        return methods

    def _value(self, holder: Any, name: str, value: Any, called_on: Any) -> None:
        """What stands under a name.  Numbers and None are only compared: another time a function may stand there."""
        if isinstance(value, GenericAlias):  # a type of Python's own, for who checks types
            return
        if isinstance(value, type):  # of outputs, of caches, of a dtype's limits
            if _package(value.__module__) not in (*_LIBRARIES, *sys.stdlib_module_names):
                self._replaced(holder, name)
        elif callable(value):
            if not _is_own(value, name):
                self._replaced(holder, name)
            elif (inner := _below(value)) is not None and (inner.__module__ or "").startswith(_LOOKED_INTO):
                self.enter(inner, called_on)

    def _is_new(self, holder: Any, name: str, value: Any) -> bool:
        key = id(holder), name
        is_new = key not in self.found
        self.found[key] = holder, name, value
        return is_new

    def _replaced(self, holder: Any, name: str) -> None:
        self.reason = self.reason or f"{holder.__name__}.{name} was replaced"


def _is_own(function: Any, name: str) -> bool:
    """Whether what stands under a name is the libraries' function of that name, Python's or C's."""
    if isinstance(function, FunctionType | functools._lru_cache_wrapper):
        inner = _below(function)
        if inner is None:
            return _package(function.__module__) in sys.stdlib_module_names
        return _plain(inner.__name__) == _plain(name)
    kind = type(function).__module__
    if kind == "builtins":  # a function of C; `torch.fft.ifft2` calls itself fft_ifft2
        own, wanted = _plain(str(getattr(function, "__name__", ""))), _plain(name)
        return own == wanted or own in (f"{module}{wanted}" for module in _OF_C_BY_MODULE)
    return _package(kind) in _LIBRARIES or kind == "typing"


_OF_C_BY_MODULE = ("fft", "linalg", "special", "sparse")
"""Modules of PyTorch whose name is part of their functions'."""


def _plain(name: str) -> str:
    """A name without underscores: `F.threshold` is called _threshold, and `F.logsigmoid` log_sigmoid."""
    return name.replace("_", "")


_NOWHERE = object()


def _in_class(kind: type, name: str) -> Any:
    """What a class has under a name, as it is written there; `_NOWHERE` for what `object` and `nn.Module` have."""
    for each in kind.__mro__:
        if name in vars(each):
            return _NOWHERE if each in (object, nn.Module) else vars(each)[name]
    return _NOWHERE


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _below(function: Any) -> FunctionType | None:
    while True:
        function = getattr(function, "__func__", function)
        if isinstance(function, functools._lru_cache_wrapper):
            function = function.__wrapped__
        if not isinstance(function, FunctionType):
            return None
        inner: Any = getattr(function, "__wrapped__", None)
        # Libraries decorate with Python's context managers, too.
        if not _is_in_library(function.__code__) and (inner is None or function.__code__.co_filename != _CONTEXTS):
            return None
        if inner is None:
            return function
        function = inner


def _package(module: Any) -> str:
    return str(module).partition(".")[0]


def _is_in_library(code: CodeType) -> bool:
    return code.co_filename.startswith(_folders())


_known_folders: dict[str, str] = {}


def _folders() -> tuple[str, ...]:
    """The folders of the libraries that are imported."""
    if len(_known_folders) < len(_LIBRARIES):
        for name in _LIBRARIES:
            module: ModuleType | None = sys.modules.get(name)
            if name not in _known_folders and module is not None and module.__file__ is not None:
                _known_folders[name] = f"{Path(module.__file__).parent}/"
    return tuple(_known_folders.values())
