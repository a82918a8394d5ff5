"""What the engine can run, asked of the modules as they are now; each answer is a reason for the ledger."""

import functools
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
import transformers.utils.output_capturing as output_capturing
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.loss.loss_utils import ForCausalLMLoss

from fastft.adapters.lora import has_hooks, why_called, why_not_fused
from fastft.engine.watch import CHECKPOINT, has_global_hooks
from fastft.models.identity import (
    is_own,
    why_called_otherwise,
    why_no_linear,
    why_no_number,
    why_no_values,
    why_other_activation,
    why_other_attention,
    why_other_class,
    why_other_functions,
    why_other_list,
    why_other_loss,
    why_own_method,
)
from fastft.models.spec import ACTIVATIONS, LayerSpec

NO_LABELS = "no labels were given"
_OF_CHECKPOINTS = {"use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop"}
"""What says how a layer is run again, and changes no result."""
GLOBAL_HOOKS = "hooks on all modules are registered"


def writes_out(layer: nn.Module, spec: LayerSpec) -> bool:
    """Whether stock's attention is the eager one, which writes its scores out."""
    return bool(attrgetter(spec.attention)(layer).config._attn_implementation == "eager")


def why_no_mask(layer: nn.Module, spec: LayerSpec, mask: torch.Tensor | None, dtype: torch.dtype) -> str | None:
    """Why stock would compute something of its own under this mask, where activations have this dtype, or None."""
    if mask is not None and mask.requires_grad:
        return "the attention mask is to be differentiated"
    if mask is None or not writes_out(layer, spec):
        return None
    if dtype == torch.float64:
        return "stock's eager attention overflows under an fp64 mask"
    if mask.dim() == 4 and mask.dtype == torch.bool:  # ones, where it means to hide
        return "stock's eager attention adds a boolean mask to the scores"
    return None


def is_capturing() -> bool:
    """Whether transformers' hooks collect what layers give, for this model or one around it."""
    return bool(output_capturing._active_collector.get())


def why_no_stack(backbone: nn.Module, layers: Sequence[nn.Module], spec: LayerSpec) -> str | None:
    """Why the layers have to be called one by one, in stock's own loop, or None."""
    reason = why_other_class(backbone, spec.module, spec.backbone_class) or why_other_functions(spec)
    reason = reason or why_own_method(backbone) or why_other_list(getattr(backbone, spec.layers))
    if reason is not None:
        return reason
    rotary = getattr(backbone, spec.rotary_embedding, None)
    if rotary is None:
        return f"{type(backbone).__name__} has no {spec.rotary_embedding}"
    reason = why_other_class(rotary, spec.module, spec.rotary_class) or _why_replaced(rotary)
    if reason is not None:
        return reason
    if getattr(backbone.config, "is_causal", None) not in (None, True):
        return "its configuration says that attention is not causal"
    if has_hooks(rotary):
        return f"{type(rotary).__name__} has hooks"
    if has_global_hooks():
        return GLOBAL_HOOKS
    for index, layer in enumerate(layers):
        if has_hooks(layer):
            return f"layer {index} has hooks"
    return None


def why_no_layer(layer: nn.Module, spec: LayerSpec, index: int) -> str | None:
    """Why the engine cannot run decoder layer number `index`, or None where it can."""
    try:
        return _why_no_layer(layer, spec, index)
    except (AttributeError, IndexError, KeyError) as error:
        return f"it is built otherwise than {spec.layer_class} ({error})"


def _why_no_layer(layer: nn.Module, spec: LayerSpec, index: int) -> str | None:
    reason = why_other_class(layer, spec.module, spec.layer_class) or why_other_functions(spec)
    reason = reason or (GLOBAL_HOOKS if has_global_hooks() else None)
    if reason is not None:
        return reason
    attention, mlp, activation = attrgetter(spec.attention, spec.mlp, spec.activation)(layer)
    reason = (
        why_other_class(attention, spec.module, spec.attention_class)
        or why_other_class(mlp, spec.module, spec.mlp_class)
        or _why_not_configured(layer, spec, index)
    )
    if reason is not None:
        return reason
    for path in spec.norms:
        norm = attrgetter(path)(layer)
        reason = why_no_norm(norm, spec) or why_called(norm)
        if reason is not None:
            return f"{path}: {reason}"
    for path in spec.linears:
        reason = why_not_fused(attrgetter(path)(layer))
        if reason is not None:
            return f"{path.rpartition('.')[2]}: {reason}"
    for module in (attention, mlp, activation):
        reason = why_called(module)
        if reason is not None:
            return f"{type(module).__name__}: {reason}"
    if type(activation).__name__ not in ACTIVATIONS:
        return f"the activation is {type(activation).__name__}, not one of {', '.join(ACTIVATIONS)}"
    if not is_own(type(activation).forward):
        return f"the activation {type(activation).__name__} has another forward"
    reason = why_other_activation(activation)
    if reason is not None:
        return reason
    if hasattr(layer, "_hf_hook"):
        return "accelerate moves it between devices"
    return _why_other_checkpoint(layer)


