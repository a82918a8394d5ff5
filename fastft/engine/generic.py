"""What runs fused of a model part by part: LoRA linears, RMSNorms, head and loss.

For families without a layer specification this is all there is.  In the others it serves what lies outside the decoder
layers, and the layers that cannot run fused as a whole.

Legend: T tokens, D width of a norm's rows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import signature
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from fastft.adapters.lora import stand_in, why_not_alone
from fastft.backends import load_backend
from fastft.engine.attach import STATE
from fastft.engine.ledger import Ledger
from fastft.engine.linear import LinearState, linear_forward
from fastft.engine.norm import FrozenNorm
from fastft.engine.state import EngineSettings, ModuleState, call_original, why_not_differentiated, why_replaced
from fastft.kernels.norm import Norm, NormKind
from fastft.models.calls import Calls, calls_of
from fastft.models.identity import why_no_values


class Part(NamedTuple):
    """A module that may run fused by itself."""

    module: nn.Module
    name: str
    kind: str
    """linear, norm, or what the engine has nothing for: adapter."""
    reason: str | None
    """Why it cannot run fused now."""
    forward: Callable[..., Any] | None
    """What its `forward` is replaced by; None leaves it."""
    state: ModuleState | None


@dataclass
class NormState(ModuleState):
    """What a patched norm knows."""

    norm_kind: NormKind = "rms"
    forward: Callable[..., Any] | None = None
    """The class's, which was compared with the engine's."""
    calls: Calls | None = None
    """What that reaches."""


def find_parts(model: nn.Module, settings: EngineSettings) -> Iterator[Part]:
    """The adapted linears, other adapters and RMSNorms of a Hugging Face model that is not patched."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    inside: set[nn.Module] = set()
    for path, module in model.named_modules():
        if module in inside:
            continue
        # The name by itself is that of head and loss.
        name = "lm_head.adapter" if path == "lm_head" else path.removeprefix(prefix)
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            inside.update(nn.Module.modules(module))  # type: ignore[arg-type]
            yield _adapter(module, name, settings)  # type: ignore[arg-type]
        elif type(module).__name__.endswith("RMSNorm"):
            yield _norm(module, name, settings)


def decoder_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of what Hugging Face checkpoints as one: its decoder layers, in any family."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for path, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer):
            yield path.removeprefix(prefix), module


def note_part(ledger: Ledger, part: Part, backend: str) -> None:
    """Put a part into the ledger.

    Raises:
        BackendError: the ledger is strict and a linear or a norm cannot run fused.
    """
    if part.reason is None:
        ledger.fused(part.name, part.kind, backend)
    elif part.forward is None:
        ledger.beyond(part.name, part.kind, part.reason)
    else:
        ledger.stock(part.name, part.kind, part.reason)


def _adapter(module: nn.Module, name: str, settings: EngineSettings) -> Part:
    if isinstance(module, AuxiliaryTrainingWrapper):
        return Part(module, name, "adapter", f"{type(module).__name__} trains more than an adapter", None, None)
    base = module.get_base_layer()  # type: ignore[operator]
    reason = why_replaced(module) or why_not_alone(module)
    # The quantization libraries' own linears are no subclasses of PyTorch's.
    if not (isinstance(base, nn.Linear | Conv1D) or "Linear" in type(base).__name__):
        return Part(module, name, "adapter", reason or f"{type(base).__name__} is no linear layer", None, None)
    return Part(module, name, "linear", reason, linear_forward, LinearState(settings, name))


def _norm(module: nn.Module, name: str, settings: EngineSettings) -> Part:
    replaced = why_replaced(module)
    kind = None if replaced else rms_norm_kind(module)
    if kind is None:
        reason = replaced or f"{type(module).__name__} is not the RMSNorm that the engine knows"
        return Part(module, name, "norm", reason, None, None)
    state = NormState(settings, name, norm_kind=kind, forward=type(module).forward, calls=calls_of(type(module)))
    return Part(module, name, "norm", _why_trained(module), rms_norm_forward, state)


