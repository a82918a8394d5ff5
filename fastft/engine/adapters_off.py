"""`PeftModel.disable_adapter` of a patched model, in a twentieth of the time.

Preference methods turn the adapters off and on in every step, for the reference.  PEFT's own asks each layer for its
whole status first, and walks over all modules five times: some 60 ms for 28 layers, while the device has nothing to do.
Here the switches and flags that it would set are set.  Where anything is unusual, before or within, PEFT's own code
runs: it alone knows what to warn of.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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


@contextmanager
def disable_adapter(self: Any) -> Iterator[None]:
    """A context in which the base model computes, as PEFT's."""
    layers = _usual_layers(self)
    with type(self).disable_adapter(self) if layers is None else _off(self, layers):
        yield


@contextmanager
def _off(model: Any, layers: list[LoraLayer]) -> Iterator[None]:
    was_disabled = model._adapters_disabled
    trained = [parameter for layer in layers for parameter in _adapters(layer) if parameter.requires_grad]
    active = [layer.active_adapter for layer in layers]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        for layer in layers:
            layer._disable_adapters = True
        model._adapters_disabled = True
        yield
    finally:
        if _usual_layers(model, disabled=True) == layers and active == [layer.active_adapter for layer in layers]:
            for parameter in trained:
                parameter.requires_grad_(True)
            for layer in layers:
                layer._disable_adapters = False
        else:
            model.base_model.enable_adapter_layers()
        model._adapters_disabled = was_disabled


def _usual_layers(model: Any, *, disabled: bool = False) -> list[LoraLayer] | None:
    """The layers with adapters, if PEFT would do with them no more than what is done here.

    That is so where all of them are on, or all off if `disabled`, and exactly the active adapters are trained, or none.
    """
    tuner = model.base_model
    if type(tuner) is not LoraModel or any(getattr(owner, name, None) is not own for owner, name, own in _OWN):
        return None
    if any(getattr(config, "bias", "none") != "none" for config in model.peft_config.values()):
        return None
    layers: list[LoraLayer] = []
    waiting = [tuner.model]
    while waiting:
        module = waiting.pop()
        if isinstance(module, LoraLayer):
            if not _is_usual(module, disabled):
                return None
            layers.append(module)
        elif isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            return None
        waiting += [below for below in module._modules.values() if below is not None]
    return layers or None


def _is_usual(layer: Any, disabled: bool) -> bool:
    kind = type(layer)
    if kind.enable_adapters is not BaseTunerLayer.enable_adapters or kind.set_adapter is not BaseTunerLayer.set_adapter:
        return False
    active = layer._active_adapter
    # From a single name PEFT makes a list.
    if layer._disable_adapters is not disabled or type(active) is not list or layer.frozen_peft_weight_names:
        return False
    return all(
        parameter.requires_grad is (not disabled and name in active)
        for group in layer.adapter_layer_names
        for name, part in _members(getattr(layer, group))
        for parameter in part
    )


def _members(group: Any) -> Iterator[tuple[str, list[nn.Parameter]]]:
    """Each adapter's parameters in one of a layer's dictionaries."""
    for name, part in group.items():
        yield name, [part] if isinstance(part, nn.Parameter) else list(part.parameters())


def _adapters(layer: Any) -> Iterator[nn.Parameter]:
    for group in layer.adapter_layer_names:
        for _, part in _members(getattr(layer, group)):
            yield from part
