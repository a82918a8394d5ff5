"""Whether the code that stock would run is the code that the engine was written against.

A module runs fused only if the functions that a call of it would reach are the libraries' own: by where their code was
compiled, not by what they are called.  A subclass with another `forward`, a class that somebody gave another one, a
kernel library's replacement, an attention function registered under an old name, another helper of theirs: all of them
differ here.  What a `forward` reaches says `fastft.models.calls`.
"""

import functools
import sys
from collections.abc import Iterator
from numbers import Real
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
import transformers.masking_utils as masking
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from transformers.loss.loss_utils import ForCausalLMLoss

from fastft.models.calls import Bound, Calls, calls_of, calls_of_function, code_below, is_library
from fastft.models.spec import LayerSpec

_OF_EVERY_MODULE = ("__call__", "_call_impl", "__getattr__")
_OF_A_LIST = ("__getitem__", "__iter__", "__len__")
_OF_THE_MODULE = ("apply_rotary_pos_emb", "rotate_half", "eager_attention_forward", "repeat_kv")
_OF_MASKS = ("create_causal_mask", "create_sliding_window_causal_mask")
_SDPA = "transformers.integrations.sdpa_attention"
_GELUS: dict[str, dict[str, str]] = {"GELUActivation": {}, "GELUTanh": {"approximate": "tanh"}}
"""Activations that call a function that they hold, and how they call it."""


def is_from(function: Any, module: str, qualified_name: str) -> bool:
    """Whether a function, below what decorators of the same libraries put around it, is the one that `module` defines
    under this name."""
    code = code_below(function)
    if code is None or code.co_qualname != qualified_name:
        return False
    return code.co_filename == getattr(sys.modules.get(module), "__file__", None)


def is_own(function: Any) -> bool:
    """Whether a function is defined where it says."""
    return is_from(function, getattr(function, "__module__", ""), getattr(function, "__qualname__", ""))


def why_other_class(module: nn.Module, defined_in: str, name: str) -> str | None:
    """Why calling `module` would not run `name.forward` of `defined_in` and nothing else."""
    kind = type(module)
    if not is_from(kind.forward, defined_in, f"{name}.forward"):
        return f"{kind.__module__}.{kind.__qualname__} has another forward than {name}"
    return why_called_otherwise(kind)


def why_called_otherwise(kind: type[nn.Module]) -> str | None:
    """Why a call of such a module is more than its `forward`, or reads other attributes than its own."""
    for name in ("__call__", "__getattr__"):
        if not is_library(getattr(kind, name)):
            return f"{kind.__module__}.{kind.__qualname__} has a {name} of its own"
    return calls_of(kind).reason


def why_own_method(module: nn.Module) -> str | None:
    """Why an instance's `forward` would call something else than that of its class, or None."""
    own = calls_of(type(module)).methods & module.__dict__.keys()
    return f"its {min(own)} was replaced" if own else None


def why_no_linear() -> str | None:
    """Why a linear layer's call would not be PyTorch's matrix product, or None."""
    if not is_own(nn.Linear.forward):
        return "nn.Linear has another forward"
    return None if F.linear is torch._C._nn.linear else "torch.nn.functional.linear was replaced"


def called_by(spec: LayerSpec, backbone: nn.Module, config: Any) -> list[Calls]:
    """What the backbone of a family reaches, and what attention and masks are under this configuration.

    What the layers' modules reach themselves is for who watches them.
    """
    functions = [attention_function(spec, config), mask_function(config)]
    return [calls_of(type(backbone)), *(calls_of_function(each) for each in functions if each is not None)]


def called_by_name(spec: LayerSpec) -> Iterator[Bound]:
    """What a family's `forward`s find by name, beside what they reach themselves, with what stands there now."""
    module = sys.modules[spec.module]
    for name in (*_OF_THE_MODULE, *_OF_MASKS):
        if name in module.__dict__:
            yield module, name, module.__dict__[name]
    for name in _OF_EVERY_MODULE:
        yield nn.Module, name, getattr(nn.Module, name)
    for name in _OF_A_LIST:
        yield nn.ModuleList, name, getattr(nn.ModuleList, name)


