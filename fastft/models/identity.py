"""Whether the code that stock would run is the code that the engine was written against.

A module runs fused only if the functions that a call of it would reach are the libraries' own: by where their code was
compiled, not by what they are called.  A subclass with another `forward`, a class that somebody gave another one, a
kernel library's replacement, an attention function registered under an old name: all of them differ here.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastft.models.spec import LayerSpec

_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")

_BUILT_IN: tuple[tuple[Any, str, Any], ...] = (
    (F, "linear", torch._C._nn.linear),
    (F, "gelu", torch._C._nn.gelu),
    (F, "scaled_dot_product_attention", torch._C._nn.scaled_dot_product_attention),
)
"""Functions of PyTorch without Python code that layers call by name."""
_CALLED_IN_PYTHON = (
    (F, "silu"), (F, "softmax"), (F, "dropout"), (F, "embedding"), (F, "layer_norm"),
    (nn.Module, "__call__"), (nn.Module, "_call_impl"), (nn.Module, "__getattr__"),
)  # fmt: skip
_OF_THE_MODULE = ("apply_rotary_pos_emb", "rotate_half", "eager_attention_forward", "repeat_kv")
_OF_MASKS = ("create_causal_mask", "create_sliding_window_causal_mask")
_SDPA = "transformers.integrations.sdpa_attention"

Bound = tuple[Any, str, Any]
"""An object, the name of an attribute, and what it was: what a `Watch` compares."""


def is_from(function: Any, module: str, qualified_name: str) -> bool:
    """Whether a function, below what decorators of the same libraries put around it, is the one that `module` defines
    under this name."""
    code = _code_below(function)
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
        if not _is_library(getattr(kind, name)):
            return f"{kind.__module__}.{kind.__qualname__} has a {name} of its own"
    return None


def why_no_linear() -> str | None:
    """Why a linear layer's call would not be PyTorch's matrix product, or None."""
    if not is_own(nn.Linear.forward):
        return "nn.Linear has another forward"
    return None if F.linear is torch._C._nn.linear else "torch.nn.functional.linear was replaced"


def called_functions(spec: LayerSpec) -> Iterator[Bound]:
    """The functions that a family's `forward`s call by a global name, with what stands there now."""
    module = sys.modules[spec.module]
    for name in (*_OF_THE_MODULE, *_OF_MASKS):
        if name in module.__dict__:
            yield module, name, module.__dict__[name]
    for holder, name in _CALLED_IN_PYTHON:
        yield holder, name, getattr(holder, name)
    for holder, name, _ in _BUILT_IN:
        yield holder, name, getattr(holder, name)


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
    for holder, name in _CALLED_IN_PYTHON:
        if not _is_library(getattr(holder, name)):
            return f"{holder.__name__}.{name} was replaced"
    for holder, name, original in _BUILT_IN:
        if getattr(holder, name) is not original:
            return f"{holder.__name__}.{name} was replaced"
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


def why_other_attention(spec: LayerSpec, config: Any) -> str | None:
    """Why the attention function is not one that the engine's kernels stand for, or None."""
    name = config._attn_implementation
    # Flash and flex attention learn of packed documents in ways of their own, not from a mask.
    if name not in ("sdpa", "eager"):
        return f"attn_implementation is {name}, not sdpa or eager"
    function = attention_function(spec, config)
    if function is None:
        return None
    where = (_SDPA, "sdpa_attention_forward") if name == "sdpa" else (spec.module, "eager_attention_forward")
    return None if is_from(function, *where) else f"the attention function {name} was replaced"


def _code_below(function: Any) -> CodeType | None:
    """The code of the innermost function below decorators, if it and they are all of the libraries."""
    while True:
        function = getattr(function, "__func__", function)
        if not isinstance(function, FunctionType) or not _is_in_library(function.__code__):
            return None
        inner: Any = getattr(function, "__wrapped__", None)
        if inner is None:
            return function.__code__
        function = inner


def _is_library(function: Callable[..., Any]) -> bool:
    return _code_below(function) is not None


def _is_in_library(code: CodeType) -> bool:
    return code.co_filename.startswith(_folders())


_known_folders: dict[str, str] = {}


def _folders() -> tuple[str, ...]:
    """The folders of the libraries that are imported."""
    for name in _LIBRARIES:
        module: ModuleType | None = sys.modules.get(name)
        if name not in _known_folders and module is not None and module.__file__ is not None:
            _known_folders[name] = f"{Path(module.__file__).parent}/"
    return tuple(_known_folders.values())