@stand_in
def rms_norm_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """An RMSNorm of any family: its input (… × D) to the same shape and dtype."""
    state: ModuleState | None = self.__dict__.get(STATE)
    if state is None or state.settings.is_off:
        return call_original(self, args, kwargs)
    assert isinstance(state, NormState)
    settings = state.settings
    reason = state.replaced or why_not_differentiated() or _why_not_now(self, state, args, kwargs)
    if reason is not None:
        settings.ledger.stock(state.name, "norm", reason)
        return call_original(self, args, kwargs)
    settings.ledger.fused(state.name, "norm", settings.ops.name)
    return FrozenNorm.apply(args[0], _read_norm(self, state.norm_kind), settings.ops)


def rms_norm_kind(module: nn.Module) -> NormKind | None:
    """Which of the engine's RMSNorms this module is; None where it computes something else.

    It is asked for some rows: in fp32 it must agree with the engine's up to the order of summation, and in its weight's
    dtype up to one more rounding, for families differ in where they round.
    """
    weight = module._parameters.get("weight")
    needed = [
        p for p in signature(type(module).forward).parameters.values() if p.default is p.empty and p.name != "self"
    ]
    eps = _epsilon(module)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 1 or weight.is_meta or eps is None:
        return None
    if len([p for p in needed if p.kind is not p.VAR_POSITIONAL and p.kind is not p.VAR_KEYWORD]) != 1:
        return None
    generator = torch.Generator("cpu").manual_seed(0)
    # The last row is so small that epsilon decides.
    sizes = torch.tensor([[1.0], [30.0], [0.1], [eps**0.5]], device="cpu")
    rows_TD = (torch.randn(len(sizes), len(weight), generator=generator, device="cpu") * sizes).to(weight.device)
    kinds: tuple[NormKind, ...] = ("rms", "rms_unit_offset")
    for kind in kinds:
        if all(_agrees(module, rows_TD.to(dtype), kind) for dtype in (torch.float32, weight.dtype)):
            return kind
    return None


def _agrees(module: nn.Module, x_TD: torch.Tensor, kind: NormKind) -> bool:
    with torch.no_grad():
        try:
            # Not called as a module: hooks are somebody's who waits for the model to run.
            theirs_TD = type(module).forward(module, x_TD)
        except (RuntimeError, TypeError, ValueError):
            return False
        ours_TD = FrozenNorm.apply(x_TD, _read_norm(module, kind), load_backend("eager"))
    if not isinstance(theirs_TD, torch.Tensor) or theirs_TD.shape != ours_TD.shape or theirs_TD.dtype != ours_TD.dtype:
        return False
    tolerance = 1e-5 if x_TD.dtype == torch.float32 else 2 * torch.finfo(x_TD.dtype).eps
    return torch.allclose(ours_TD.float(), theirs_TD.float(), rtol=tolerance, atol=1e-7)


def _read_norm(module: nn.Module, kind: NormKind) -> Norm:
    weight_D, eps = module.weight, _epsilon(module)
    assert isinstance(weight_D, torch.Tensor)
    assert eps is not None
    return Norm(kind, weight_D, None, eps)


def _epsilon(module: nn.Module) -> float | None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return eps if isinstance(eps, float) else None


def _why_not_now(module: nn.Module, state: NormState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    if type(module).forward is not state.forward:
        return "its class has another forward than when it was patched"
    if state.calls is None or not state.calls.hold() or not state.calls.methods.isdisjoint(module.__dict__):
        return "its forward calls others than when it was patched"
    if len(args) != 1 or kwargs:
        return f"it was given {', '.join(kwargs) or 'more than its input'}"
    if _epsilon(module) is None:
        return "its epsilon is no number"
    x, weight = args[0], module._parameters.get("weight")
    if weight is not None and x.dtype != weight.dtype:
        return f"its weight is {weight.dtype}, its input {x.dtype}"
    return _why_trained(module)


def _why_trained(module: nn.Module) -> str | None:
    weight = module._parameters.get("weight")
    if weight is None:  # a parametrized one is not to be computed more often than in stock
        return "it has no weight of its own"
    if (reason := why_no_values(weight)) is not None:
        return f"its weight {reason}"
    return "its weight is trained" if weight.requires_grad else None
