"""`train`, `parameters` and `num_parameters` of a patched model without a walk through thousands of modules.

Training loops call these at every step (`zero_grad` and clipping ask for `parameters`), and each walks through all
modules in Python: with adapters on seven linears of 28 layers that takes the host longer than a small step takes a GPU
(docs/log.md, 2026-11-25).  Here what a walk found is kept and compared with what the modules hold now, which is much
quicker; where anything differs, the original walks again.  So they give exactly what the originals give.
"""

import weakref
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from operator import itemgetter
from typing import Any

from torch import nn

from fastft.engine.attach import attach

_WALK = "_fastft_walk"


class _Walk:
    """What a walk through all modules of a model found, and whether that still holds.

    It keeps nothing alive, and holds no more when something of it is gone: a new object may have an old one's id.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        """None has found nothing, and does not hold."""
        modules = [] if model is None else list(model.modules())
        found = [module.__dict__.get(name) for module in modules for name in ("_modules", "_parameters")]
        dicts: list[dict[str, Any]] = [held for held in found if isinstance(held, dict)]
        self.sizes: dict[bool, int] = {}
        """`num_parameters`, by `exclude_embeddings`."""
        self._dicts = dicts if len(dicts) == len(found) else []  # a scripted module has others
        self._attributes = [module.__dict__ for module in modules]
        self._ids = list(map(id, self._now()))
        gone = partial(_gone, weakref.ref(self))
        self._alive = [weakref.ref(one, gone) for one in self._now() if one is not None]
        self._parameters = [] if model is None else list(map(weakref.ref, type(model).parameters(model)))

    def _now(self) -> list[Any]:
        """Every child and parameter of every module, None for one that is left out."""
        return list(chain.from_iterable(map(dict.values, self._dicts)))

    def holds(self) -> bool:
        """Whether every module still has the same children and parameters."""
        return bool(self._dicts) and list(map(id, self._now())) == self._ids

    def all_in(self, mode: bool) -> bool:
        """Whether every module is in training mode, or every one is not."""
        modes = set(map(itemgetter("training"), self._attributes)) if self._dicts else set()
        return isinstance(mode, bool) and modes == {mode}

    def parameters(self) -> list[nn.Parameter]:
        """All that there are while it holds."""
        return [parameter for ref in self._parameters if (parameter := ref()) is not None]

    def forget(self) -> None:
        """Hold no more."""
        self._dicts, self._attributes, self._alive = [], [], []

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Walk":
        return _Walk()  # a copy has other modules

    def __reduce__(self) -> tuple[Any, ...]:
        return _Walk, ()


def _gone(walk_ref: "weakref.ref[_Walk]", _: Any) -> None:
    walk = walk_ref()
    if walk is not None:
        walk.forget()


def install(model: nn.Module) -> None:
    """Give `model`, a `PeftModel` say, the quick methods, until `fastft.engine.attach.detach`."""
    methods: dict[str, Callable[..., Any]] = {"train": _train, "parameters": _parameters}
    if hasattr(model, "num_parameters"):
        methods["num_parameters"] = _num_parameters
    attach(model, methods, **{_WALK: _Walk()})


def _walk_of(model: nn.Module) -> _Walk:
    walk: _Walk = model.__dict__[_WALK]
    if not walk.holds():
        walk = model.__dict__[_WALK] = _Walk(model)
    return walk


def _train(self: nn.Module, mode: bool = True) -> nn.Module:
    """As the original: a mode that all modules are in already is no change."""
    return self if _walk_of(self).all_in(mode) else type(self).train(self, mode)


def _parameters(self: nn.Module, recurse: bool = True) -> Iterator[nn.Parameter]:
    """As the original."""
    return iter(_walk_of(self).parameters()) if recurse else type(self).parameters(self, recurse=False)


def _num_parameters(self: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """As the original, which is the model's inside a `PeftModel`."""
    of = self if hasattr(type(self), "num_parameters") else self.get_base_model()
    original = type(of).num_parameters
    if only_trainable:  # what is trained may change at any time
        return int(original(of, only_trainable=True, exclude_embeddings=exclude_embeddings))
    walk = _walk_of(self)
    if exclude_embeddings not in walk.sizes:
        walk.sizes[exclude_embeddings] = original(of, exclude_embeddings=exclude_embeddings)
    return walk.sizes[exclude_embeddings]