def _why_other_checkpoint(layer: nn.Module) -> str | None:
    """Why gradient checkpointing of this layer does more than to run it again, or None where it does not."""
    function = layer.__dict__.get(CHECKPOINT)
    if function is None or not getattr(layer, "gradient_checkpointing", False):
        return None
    plain = function.func if isinstance(function, functools.partial) and not function.args else function
    if plain is not checkpoint:
        return f"its gradient checkpointing is {getattr(plain, '__qualname__', type(plain).__name__)}"
    others = set(getattr(function, "keywords", ())) - _OF_CHECKPOINTS
    return f"its gradient checkpointing has {', '.join(sorted(others))}" if others else None


def _why_not_configured(layer: nn.Module, spec: LayerSpec, index: int) -> str | None:
    """Why the engine cannot run a layer of this configuration, before its parts are looked for."""
    attention = attrgetter(spec.attention)(layer)
    config = attention.config
    for name, values, reason in spec.required:
        if getattr(config, name, None) not in values:
            return reason
    for path in spec.dropouts:
        dropout = attrgetter(path)(layer)
        if getattr(dropout, "p", dropout):
            return f"{path.rpartition('.')[2].removesuffix('_dropout')} has dropout"
    for path in filter(None, (spec.scale, spec.softcap, spec.residual_multiplier)):
        other = why_no_number(attrgetter(path)(layer))
        if other is not None:
            return f"its {path.rpartition('.')[2]} is {other}"
    if config.output_attentions:
        return "attention weights are asked for"
    if not (getattr(attention, "is_causal", True) and getattr(config, "is_causal", None) in (None, True)):
        return "attention is not causal"
    if spec.window == "layer" and config.layer_types[index] == "sliding_attention" and not config.sliding_window:
        return "its window has no size"
    if spec.softcap is not None and config._attn_implementation == "sdpa" and attrgetter(spec.softcap)(layer):
        # Some releases of transformers let it through; training would then change with the path.
        return "stock's sdpa leaves out its soft-cap; load it with attn_implementation='eager'"
    return why_other_attention(spec, config)


def why_no_norm(norm: nn.Module, spec: LayerSpec) -> str | None:
    """Why the engine cannot run this norm, or None where it can."""
    reason = why_other_class(norm, spec.norm_module or spec.module, spec.norm_class)
    if reason is not None:
        return reason
    weight = norm._parameters.get("weight")  # a parametrized one would be computed, once more than in stock
    if weight is None:
        return "it has no weight"
    if (reason := why_no_values(weight)) is not None:
        return f"its weight {reason}"
    reason = why_no_number(getattr(norm, "variance_epsilon", getattr(norm, "eps", None)))
    if reason is not None:
        return f"its epsilon is {reason}"
    if weight.requires_grad:
        return "its weight is trained"
    if getattr(getattr(norm, "bias", None), "requires_grad", False):
        return "its bias is trained"
    return None


def why_no_loss(model: Any) -> str | None:
    """Why this model's loss is not the cross-entropy that the engine computes, or None where it is."""
    if model.loss_function is not ForCausalLMLoss:
        return f"its loss function is {getattr(model.loss_function, '__name__', model.loss_function)}"
    return why_other_loss()


def why_no_divisor(items: Any) -> str | None:
    """Why the loss is not the sum over one constant, where `items` is what the trainer counted, or None where it is."""
    if isinstance(items, torch.Tensor) and (items.requires_grad or items.numel() != 1):
        return "num_items_in_batch is to be differentiated" if items.requires_grad else "num_items_in_batch are several"
    return None


def why_other_head(model: nn.Module, head: nn.Module | None) -> str | None:
    """Why `head`, the model's output embeddings, is not what stock's `forward` calls, or None where it is."""
    return None if head is getattr(model, "lm_head", None) else "get_output_embeddings is not its lm_head"


def why_no_head(head: nn.Module | None) -> str | None:
    """Why head and loss cannot run together, or None where they can."""
    if head is None:
        return "the model has no output embeddings"
    if type(head) is not nn.Linear:
        return f"the head is {type(head).__module__}.{type(head).__name__}, not a plain linear layer"
    if (reason := why_no_linear()) is not None:
        return reason
    if (reason := why_no_values(head.weight)) is not None:
        return f"the head {reason}"
    if head.weight.requires_grad:
        return "the head is trained"
    if head.bias is not None:
        return "the head has a bias"
    reason = why_called(head) or (GLOBAL_HOOKS if has_global_hooks() else None)
    return f"the head: {reason}" if reason is not None else None


def _why_replaced(module: nn.Module) -> str | None:
    if "forward" in module.__dict__:
        return f"{type(module).__name__}: its forward was replaced"
    return why_called_otherwise(type(module))


def why_sharded(module: nn.Module) -> str | None:
    """Why another library owns the weights of `module`, or None."""
    kinds = {type(module), *(type(child) for child in module.children())}
    first = next((child for child in module.modules() if isinstance(child, nn.ModuleList) and len(child)), None)
    if first is not None:
        kinds.add(type(first[0]))
    if any("FSDP" in kind.__name__ or "FullyShardedDataParallel" in kind.__name__ for kind in kinds):
        return "its weights are sharded (FSDP)"
    return None
