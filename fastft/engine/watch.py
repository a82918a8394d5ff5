"""Noticing cheaply that a model's layers are no longer what the engine read.

Whether a layer may run fused depends on some fifty small facts about its modules: their classes, hooks, replaced
forwards, constants, the active adapter, what is trained.  Asking for all of them in every step costs more than
launching the layer's kernels.  A `Watch` remembers them as flat lists that C code compares.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain, repeat
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch.nn.modules.module as torch_module
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils.hooks import RemovableHandle

from fastft.adapters.lora import has_hooks
from fastft.adapters.variants import VARIANTS
from fastft.engine.attach import WeakMethod
from fastft.models.calls import Bound, Calls, calls_of, together

_requires_grad = attrgetter("requires_grad")
_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict)
_WITHOUT_CONSTANTS = (nn.Linear, nn.Identity)
"""What these hold beside their parameters changes nothing that they compute."""
_CONSTANT = (bool, int, float, str, type(None))
_SWITCHES = ("_active_adapter", "_disable_adapters", "training")
"""Of a layer with adapters."""
CHECKPOINT = "_gradient_checkpointing_func"
"""Where a module of Hugging Face's keeps how it is checkpointed."""
_OF_CLASS = ("forward", "__call__", "__getattr__")
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_hooks_of = itemgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_modules_of, _parameters_of = itemgetter("_modules"), itemgetter("_parameters")
_of_adapters = itemgetter(*_SWITCHES, "merged_adapters", "scaling", "lora_variant")
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

    def __init__(
        self,
        modules: Iterable[nn.Module],
        reached: Iterable[Calls] = (),
        bound: Iterable[Bound] = (),
        config: Any = None,
        elsewhere: set[int] | None = None,
    ) -> None:
        """What the modules' own `forward`s reach counts, what others reach that are `reached`, the attributes that are
        `bound`, and the constants of `config`.

        `elsewhere` has the ids of classes and configurations that another watch looks at, and gets those of this one.
        """
        elsewhere = set() if elsewhere is None else elsewhere
        below = list(dict.fromkeys(chain.from_iterable(module.modules() for module in modules)))
        # What only holds others is never called, and whatever is put into an empty one changes no result.
        called = [m for m in below if not isinstance(m, _CONTAINERS)]
        self._modules = called
        self._types = list(map(type, called))
        # All else is looked up in these anew: what they hold may be replaced as a whole.
        self._attributes = list(map(vars, called))
        kinds: dict[type[nn.Module], Calls] = {kind: calls_of(kind) for kind in dict.fromkeys(map(type, called))}
        new = {kind: calls for kind, calls in kinds.items() if id(kind) not in elsewhere}
        of_class = [(kind, name, getattr(kind, name)) for kind in new for name in _OF_CLASS]
        of_variants = [each for variant in VARIANTS for each in variant.bound()]
        self._reached = together([*reached, *new.values()], [*bound, *of_class, *of_variants])
        self._layers = [attributes for attributes in self._attributes if "gradient_checkpointing" in attributes]
        self._registered, self._hooked = _registered(), self._now_hooked()
        self._forwards, self._checkpoints = self._now_forwards(), self._now_checkpoints()
        # Only what holds something: whatever is added to a module without parts or weights changes no result, unless it
        # comes with another `forward` or a hook.
        holding = [vars(m) for m in below]
        self._parents = [attributes for attributes in holding if attributes["_modules"]]
        self._owners = [attributes for attributes in holding if attributes["_parameters"]]
        self._members = list(map(dict, self._now_members()))
        self._frozen = [p for state in self._owners for p in state["_parameters"].values() if p is not None]
        self._adapted = [vars(m) for m in below if isinstance(m, LoraLayer)]
        self._switches = [{name: state[name] for name in _SWITCHES} for state in self._adapted]
        self._scalings = [dict(state["scaling"]) for state in self._adapted]
        self._flags = list(map(_copied, self._now_adapted()))
        self._trained = list(map(_requires_grad, self._frozen))
        # Dictionaries compare members as objects, but for tensors of one element, which may be equal though they are
        # others: AdaLoRA has such.
        self._single = any(p.numel() == 1 for p in self._frozen)
        computing = [m for m in called if not isinstance(m, (*_WITHOUT_CONSTANTS, LoraLayer))]
        holders = [(vars(m), kinds[type(m)].mentioned - _OF_EVERY_MODULE) for m in computing]
        configs = {id(c): c for c in (config, *(state.get("config") for state, _ in holders)) if hasattr(c, "__dict__")}
        holders += [(vars(each), frozenset()) for key, each in configs.items() if key not in elsewhere]
        elsewhere.update(map(id, new), configs)
        self._names = [(holder, names) for holder, mentioned in holders if (names := _read_of(holder, mentioned))]
        # Twice the first, so that even a single one is read as a tuple.
        self._readers = [(itemgetter(names[0], *names), holder) for holder, names in self._names]
        self._values, self._lengths = self._now_values(), self._now_lengths()
        self._lists = [(h, n, list(h[n])) for h, names in self._names for n in names if type(h[n]) is list]
        self._buffered = [state for state in self._attributes if state["_buffers"]]
        self.quiet = not any(map(has_hooks, called))
        """Whether none of the modules has a hook that anybody hears of."""

    def unchanged(self) -> bool:
        """Whether everything is still as it was."""
        return (
            self._lengths == self._now_lengths()
            and all(map(is_, self._forwards, self._now_forwards()))
            and self._are_hooked_alike()
            and self._computes_alike()
        )

    def computes_what_it_did(self) -> bool:
        """Whether the modules still compute the same; hooks may have gone by which a forward collected its outputs, and
        the engine's own forwards."""
        forwards = zip(self._forwards, self._now_forwards(), strict=True)
        return (
            self.quiet == (not any(map(has_hooks, self._modules)))
            and all(then is now or (now is None and type(then) is WeakMethod) for then, now in forwards)
            and self._computes_alike()
        )

    def _computes_alike(self) -> bool:
        try:
            return (
                self._types == list(map(type, self._modules))
                and self._are_checkpointed_alike()
                and self._has_its_members()
                and self._flags == self._now_adapted()
                and self._trained == list(map(_requires_grad, self._frozen))
                and self._reached.hold()
                and _are(self._values, self._now_values())
                and all(type(holder[name]) is list and holder[name] == was for holder, name, was in self._lists)
            )
        except (KeyError, RuntimeError):  # a constant was deleted, or two tensors are no true or false
            return False

    def buffers(self) -> list[dict[str, Any]]:
        """The buffers of each module that has some."""
        return [dict(state["_buffers"]) for state in self._buffered]

    @contextmanager
    def put_back(self, buffers: list[dict[str, Any]]) -> Iterator[None]:
        """While this lasts, plain values and the adapters' switches are as they were, and buffers what is given; what
        else changed stays."""
        scalings = [state["scaling"] for state in self._adapted]
        holders = [holder for holder, _ in self._names] + self._adapted + scalings
        before, trained = list(map(dict, holders)), list(map(_requires_grad, self._frozen))
        buffers_before = self.buffers()
        values = iter(self._values)
        try:
            for holder, names in self._names:
                holder.update(zip((names[0], *names), values, strict=False))
            for state, switches, scaling in zip(self._adapted, self._switches, self._scalings, strict=True):
                state.update(switches)
                state["scaling"].update(scaling)
            for state, of_then in zip(self._buffered, buffers, strict=True):
                state["_buffers"].update(of_then)
            self._train(self._trained)
            yield
        finally:
            for holder, attributes in zip(holders, before, strict=True):
                holder.update(attributes)
            for state, of_now in zip(self._buffered, buffers_before, strict=True):
                state["_buffers"].update(of_now)
            self._train(trained)

    def _train(self, flags: list[bool]) -> None:
        for parameter, flag in zip(self._frozen, flags, strict=True):
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)

    def _are_hooked_alike(self) -> bool:
        """Whether the modules' hooks are those that they had; not looked for where nobody registered any since, and
        there was none that could have gone."""
        registered = _registered()
        if registered != self._registered or self._hooked:
            if self._hooked != self._now_hooked():
                return False
            self._registered = registered
        return True

    def _are_checkpointed_alike(self) -> bool:
        """Whether the layers' checkpoints are what they were, or partials of the same: whenever Hugging Face turns
        gradient checkpointing on, it makes a new one, and TRL turns it off and on for every reference."""
        now = self._now_checkpoints()
        if not all(map(is_, self._checkpoints, now)):
            if not all(map(_are_same_partials, self._checkpoints, now)):
                return False
            self._checkpoints = now
        return True

    def _now_hooked(self) -> list[Any]:
        return [list(each.values()) for each in chain.from_iterable(map(_hooks_of, self._attributes)) if each]

    def _now_forwards(self) -> list[Any]:
        """What was put in the place of a module's `forward`."""
        return list(map(dict.get, self._attributes, repeat("forward")))

    def _now_checkpoints(self) -> list[Any]:
        """How Hugging Face's layers are checkpointed."""
        return list(map(dict.get, self._layers, repeat(CHECKPOINT)))

    def _now_members(self) -> list[dict[str, Any]]:
        """The modules and parameters that each of them holds."""
        return [*map(_modules_of, self._parents), *map(_parameters_of, self._owners)]

    def _has_its_members(self) -> bool:
        """Whether the modules hold the same modules and parameters."""
        if not self._single:
            return self._members == self._now_members()
        pairs = zip(self._members, self._now_members(), strict=True)
        return all(one.keys() == now.keys() and all(map(is_, one.values(), now.values())) for one, now in pairs)

    def _now_adapted(self) -> list[Any]:
        """The adapters' switches and scalings."""
        return list(chain.from_iterable(map(_of_adapters, self._adapted)))

    def _now_values(self) -> list[Any]:
        return list(chain.from_iterable([read(holder) for read, holder in self._readers]))

    def _now_lengths(self) -> list[int]:
        """How many attributes they have: a new one may stand before what the class has."""
        return [*map(len, self._adapted), *[len(holder) for _, holder in self._readers]]


