"""`train`, `parameters`, `modules` and others of a patched model without a walk through thousands of modules.

Training loops call these at every step (`zero_grad` and clipping ask for `parameters`, accelerate's `unwrap_model` for
`modules`, a preference method turns gradient checkpointing off and on around its reference), and each walks through all
modules in Python: with adapters on seven linears of 28 layers that takes the host longer than a small step takes a GPU
(docs/log.md, 2026-11-25 and 2026-11-30).  Here what a walk found is kept and compared with what the modules hold now,
which is much quicker; where anything differs, the original walks again.  So they give exactly what the originals give.

They stand on the model's class, which hands them to patched models only.  On the model itself, where the engine's other
methods are (`engine.attach`), they could not be: bound to it they would keep it alive in a circle, and bound weakly
they would lose it in `get_peft_model(…).train()`, where nobody else holds it any more when `train` is called.
"""

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, compress, repeat
from operator import attrgetter, itemgetter
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from fastft.engine.attach import attach

_WALK = "_fastft_walk"
_HAS = "_fastft_quick_methods"
"""The names of those that a model has."""
_CHECKPOINTS = "gradient_checkpointing"
"""The attribute by which transformers knows a module that can be checkpointed."""
_TRAINS = (nn.Module.train, PreTrainedModel.train)
"""These do nothing where every module is in the mode already."""
_ANSWERS = nn.Module.__getattr__
_attributes_of = attrgetter("__dict__")
_registries_of = itemgetter("_modules", "_parameters")


class _Now(NamedTuple):
    """What the modules of a model have at the moment."""

    modules: list[nn.Module]
    """In the order of a walk."""
    attributes: list[dict[str, Any]]
    """Of each module."""
    held: list[Any]
    """Every child and parameter of every module, None for one that is left out."""
    shape: list[int]
    """What changes when any of them is another one."""


class _Walk:
    """What a walk through all modules of a model found, and whether that still holds.  It keeps nothing alive."""

    def __init__(self, model: nn.Module | None = None) -> None:
        """None has found nothing, and does not hold."""
        modules = [] if model is None else list(nn.Module.modules(model))
        registries = [module.__dict__.get(name) for module in modules for name in ("_modules", "_parameters")]
        if not all(isinstance(each, dict) for each in registries):
            modules = []  # a scripted module has others
        self._modules = list(map(weakref.ref, modules))
        self._types: list[Any] = list(map(type, modules))
        self.sets_modes_only = all(kind.train in _TRAINS for kind in self._types)
        """Whether no module does more in `train`."""
        self._checkpointed = [hasattr(module, _CHECKPOINTS) for module in modules]
        """Whether a module can be checkpointed."""
        self.places: list[int] = []
        """Of the model's parameters, in their order, among what is held: a new one may have the id of an old one."""
        self.sizes: dict[bool, tuple[list[int], int]] = {}
        """Of all parameters, and `num_parameters`, by `exclude_embeddings`."""
        self._shape: list[int] = []
        now = self._look()
        if now is not None and model is not None:
            place = {id(one): index for index, one in enumerate(now.held)}
            ids = list(map(id, type(model).parameters(model)))
            if all(each in place for each in ids):
                self.places, self._shape = [place[each] for each in ids], now.shape

    def now(self) -> _Now | None:
        """What there is, while every module has the class, children and parameters that it had; else None."""
        now = self._look()
        return now if now is not None and self._shape and now.shape == self._shape else None

    def _look(self) -> _Now | None:
        modules = [ref() for ref in self._modules]
        if list(map(type, modules)) != self._types:  # one that is gone is None
            return None
        try:
            attributes = list(map(_attributes_of, modules))
            registries = list(filter(None, chain.from_iterable(map(_registries_of, attributes))))
            held = list(chain.from_iterable(map(dict.values, registries)))
        except (KeyError, TypeError):  # they are no dicts any more
            return None
        return _Now(modules, attributes, held, [*map(len, registries), *map(id, held)])  # type: ignore[arg-type]

    def checkpointed(self, now: _Now) -> list[nn.Module] | None:
        """The modules that can be checkpointed; None where that has to be asked of each again."""
        others = [not can for can in self._checkpointed]
        kinds = set(compress(self._types, others))
        may_have = any(hasattr(kind, _CHECKPOINTS) or kind.__getattr__ is not _ANSWERS for kind in kinds)
        if may_have or any(map(dict.__contains__, compress(now.attributes, others), repeat(_CHECKPOINTS))):
            return None
        return list(compress(now.modules, self._checkpointed))

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Walk":
        return _Walk()  # a copy has other modules

    def __reduce__(self) -> tuple[Any, ...]:
        return _Walk, ()


class _Quick:
    """A quick method on a class, for its patched models; for anybody else what the class has without it."""

    def __init__(self, kind: type, name: str, function: Callable[..., Any]) -> None:
        self._kind, self._name, self._function = kind, name, function

    def __get__(self, model: nn.Module | None, kind: Any = None) -> Any:
        if model is not None and self._name in model.__dict__.get(_HAS, ()):
            return MethodType(self._function, model)
        return getattr(super(self._kind, kind if model is None else model), self._name)


_placed: list[tuple[type, str]] = []
"""Where quick methods stand: a class, and the method's name."""


