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
_children_of = itemgetter("_modules")
_parameters_in = itemgetter("_parameters")
_IS_CHECKPOINTING = next(
    name for name in ("is_activation_checkpointing", "is_gradient_checkpointing") if hasattr(PreTrainedModel, name)
)
"""The property that asks every module whether it is checkpointed; the other name, where there is one, asks this."""


class _Now(NamedTuple):
    """What the modules of a model have at the moment."""

    modules: list[nn.Module]
    """In the order of a walk."""
    attributes: list[dict[str, Any]]
    """Of each module."""
    parameters: list[Any]
    """Of every module, None for one that is left out; where nobody asked for them, nothing."""


def _values(registries: list[dict[str, Any]]) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, filter(None, registries))))


def _shape(registries: list[dict[str, Any]], held: list[Any]) -> list[int]:
    """What changes when anything held by them is another one, or elsewhere."""
    return [*map(len, registries), *map(id, held)]


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
        """Of the model's parameters, in their order, among those of all modules."""
        self.sizes: dict[bool, tuple[list[int], int]] = {}
        """Of all parameters, and `num_parameters`, by `exclude_embeddings`."""
        self._shapes: tuple[list[int], list[int]] | None = None
        """Of the modules' children, and of their parameters."""
        if model is not None and modules:
            self._find(model, list(map(_attributes_of, modules)))

    def _find(self, model: nn.Module, attributes: list[dict[str, Any]]) -> None:
        children, own = list(map(_children_of, attributes)), list(map(_parameters_in, attributes))
        held = _values(own)
        place = {id(one): index for index, one in enumerate(held)}
        ids = list(map(id, type(model).parameters(model)))
        if all(each in place for each in ids):
            self.places = [place[each] for each in ids]
            self._shapes = _shape(children, _values(children)), _shape(own, held)

    def now(self, *, parameters: bool = False) -> _Now | None:
        """What there is, while every module has the class and children that it had, and, if they are asked for, the
        parameters; else None.

        Modules lie scattered in memory, and what is looked at has to come from there: so nothing is that nobody needs.
        """
        if self._shapes is None:
            return None
        modules = [ref() for ref in self._modules]
        if list(map(type, modules)) != self._types:  # one that is gone is None
            return None
        attributes = list(map(_attributes_of, modules))
        try:
            children = list(map(_children_of, attributes))
            if _shape(children, _values(children)) != self._shapes[0]:
                return None
            held: list[Any] = []
            if parameters:
                own = list(map(_parameters_in, attributes))
                held = _values(own)
                if _shape(own, held) != self._shapes[1]:
                    return None
        except (KeyError, TypeError):  # they are no dicts any more
            return None
        return _Now(modules, attributes, held)  # type: ignore[arg-type]

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


class _QuickProperty(_Quick):
    """The same of a property that nobody can set."""

    def __get__(self, model: nn.Module | None, kind: Any = None) -> Any:
        found = super().__get__(model, kind)
        return found() if model is not None and self._name in model.__dict__.get(_HAS, ()) else found

    def __set__(self, model: nn.Module, value: Any) -> None:
        raise AttributeError(f"property {self._name!r} of {self._kind.__name__!r} object has no setter")


_placed: list[tuple[type, str]] = []
"""Where quick methods stand: a class, and the method's name."""


def install(model: nn.Module) -> None:
    """Give `model`, a `PeftModel` say, the quick methods, until `fastft.engine.attach.detach`.

    Not in the place of a method that its class has of its own.
    """
    kind, has = type(model), set()
    for name, (make, instead_of) in _QUICK.items():
        is_property = isinstance(instead_of[0], property)
        has_one = hasattr(kind if is_property else model, name)
        known = has_one and getattr(kind, name, _PASSED_ON.get(name)) in instead_of
        if known and name not in vars(kind):
            function = functools.wraps(instead_of[0].fget if is_property else instead_of[0])(make(kind))
            setattr(kind, name, (_QuickProperty if is_property else _Quick)(kind, name, function))
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


def _walk_of(model: nn.Module, *, parameters: bool = False) -> tuple[_Walk, _Now | None]:
    """The walk that was made last, and what there is now; None where no walk holds."""
    walk: _Walk = model.__dict__[_WALK]
    now = walk.now(parameters=parameters)
    if now is None:
        walk = model.__dict__[_WALK] = _Walk(model)
        now = walk.now(parameters=parameters)
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
        walk, now = _walk_of(self, parameters=True) if recurse else (None, None)
        if walk is None or now is None:
            original: Iterator[nn.Parameter] = super(kind, self).parameters(recurse)
            return original
        return map(now.parameters.__getitem__, walk.places)

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
        with _walking_the_checkpointed(self):
            return super(kind, self)._set_gradient_checkpointing(*args, **kwargs)

    return _set_gradient_checkpointing


def _is_checkpointing_of(kind: Any) -> Callable[..., Any]:
    """`is_activation_checkpointing`, or what its name is, as it stands on `kind`; likewise."""

    def is_checkpointing(self: nn.Module) -> Any:
        with _walking_the_checkpointed(self):
            return getattr(super(kind, self), _IS_CHECKPOINTING)

    return is_checkpointing


@contextmanager
def _walking_the_checkpointed(model: nn.Module) -> Iterator[None]:
    """Within it, a walk through `model` comes by modules only that can be checkpointed, where it is known which can."""
    walk, now = _walk_of(model)
    concerned = None if now is None or "modules" in model.__dict__ else walk.checkpointed(now)
    if concerned is None:
        yield
        return
    model.__dict__["modules"] = lambda: iter(concerned)
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
        walk, now = _walk_of(self, parameters=True)
        own = isinstance(self, PreTrainedModel) or type(of).num_parameters is PreTrainedModel.num_parameters
        if only_trainable or now is None or not own:  # what is trained may change at any time
            return int(of.num_parameters(only_trainable=only_trainable, exclude_embeddings=exclude_embeddings))
        sizes = [torch.Tensor.numel(now.parameters[place]) for place in walk.places]
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
    _IS_CHECKPOINTING: (_is_checkpointing_of, (getattr(PreTrainedModel, _IS_CHECKPOINTING),)),
    "num_parameters": (_num_parameters_of, (PreTrainedModel.num_parameters,)),
}
"""By name: what makes the quick method, and the originals that it stands for."""
_PASSED_ON = {"num_parameters": PreTrainedModel.num_parameters}
"""What a `PeftModel` has, but its class has not: it is the model's inside."""