def _registered() -> int:
    """Grows with every hook that is registered anywhere."""
    return RemovableHandle.next_id


def _are(then: list[Any], now: list[Any]) -> bool:
    """Whether these are the same objects, or equal constants."""
    return all(map(is_, then, now)) or all(map(_same, then, now))


def _same(one: Any, other: Any) -> bool:
    # A tensor may be equal now, and not the next time.
    return one is other or (type(one) is type(other) and isinstance(one, (*_CONSTANT, tuple)) and one == other)


def _are_same_partials(one: Any, other: Any) -> bool:
    return one is other or (
        type(one) is type(other) is partial
        and one.func is other.func
        and one.keywords.keys() == other.keywords.keys()
        and _are([*one.args, *one.keywords.values()], [*other.args, *other.keywords.values()])
    )


def _copied(value: Any) -> Any:
    """What is compared with `value` later, even if that is changed in place."""
    return copy.copy(value) if isinstance(value, (list, dict)) else value


def _read_of(holder: dict[str, Any], mentioned: frozenset[str]) -> list[str]:
    """The names of the plain values of a module or configuration, and of the objects that its `forward` reads."""
    return [
        name
        for name, value in holder.items()
        if name in mentioned or isinstance(value, _CONSTANT) or _is_plain_list(value)
    ]


def _is_plain_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(each, _CONSTANT) for each in value)
