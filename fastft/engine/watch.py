"""Noticing cheaply that a model's layers are no longer what the engine read.

Whether a layer may run fused depends on some fifty small facts about its modules: their classes, hooks, replaced
forwards, constants, the active adapter, what is trained.  Asking for all of them in every step costs more than
launching the layer's kernels.  A `Watch` remembers them as flat lists that C code compares.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, repeat
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch.nn.modules.module as torch_module
from peft.tuners.lora import LoraLayer
from torch import nn

from fastft.adapters.lora import has_hooks
from fastft.models.calls import Bound, Calls, calls_of, together

_requires_grad = attrgetter("requires_grad")
_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict)
_WITHOUT_CONSTANTS = (nn.Linear, nn.Identity)
"""What these hold beside their parameters changes nothing that they compute."""
_CONSTANT = (bool, int, float, str, type(None))
_SWITCHES = ("_active_adapter", "_disable_adapters", "training")
"""Of a layer with adapters."""
_OF_CLASS = ("forward", "__call__", "__getattr__")
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_hooks_of = itemgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_modules_of, _parameters_of, _buffers_of = map(itemgetter, ("_modules", "_parameters", "_buffers"))
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
    ) -> None:
        """What the modules' own `forward`s reach counts, what others reach that are `reached`, the attributes that are
        `bound`, and the constants of `config`."""
        below = list(dict.fromkeys(chain.from_iterable(module.modules() for module in modules)))
        # What only holds others is never called, and whatever is put into an empty one changes no result.
        called = [m for m in below if not isinstance(m, _CONTAINERS)]
        self._below = [m for m in below if not isinstance(m, _CONTAINERS) or m._modules or m._parameters]
        self._types = list(map(type, self._below))
        # All else is looked up in these anew: what they hold may be replaced as a whole.
        self._attributes = list(map(vars, self._below))
        kinds: dict[type[nn.Module], Calls] = {kind: calls_of(kind) for kind in dict.fromkeys(map(type, called))}
        of_class = [(kind, name, getattr(kind, name)) for kind in kinds for name in _OF_CLASS]
        self._reached = together([*reached, *kinds.values()], [*bound, *of_class])
        self._called = list(map(vars, called))
        self._hooked = self._now_hooked()
        self._forwards = self._now_forwards()
        # Only what holds something: whatever is added to a module without parts or weights changes no result, unless it
        # comes with another `forward` or a hook.
        self._parents = [attributes for attributes in self._attributes if attributes["_modules"]]
        self._owners = [attributes for attributes in self._attributes if attributes["_parameters"]]
        self._sizes, self._members = self._now_members()
        self._adapted = [vars(m) for m in below if isinstance(m, LoraLayer)]
        self._switches = [{name: state[name] for name in _SWITCHES} for state in self._adapted]
        self._scalings = [dict(state["scaling"]) for state in self._adapted]
        self._flags, self._numbers = self._now_adapted()
        self._flags = [list(map(_copied, column)) for column in self._flags]
        self._frozen = [p for p in self._members if isinstance(p, nn.Parameter)]
        self._trained = list(map(_requires_grad, self._frozen))
        holding = [m for m in called if not isinstance(m, (*_WITHOUT_CONSTANTS, LoraLayer))]
        holders = [(vars(m), kinds[type(m)].mentioned - _OF_EVERY_MODULE) for m in holding]
        configs = {id(c): c for c in (config, *(state.get("config") for state, _ in holders)) if hasattr(c, "__dict__")}
        holders += [(vars(each), frozenset()) for each in configs.values()]
        self._names = [(holder, _read_of(holder, mentioned)) for holder, mentioned in holders]
        self._names = [(holder, names) for holder, names in self._names if names]
        # Twice the first, so that even a single one is read as a tuple.
        self._readers = [(itemgetter(names[0], *names), holder) for holder, names in self._names]
        self._lengths, self._values = self._now_values()
        self._lists = [(h, n, list(h[n])) for h, names in self._names for n in names if type(h[n]) is list]
        self._buffered = [(state, dict(state["_buffers"])) for state in self._called if state["_buffers"]]
        self.quiet = not any(map(has_hooks, called))
        """Whether none of the modules has a hook that anybody hears of."""

    def unchanged(self) -> bool:
        """Whether everything is still as it was."""
        try:
            return (
                all(map(is_, map(vars, self._below), self._attributes))
                and self._hooked == self._now_hooked()
                and self._types == list(map(type, self._below))
                and _are((self._sizes, self._members), self._now_members())
                and all(map(is_, self._forwards, self._now_forwards()))
                and _are((self._flags, self._numbers), self._now_adapted())
                and self._trained == list(map(_requires_grad, self._frozen))
                and self._reached.hold()
                and _are((self._lengths, self._values), self._now_values())
                and all(type(holder[name]) is list and holder[name] == was for holder, name, was in self._lists)
            )
        except KeyError:  # a constant was deleted
            return False

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """While this lasts, plain values, buffers and the adapters' switches are as they were; what else changed
        stays."""
        scalings = [state["scaling"] for state in self._adapted]
        holders = [holder for holder, _ in self._names] + self._adapted + scalings
        before, trained = list(map(dict, holders)), list(map(_requires_grad, self._frozen))
        buffers = [dict(state["_buffers"]) for state, _ in self._buffered]
        values = iter(self._values)
        try:
            for holder, names in self._names:
                holder.update(zip((names[0], *names), values, strict=False))
            for state, switches, scaling in zip(self._adapted, self._switches, self._scalings, strict=True):
                state.update(switches)
                state["scaling"].update(scaling)
            for state, of_then in self._buffered:
                state["_buffers"].update(of_then)
            self._train(self._trained)
            yield
        finally:
            for holder, attributes in zip(holders, before, strict=True):
                holder.update(attributes)
            for (state, _), of_now in zip(self._buffered, buffers, strict=True):
                state["_buffers"].update(of_now)
            self._train(trained)

    def _train(self, flags: list[bool]) -> None:
        for parameter, flag in zip(self._frozen, flags, strict=True):
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)

    def _now_hooked(self) -> list[Any]:
        if not any(chain.from_iterable(map(_hooks_of, self._called))):
            return []
        return [list(each.values()) for each in chain.from_iterable(map(_hooks_of, self._called)) if each]

    def _now_forwards(self) -> list[Any]:
        return list(map(dict.get, self._called, repeat("forward")))

    def _now_members(self) -> tuple[list[int], list[Any]]:
        """How much every module holds, and the modules and parameters themselves."""
        registries = [*map(_modules_of, self._parents), *map(_parameters_of, self._owners)]
        return list(map(len, registries)), list(chain.from_iterable(map(dict.values, registries)))

    def _now_adapted(self) -> tuple[list[Any], list[Any]]:
        """The adapters' switches, a list for each kind of switch, and their scalings."""
        if not self._adapted:
            return [], []
        *switches, scalings, variants = map(list, zip(*map(_of_adapters, self._adapted), strict=True))
        # The number of attributes too, and of scalings: a new one may stand before what the class has.
        flags = [*switches, list(map(list, variants)), list(map(len, self._adapted)), list(map(len, scalings))]
        return flags, list(chain.from_iterable(map(dict.values, scalings)))

    def _now_values(self) -> tuple[list[int], list[Any]]:
        return (
            [len(holder) for _, holder in self._readers],
            list(chain.from_iterable([read(holder) for read, holder in self._readers])),
        )


def _are(then: tuple[list[Any], list[Any]], now: tuple[list[Any], list[Any]]) -> bool:
    """Whether the first of each pair are equal, and the second the same objects, or equal constants."""
    if then[0] != now[0]:
        return False
    return all(map(is_, then[1], now[1])) or all(map(_same, then[1], now[1]))


def _same(one: Any, other: Any) -> bool:
    # A tensor may be equal now, and not the next time.
    return one is other or (type(one) is type(other) and isinstance(one, (*_CONSTANT, tuple)) and one == other)


def _copied(value: Any) -> Any:
    """What is compared with `value` later, even if that is changed in place."""
    return list(value) if isinstance(value, list) else value


def _read_of(holder: dict[str, Any], mentioned: frozenset[str]) -> list[str]:
    """The names of the plain values of a module or configuration, and of the objects that its `forward` reads."""
    return [
        name
        for name, value in holder.items()
        if name in mentioned or isinstance(value, _CONSTANT) or _is_plain_list(value)
    ]


def _is_plain_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(each, _CONSTANT) for each in value)
