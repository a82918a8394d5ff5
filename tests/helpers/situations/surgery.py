"""What people do to a module: classes, `forward`s, wrappers and hooks, for `situations`.

Each is done to parts that `sites.PARTS` names; a shared number makes the module give half of what it gave, so that
whoever overlooks it computes something else.
"""

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.modules.module as global_hooks
from torch import nn
from torch.nn.utils import parametrize

from situations.sites import NotHereError, Site, halved, linear_weight, noted

Surgery = Callable[[Site, str, str], None]
"""Done to a site, on a part, at some layers."""


class Around(nn.Module):
    """A module around another, passing attributes on as wrappers do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return halved(self.inner(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["inner"], name)


class Beside(Around):
    """A module and a new linear side by side; the new one is trained."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        weight = next(iter(inner.parameters()))
        generator = torch.Generator().manual_seed(5)
        self.new = nn.Linear(32, 32, dtype=weight.dtype)
        with torch.no_grad():
            for parameter in self.new.parameters():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.inner(*args, **kwargs)
        new = self.new(args[0] if args else kwargs["hidden_states"])
        return (out[0] + new, *out[1:]) if isinstance(out, tuple) else out + new


class Unchanged(Around):
    """A wrapper that changes nothing."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


class Nothing(nn.Module):
    """Gives nothing but zeros, as where a part was taken out."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros_like(x)


@functools.cache
def _subclass(kind: type[nn.Module], half: bool) -> type[nn.Module]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return halved(kind.forward(self, *args, **kwargs))

    made = type(f"Half{kind.__name__}" if half else kind.__name__, (kind,), {"forward": forward} if half else {})
    made.__module__ = kind.__module__
    return made


def _by_subclass(half: bool) -> Surgery:
    def change(site: Site, part: str, where: str) -> None:
        for module in site.modules(part, where):
            module.__class__ = _subclass(type(module), half)

    return change