def install(model: nn.Module) -> None:
    """Give `model`, a `PeftModel` say, the quick methods, until `fastft.engine.attach.detach`.

    Not in the place of a method that its class has of its own.
    """
    kind, has = type(model), set()
    for name, (make, instead_of) in _QUICK.items():
        known = hasattr(model, name) and getattr(kind, name, _PASSED_ON.get(name)) in instead_of
        if known and name not in vars(kind):
            setattr(kind, name, _Quick(kind, name, functools.wraps(instead_of[0])(make(kind))))
            _placed.append((kind, name))
        if known and isinstance(vars(kind)[name], _Quick):
            has.add(name)
    attach(model, {}, **{_WALK: _Walk(), _HAS: frozenset(has)})


def uninstall() -> None:
    """Leave every class as it was."""
    while _placed:
        kind, name = _placed.pop()
        if isinstance(vars(kind).get(name), _Quick):
            delattr(kind, name)


def _walk_of(model: nn.Module) -> tuple[_Walk, _Now | None]:
    """The walk that was made last, and what there is now; None where no walk holds."""
    walk: _Walk = model.__dict__[_WALK]
    now = walk.now()
    if now is None:
        walk = model.__dict__[_WALK] = _Walk(model)
        now = walk.now()
    return walk, now


def _train_of(kind: Any) -> Callable[..., Any]:
    """`train` as it stands on `kind`."""

    def train(self: nn.Module, mode: bool = True) -> Any:
        walk, now = _walk_of(self)
        if now is not None and walk.sets_modes_only and isinstance(mode, bool):
            modes = set(map(dict.get, now.attributes, repeat("training")))
            others = any(map(dict.__contains__, now.attributes[1:], repeat("train")))  # somebody's, on a module itself
            if modes == {mode} and not others:
                return self
        return super(kind, self).train(mode)

    return train


def _parameters_of(kind: Any) -> Callable[..., Any]:
    """`parameters` as it stands on `kind`."""

    def parameters(self: nn.Module, recurse: bool = True) -> Iterator[nn.Parameter]:
        walk, now = _walk_of(self) if recurse else (None, None)
        if walk is None or now is None:
            original: Iterator[nn.Parameter] = super(kind, self).parameters(recurse)
            return original
        return map(now.held.__getitem__, walk.places)

    return parameters


def _modules_of(kind: Any) -> Callable[..., Any]:
    """`modules` as it stands on `kind`."""

    def modules(self: nn.Module, *args: Any, **kwargs: Any) -> Iterator[nn.Module]:
        _, now = (None, None) if args or kwargs else _walk_of(self)
        if now is None:
            original: Iterator[nn.Module] = super(kind, self).modules(*args, **kwargs)
            return original
        return iter(now.modules)

    return modules


def _set_gradient_checkpointing_of(kind: Any) -> Callable[..., Any]:
    """`_set_gradient_checkpointing` as it stands on `kind`: the original, led past modules that it lets alone."""

    def _set_gradient_checkpointing(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        walk, now = _walk_of(self)
        concerned = None if now is None or "modules" in self.__dict__ else walk.checkpointed(now)
        if concerned is None:
            return super(kind, self)._set_gradient_checkpointing(*args, **kwargs)
        with _walking(self, concerned):
            return super(kind, self)._set_gradient_checkpointing(*args, **kwargs)

    return _set_gradient_checkpointing


@contextmanager
def _walking(model: nn.Module, modules: list[nn.Module]) -> Iterator[None]:
    """Within it, a walk through `model` comes by these modules only."""
    model.__dict__["modules"] = lambda: iter(modules)
    try:
        yield
    finally:
        del model.__dict__["modules"]


def _num_parameters_of(kind: Any) -> Callable[..., Any]:
    """`num_parameters` as it stands on `kind`; the original is the model's inside a `PeftModel`."""

    def num_parameters(self: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        of: Any = super(kind, self)
        if not isinstance(self, PreTrainedModel):
            of = self.get_base_model()
        walk, now = _walk_of(self)
        own = isinstance(self, PreTrainedModel) or type(of).num_parameters is PreTrainedModel.num_parameters
        if only_trainable or now is None or not own:  # what is trained may change at any time
            return int(of.num_parameters(only_trainable=only_trainable, exclude_embeddings=exclude_embeddings))
        sizes = [torch.Tensor.numel(now.held[place]) for place in walk.places]
        known = walk.sizes.get(exclude_embeddings)
        if known is None or known[0] != sizes:
            known = sizes, int(of.num_parameters(exclude_embeddings=exclude_embeddings))
            walk.sizes[exclude_embeddings] = known
        return known[1]

    return num_parameters


_QUICK: dict[str, tuple[Callable[[Any], Callable[..., Any]], tuple[Any, ...]]] = {
    "train": (_train_of, _TRAINS),
    "parameters": (_parameters_of, (nn.Module.parameters,)),
    "modules": (_modules_of, (nn.Module.modules,)),
    "_set_gradient_checkpointing": (_set_gradient_checkpointing_of, (PreTrainedModel._set_gradient_checkpointing,)),
    "num_parameters": (_num_parameters_of, (PreTrainedModel.num_parameters,)),
}
"""By name: what makes the quick method, and the originals that it stands for."""
_PASSED_ON = {"num_parameters": PreTrainedModel.num_parameters}
"""What a `PeftModel` has, but its class has not: it is the model's inside."""