def why_other_functions(spec: LayerSpec) -> str | None:
    """Why a family's `forward`s would call something else than what the engine computes, or None."""
    module = sys.modules.get(spec.module)
    if module is None:
        return f"{spec.module} is not imported"
    for name in _OF_THE_MODULE:
        if name in module.__dict__ and not is_from(module.__dict__[name], spec.module, name):
            return f"{name} of {spec.module} was replaced"
    for name in _OF_MASKS:
        if name in module.__dict__ and not is_from(module.__dict__[name], "transformers.masking_utils", name):
            return f"{name} of {spec.module} was replaced"
    for name in _OF_EVERY_MODULE:
        if not is_library(getattr(nn.Module, name)):
            return f"Module.{name} was replaced"
    return None


def why_other_loss() -> str | None:
    """Why transformers' cross-entropy would be another one than the engine's, or None."""
    return (
        "the cross-entropy was replaced" if not is_own(ForCausalLMLoss) else calls_of_function(ForCausalLMLoss).reason
    )


def why_other_list(modules: nn.Module) -> str | None:
    """Why going over a list of modules would not visit all of them in their order, or None."""
    kind = type(modules)
    for name in _OF_A_LIST:
        if getattr(kind, name) is not getattr(nn.ModuleList, name) or not is_library(getattr(kind, name)):
            return f"{kind.__module__}.{kind.__qualname__} has a {name} of its own"
    return None


def why_other_activation(activation: nn.Module) -> str | None:
    """Why the function that an activation holds is not the one that its class would give it, or None."""
    keywords, act = _GELUS.get(type(activation).__name__), activation.__dict__.get("act")
    if keywords is None or act is None:
        return None
    if isinstance(act, MethodType):  # the same in Python
        usual = is_own(act) and act.__func__.__qualname__.startswith(f"{type(activation).__name__}._gelu")
    elif isinstance(act, functools.partial):
        usual = act.func is F.gelu and act.keywords == keywords and not act.args
    else:
        usual = act is F.gelu and not keywords
    return None if usual else f"the function of its {type(activation).__name__} was replaced"


def why_no_number(value: Any) -> str | None:
    """Why a constant of a layer cannot be taken for a number, or None.

    A tensor may be trained, or changed in place.
    """
    return None if value is None or isinstance(value, Real) else f"a {type(value).__name__}, not a number"


def why_no_values(weight: Any) -> str | None:
    """Why there is nothing to compute with in a weight, or None."""
    if weight.is_meta:
        return "is on the meta device"
    return "is a fake tensor" if isinstance(weight, FakeTensor) else None


def why_mode() -> str | None:
    """Why PyTorch's functions are not what they are called here, or None.

    Modes see every call, and may answer it themselves: the engine calls others than stock, and what it computes again
    in the backward, it computes outside of a mode that is around the forward only.
    """
    # That of torch.device and torch.set_default_device only chooses where new tensors are.
    if torch._C._len_torch_function_stack():
        for mode in _get_current_function_mode_stack():
            if type(mode) is not DeviceContext:
                return f"{type(mode).__name__} is a mode that sees PyTorch's functions"
    if torch._C._len_torch_dispatch_stack():
        return f"{type(_get_current_dispatch_mode_stack()[-1]).__name__} is a mode that sees PyTorch's operations"
    return None


def attention_function(spec: LayerSpec, config: Any) -> Any:
    """What the family's attention would call for its scores; None where it does not ask the registry, or in vain."""
    module = sys.modules[spec.module]
    registry = module.__dict__.get("ALL_ATTENTION_FUNCTIONS")
    if registry is None:
        return None
    eager = module.__dict__.get("eager_attention_forward")
    # As `get_interface` does, without its warnings and errors.
    return registry.get(config._attn_implementation, eager)


def mask_function(config: Any) -> Any:
    """What the masks of a configuration would be made by, or None."""
    return masking.ALL_MASK_ATTENTION_FUNCTIONS.get(config._attn_implementation)


def why_other_attention(spec: LayerSpec, config: Any) -> str | None:
    """Why the attention function is not one that the engine's kernels stand for, or None."""
    name = config._attn_implementation
    # Flash and flex attention learn of packed documents in ways of their own, not from a mask.
    if name not in ("sdpa", "eager"):
        return f"attn_implementation is {name}, not sdpa or eager"
    masks = mask_function(config)
    if masks is not None:
        if not is_own(masks) or masks.__module__ != masking.__name__:
            return f"the mask function of {name} was replaced"
        if (reason := calls_of_function(masks).reason) is not None:
            return reason
    function = attention_function(spec, config)
    if function is None:
        return None
    where = (_SDPA, "sdpa_attention_forward") if name == "sdpa" else (spec.module, "eager_attention_forward")
    if not is_from(function, *where):
        return f"the attention function {name} was replaced"
    return calls_of_function(function).reason