def _halving(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return halved(original(*args, **kwargs))

    return forward


def _on_the_class(method: str) -> Surgery:
    def change(site: Site, part: str, where: str) -> None:
        for kind in {type(module): None for module in site.modules(part, where)}:
            site.set(kind, method, _halving(getattr(kind, method)))

    return change


def _on_the_instance(site: Site, part: str, where: str) -> None:
    """As libraries do it: `module.forward` is kept and called."""
    for module in site.modules(part, where):
        module.forward = _halving(module.forward)


def _as_a_method(site: Site, part: str, where: str) -> None:
    """Replaced by a method that calls the class's."""
    for module in site.modules(part, where):
        module.forward = MethodType(_halving(type(module).forward), module)


def _replaced_and_back(site: Site, part: str, where: str) -> None:
    for module in site.modules(part, where):
        before = vars(module).get("forward")
        module.forward = _halving(module.forward)
        if before is None:
            del module.forward
        else:
            module.forward = before


def _put(make: Callable[[nn.Module], nn.Module]) -> Surgery:
    def change(site: Site, part: str, where: str) -> None:
        for parent, name in site.place(part, where):
            made = make(getattr(parent, name))
            if isinstance(parent, (nn.ModuleList, nn.ModuleDict)):
                parent[int(name) if isinstance(parent, nn.ModuleList) else name] = made  # type: ignore[index]
            else:
                setattr(parent, name, made.train(getattr(parent, "training", True)))

    return change


def _forward_hook(site: Site, part: str, where: str) -> None:
    for module in site.modules(part, where):
        module.register_forward_hook(lambda module, given, out: site.seen.extend([*noted(given), *noted(out)]))


def _forward_hook_that_changes(site: Site, part: str, where: str) -> None:
    for module in site.modules(part, where):
        module.register_forward_hook(lambda module, given, out: halved(out))


def _pre_hook(site: Site, part: str, where: str) -> None:
    for module in site.modules(part, where):
        module.register_forward_pre_hook(
            lambda module, given, named: site.seen.extend([*noted(given), *noted(named)]), with_kwargs=True
        )


def _pre_hook_that_changes(site: Site, part: str, where: str) -> None:
    def hook(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if given and isinstance(given[0], torch.Tensor) and given[0].is_floating_point():
            return (halved(given[0]), *given[1:]), named
        return None

    for module in site.modules(part, where):
        module.register_forward_pre_hook(hook, with_kwargs=True)


def _backward_hook(site: Site, part: str, where: str) -> None:
    for module in site.modules(part, where):
        module.register_full_backward_hook(lambda module, given, out: site.seen.extend([*noted(given), *noted(out)]))


def _backward_pre_hook(site: Site, part: str, where: str) -> None:
    for module in site.modules(part, where):
        module.register_full_backward_pre_hook(lambda module, out: halved(out))


def _hook_and_gone(site: Site, part: str, where: str) -> None:
    for module in site.modules(part, where):
        module.register_forward_hook(lambda module, given, out: halved(out)).remove()


class HalfOf(nn.Module):
    """A parametrization: half of a weight."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 0.5 * weight


def _parametrized(site: Site, part: str, where: str) -> None:
    for module in site.modules(part, where):
        if not isinstance(getattr(module, "weight", None), nn.Parameter):
            raise NotHereError(part)
        parametrize.register_parametrization(getattr(module, "base_layer", module), "weight", HalfOf())


def _pruned(site: Site, part: str, where: str) -> None:
    """As `torch.nn.utils.prune`: the weight becomes an attribute that a pre-hook makes."""
    from torch.nn.utils import prune

    for module in site.modules(part, where):
        weight = linear_weight(module)
        owner = getattr(module, "base_layer", module)
        mask = (torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) > 0.5).to(weight.dtype)
        prune.custom_from_mask(owner, "weight", mask)


SURGERIES: dict[str, Surgery] = {
    "subclass": _by_subclass(half=True),
    "subclass of the same name": _by_subclass(half=False),
    "forward of the class": _on_the_class("forward"),
    "call of the class": _on_the_class("__call__"),
    "forward of the instance": _on_the_instance,
    "method of the instance": _as_a_method,
    "forward replaced and back": _replaced_and_back,
    "wrapper": _put(Around),
    "wrapper that does nothing": _put(Unchanged),
    "new linear beside": _put(Beside),
    "in a Sequential": _put(nn.Sequential),
    "two in a Sequential": _put(lambda inner: nn.Sequential(inner, nn.Tanh())),
    "taken out": _put(lambda inner: Nothing()),
    "Identity": _put(lambda inner: nn.Identity()),
    "forward hook": _forward_hook,
    "forward hook that changes": _forward_hook_that_changes,
    "forward pre-hook": _pre_hook,
    "forward pre-hook that changes": _pre_hook_that_changes,
    "backward hook": _backward_hook,
    "backward pre-hook that changes": _backward_pre_hook,
    "hook and gone": _hook_and_gone,
    "parametrized": _parametrized,
    "pruned": _pruned,
}

_ANY = ("layer", "attention", "mlp", "norm", "activation", "query", "down", "final norm")
_CALLED_SIMPLY = ("mlp", "norm", "activation", "query", "down", "final norm", "head", "embedding")
_WIDE = ("mlp", "attention")
_HOOKED = (*_ANY, "lora A", "lora B", "lora dropout", "head", "embedding", "backbone", "rotary", "model", "peft model")

PARTS_OF: dict[str, tuple[str, ...]] = {
    "subclass": (*_ANY, "head norm", "last norm", "lora A", "lora B", "head", "backbone", "rotary", "embedding"),
    "subclass of the same name": (*_ANY, "head", "backbone"),
    "forward of the class": (*_ANY, "head norm", "head", "embedding", "rotary", "backbone", "model"),
    "call of the class": ("layer", "attention", "mlp", "norm", "query", "activation"),
    "forward of the instance": (*_HOOKED, "head norm", "last norm"),
    "method of the instance": (*_ANY, "head"),
    "forward replaced and back": (*_ANY, "head", "backbone"),
    "wrapper": (*_ANY, "lora A", "head", "embedding"),
    "wrapper that does nothing": (*_ANY, "head"),
    "new linear beside": _WIDE,
    "in a Sequential": _CALLED_SIMPLY,
    "two in a Sequential": _CALLED_SIMPLY,
    "taken out": ("mlp",),
    "Identity": ("mlp", "norm", "activation", "final norm", "last norm", "lora dropout"),
    "forward hook": _HOOKED,
    "forward hook that changes": _HOOKED,
    "forward pre-hook": _HOOKED,
    "forward pre-hook that changes": (*_CALLED_SIMPLY, "layer"),
    "backward hook": (*_ANY, "head", "lora A", "lora B", "backbone"),
    "backward pre-hook that changes": (*_ANY, "head", "lora B"),
    "hook and gone": _HOOKED,
    "parametrized": ("query", "down", "lora A", "lora B", "head", "norm", "final norm", "embedding"),
    "pruned": ("query", "down", "head", "lora A"),
}
"""The parts on which stock survives each."""


def _globally(register: str, which: type[nn.Module], half: bool) -> Callable[[Site], None]:
    def change(site: Site) -> None:
        def hook(module: nn.Module, *seen: Any) -> Any:
            # The engine's own modules are no part of the model, and PEFT's and Hugging Face's are not torch's.
            if not isinstance(module, which):
                return None
            site.seen.extend([*noted(seen[0]), *noted(seen[-1])])
            return halved(seen[-1]) if half else None

        site.undo.callback(getattr(global_hooks, f"register_module_{register}")(hook).remove)

    return change


GLOBAL_HOOKS: dict[str, Callable[[Site], None]] = {
    "global forward hook on linears": _globally("forward_hook", nn.Linear, half=False),
    "global forward hook on all": _globally("forward_hook", nn.Module, half=False),
    "global forward hook that changes": _globally("forward_hook", nn.Linear, half=True),
    "global forward pre-hook": _globally("forward_pre_hook", nn.Linear, half=False),
    "global backward hook": _globally("full_backward_hook", nn.Linear, half=False),
}
