"""Reading a linear layer with its LoRA from the PEFT module that owns it.

The engine copies nothing: weights and adapters stay in PEFT's modules, where `save_pretrained`, optimizers and
callbacks expect them, and are looked up again in every forward.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from fastft.adapters.adapted import AdaptedLinear
from fastft.adapters.variants import variant_of
from fastft.models.identity import (
    is_own,
    why_called_otherwise,
    why_no_linear,
    why_no_number,
    why_no_values,
    why_own_method,
)
from fastft.models.quantized import is_packed_for_cpu, is_quantized

_CAPTURING = "transformers.utils.output_capturing"
"""Its hooks stay once hidden states or attention weights were asked for; idle, unless they are asked for again."""


PACKED = "bitsandbytes packed its weight for inference on the CPU"
_Forward = TypeVar("_Forward", bound=Callable[..., Any])
_LIKE_LINEAR = ("FalconLinear",)
"""Classes that compute what `nn.Linear` does, in other words; by name, so that no model is imported for it."""
_STAND_INS: set[Callable[..., Any]] = set()


def read_linear(module: nn.Module) -> AdaptedLinear:
    """The tensors of `module`, a plain or LoRA-adapted linear layer for which `why_not_fused` is None."""
    if not isinstance(module, LoraLayer):
        return AdaptedLinear(module, _bias(module), None, None, 0.0, 0.0)
    base = module.get_base_layer()
    active = [name for name in module.active_adapters if name in module.lora_A]
    if module.disable_adapters or module.merged or not active:
        return AdaptedLinear(base, _bias(base), None, None, 0.0, 0.0)
    (name,) = active
    dropout = module.lora_dropout[name]
    rate = float(getattr(dropout, "p", 0.0)) if dropout.training else 0.0
    plain = AdaptedLinear(base, _bias(base), None, None, float(module.scaling[name]), rate)
    variant = variant_of(module, name)
    if variant is not None:
        return variant.read(module, name, plain)
    a, b = module.lora_A[name].weight, module.lora_B[name].weight
    assert isinstance(a, torch.Tensor)
    assert isinstance(b, torch.Tensor)
    return plain._replace(a=a, b=b, b_bias=_bias(module.lora_B[name]))


def why_not_fused(module: nn.Module) -> str | None:
    """Why a fused decoder layer cannot take this linear layer's tensors, or None where it can."""
    return why_called(module) or why_not_alone(module) or _why_biased(module)


def why_not_alone(module: nn.Module) -> str | None:
    """Why `fastft.engine.linear` cannot compute this linear layer, called as such, or None where it can."""
    base = module
    if isinstance(module, LoraLayer):
        # Other methods' layers may be LoraLayers too, and compute something else.
        if not _is_known(module):
            return f"{method_of(module)} is not plain LoRA"
        if not is_own(type(module).forward):
            return f"{type(module).__name__} has another forward than PEFT's"
        reason = why_called_otherwise(type(module)) or why_own_method(module)
        if reason is not None:
            return reason
        if module.merged and module.disable_adapters:
            return "its adapter is merged and disabled"
        base = module.get_base_layer()
        active = [name for name in module.active_adapters if name in module.lora_A]
        if len(active) > 1:
            return f"{len(active)} adapters are active at once"
        if any(name in module.lora_variant and variant_of(module, name) is None for name in active):
            return "its LoRA is a variant that the engine does not know"
        if getattr(module, "fan_in_fan_out", False) and not isinstance(base, Conv1D):
            return "its weight is stored transposed"
        for name in active:
            reason = _why_no_adapter(module, name)
            if reason is not None:
                return f"its adapter: {reason}"
        reason = why_called(base)
        if reason is not None:
            return f"its base layer: {reason}"
    elif module.__class__.__module__.startswith("peft."):
        return f"{method_of(module)} is not LoRA"
    if not (type(base) in (nn.Linear, Conv1D) or type(base).__name__ in _LIKE_LINEAR or is_quantized(base)):
        return f"{type(base).__name__} is not a linear layer that the engine knows"
    if not is_own(type(base).forward):
        return f"{type(base).__name__} has another forward"
    if base is not module and base is not module.base_layer:
        return "two adapter layers are nested"
    if is_packed_for_cpu(base):
        return PACKED
    if (reason := why_no_values(base.weight)) is not None:
        return f"its base weight {reason}"
    if base.weight.requires_grad:
        return "its base weight is trained"
    return None


def method_of(module: nn.Module) -> str:
    """What PEFT calls the method of an adapter's layer: `vera` for `peft.tuners.vera.layer.Linear`, say."""
    package = type(module).__module__.removeprefix("peft.tuners.").partition(".")[0]
    return f"{type(module).__name__} of PEFT's method {package}"


def _is_known(module: Any) -> bool:
    """Whether the adapters of this `LoraLayer` are plain LoRA, or may be a variant."""
    if type(module).__module__.rpartition(".")[0] == "peft.tuners.lora":
        return True
    return any(variant_of(module, name) is not None for name in module.lora_A)


def _why_no_adapter(module: Any, name: str) -> str | None:
    """Why the matrices of adapter `name` cannot be taken for what it computes, or None."""
    variant = variant_of(module, name)
    reason = _why_no_matrices(module, name) if variant is None else variant.why_not(module, name)
    if reason is None and (number := why_no_number(module.scaling[name])) is not None:
        reason = f"its scaling is {number}"
    reason = reason or why_no_linear()
    if reason is not None:
        return reason
    dropout = module.lora_dropout[name]
    if type(dropout) not in (nn.Dropout, nn.Identity) or not is_own(type(dropout).forward):
        return f"its dropout is a {type(dropout).__name__}"
    called = [module.lora_A[name], module.lora_B[name], dropout] if variant is None else variant.called(module, name)
    for part in called:
        reason = why_called(part)
        if reason is not None:
            return reason
    return None


def _why_no_matrices(module: Any, name: str) -> str | None:
    """Why A and B of adapter `name` are no plain linear layers, or None."""
    for linear in (module.lora_A[name], module.lora_B[name]):
        if type(linear) is not nn.Linear:
            return f"it is a {type(linear).__module__}.{type(linear).__name__}"
        if linear._parameters.get("weight") is None:
            return "its weight is no parameter"
    return None


def _why_biased(module: nn.Module) -> str | None:
    linear = read_linear(module)
    if linear.b_bias is not None:
        return "its LoRA has a bias"
    if linear.bias is not None and linear.bias.requires_grad:
        return "its bias is trained"
    return None


def why_called(module: nn.Module) -> str | None:
    """Why this module has to be called as such, or None where its tensors may be used without it."""
    if has_hooks(module):
        return "it has hooks"
    forward = module.__dict__.get("forward")
    if forward is not None and getattr(forward, "__func__", None) not in _STAND_INS:
        return "its forward was replaced"
    return why_called_otherwise(type(module)) or why_own_method(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody looks at the module's calls; transformers' idle hooks for hidden states do not count."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(getattr(hook, "__module__", None) != _CAPTURING for group in hooks for hook in group.values())


def stand_in(forward: _Forward) -> _Forward:
    """Decorates a `forward` of the engine that computes what the module's class does.

    A module that has it, and nothing else in its way, may also be read instead of called.
    """
    _STAND_INS.add(forward)
    return forward


def _bias(module: nn.Module) -> torch.Tensor | None:
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, torch.Tensor) else None
