"""`PeftModel.disable_adapter` of a patched model, in a tenth of the time.

Preference methods turn the adapters off and on in every step, for the reference.  PEFT's own asks each layer for its
whole status first, and walks over all modules five times: some 60 ms for 28 layers, while the device has nothing to do.
Here the switches and flags that it would set are set.  Where anything is unusual, before or within, PEFT's own code
runs: it alone knows what to warn of.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import compress
from typing import Any, NamedTuple

from peft import PeftModel
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from fastft.engine.attach import attach

_PEFTS = (
    (PeftModel, "disable_adapter"),
    (LoraModel, "disable_adapter_layers"),
    (LoraModel, "enable_adapter_layers"),
    (LoraModel, "_enable_adapter_layers"),
    (BaseTunerLayer, "enable_adapters"),
    (BaseTunerLayer, "set_adapter"),
)
_OWN = [(owner, name, getattr(owner, name, None)) for owner, name in _PEFTS]
"""What PEFT's own does, as it was when this was written down."""


def install(model: nn.Module) -> None:
    """Stand in the place of a LoRA model's `disable_adapter`, until `unpatch_model`."""
    kind = type(model)
    is_pefts = isinstance(model, PeftModel) and kind.disable_adapter is PeftModel.disable_adapter  # type: ignore[attr-defined]
    if is_pefts and "disable_adapter" not in model.__dict__:
        attach(model, {"disable_adapter": disable_adapter})


class _Usual(NamedTuple):
    """A model with whose adapters PEFT would do no more than what is done here."""

    layers: list[LoraLayer]
    active: list[list[str]]
    """Of each layer, the names of its active adapters."""
    trained: list[nn.Parameter]
    """All parameters of those; no other adapter's are trained."""


@contextmanager
def disable_adapter(self: Any) -> Iterator[None]:
    """A context in which the base model computes, as PEFT's."""
    usual = _usual(self, disabled=False)
    with type(self).disable_adapter(self) if usual is None else _off(self, usual):
        yield


@contextmanager
def _off(model: Any, usual: _Usual) -> Iterator[None]:
    was_disabled = model._adapters_disabled
    try:
        _switch(usual, on=False)
        model._adapters_disabled = True
        yield
    finally:
        now = _usual(model, disabled=True)
        if now is not None and (now.layers, now.active) == (usual.layers, usual.active):
            _switch(now, on=True)
        else:
            model.base_model.enable_adapter_layers()
        model._adapters_disabled = was_disabled


def _switch(usual: _Usual, *, on: bool) -> None:
    for parameter in usual.trained:
        parameter.requires_grad_(on)
    for layer in usual.layers:
        object.__setattr__(layer, "_disable_adapters", not on)  # no module or parameter, of which its own would ask


def _usual(model: Any, *, disabled: bool) -> _Usual | None:
    """What is to be switched; None where something is unusual.

    Usual is that all layers with adapters are on, or all off if `disabled`, and just the active ones trained, or none.
    """
    tuner = model.base_model
    if type(tuner) is not LoraModel or any(getattr(owner, name, None) is not own for owner, name, own in _OWN):
        return None
    if any(getattr(config, "bias", "none") != "none" for config in model.peft_config.values()):
        return None
    found = _Usual([], [], [])
    modules = list(tuner.model.modules())  # a patched model's are not walked each time
    kinds = list(map(type, modules))
    # Asked once a class, as an abstract class is slow to answer.
    switched = {kind for kind in set(kinds) if issubclass(kind, (BaseTunerLayer, AuxiliaryTrainingWrapper))}
    for module in compress(modules, map(switched.__contains__, kinds)):
        if not (isinstance(module, LoraLayer) and _add(module, found, disabled)):
            return None
    return found if found.layers else None


def _add(layer: Any, found: _Usual, disabled: bool) -> bool:
    """Add a layer to what was found, and say whether it is usual."""
    kind, active = type(layer), layer._active_adapter
    if kind.enable_adapters is not BaseTunerLayer.enable_adapters or kind.set_adapter is not BaseTunerLayer.set_adapter:
        return False
    # From a single name PEFT makes a list.
    if layer._disable_adapters is not disabled or type(active) is not list or layer.frozen_peft_weight_names:
        return False
    found.layers.append(layer)
    found.active.append(list(active))
    for group in map(layer._modules.__getitem__, layer.adapter_layer_names):
        for name, part in _parts_of(group):
            is_active = name in active
            trained = is_active and not disabled
            # Without the generators of `parameters`, where there is nothing below.
            own = part._parameters.values() if isinstance(part, nn.Module) else [part]
            for parameter in part.parameters() if getattr(part, "_modules", None) else own:
                if parameter is not None and parameter.requires_grad is not trained:
                    return False
                if parameter is not None and is_active:
                    found.trained.append(parameter)
    return True


def _parts_of(group: Any) -> Iterable[tuple[str, Any]]:
    """What a layer has of one kind, by adapter."""
    if type(group) is nn.ModuleDict:
        return group._modules.items()
    return group.items() if len(group) else ()
