"""What the engine can run, asked of the modules as they are now; each answer is a reason for the ledger."""

from operator import attrgetter
from typing import Any

from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from fastft.adapters.lora import why_called, why_not_fused
from fastft.models.spec import ACTIVATIONS, LayerSpec


def why_no_layer(layer: nn.Module, spec: LayerSpec) -> str | None:
    """Why the engine cannot run this decoder layer, or None where it can."""
    if type(layer).__name__ != spec.layer_class:
        return f"{type(layer).__name__} is not {spec.layer_class}"
    reason = _why_not_configured(layer, spec)
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
    attention, mlp, activation = attrgetter(spec.attention, spec.mlp, spec.activation)(layer)
    for module in (attention, mlp, activation):
        reason = why_called(module)
        if reason is not None:
            return f"{type(module).__name__}: {reason}"
    if type(activation).__name__ not in ACTIVATIONS:
        return f"the activation is {type(activation).__name__}, not one of {', '.join(ACTIVATIONS)}"
    if attention.config.output_attentions:
        return "attention weights are asked for"
    if not (attention.is_causal and getattr(attention.config, "is_causal", True)):
        return "attention is not causal"
    # Flash and flex attention learn of packed documents in ways of their own, not from a mask.
    if attention.config._attn_implementation not in ("sdpa", "eager"):
        return f"attn_implementation is {attention.config._attn_implementation}, not sdpa or eager"
    if spec.softcap is not None and attention.config._attn_implementation == "sdpa" and attrgetter(spec.softcap)(layer):
        # Some releases of transformers let it through; training would then change with the path.
        return "stock's sdpa leaves out its soft-cap; load it with attn_implementation='eager'"
    if hasattr(layer, "_hf_hook"):
        return "accelerate moves it between devices"
    return None


def _why_not_configured(layer: nn.Module, spec: LayerSpec) -> str | None:
    """Why the engine cannot run a layer of this configuration, before its parts are looked for."""
    config = attrgetter(spec.attention)(layer).config
    for name, value, reason in spec.required:
        if getattr(config, name) != value:
            return reason
    for path in spec.dropouts:
        dropout = attrgetter(path)(layer)
        if getattr(dropout, "p", dropout):
            return f"{path.rpartition('.')[2].removesuffix('_dropout')} has dropout"
    return None


def why_no_norm(norm: nn.Module, spec: LayerSpec) -> str | None:
    """Why the engine cannot run this norm, or None where it can."""
    if type(norm).__name__ != spec.norm_class:
        return f"{type(norm).__name__} is not {spec.norm_class}"
    if getattr(norm.weight, "requires_grad", True):
        return "its weight is trained"
    if getattr(getattr(norm, "bias", None), "requires_grad", False):
        return "its bias is trained"
    return None


def why_no_loss(model: Any) -> str | None:
    """Why this model's loss is not the cross-entropy that the engine computes, or None where it is."""
    if model.loss_function is not ForCausalLMLoss:
        return f"its loss function is {getattr(model.loss_function, '__name__', model.loss_function)}"
    return None


def why_no_head(head: nn.Module | None) -> str | None:
    """Why head and loss cannot run together, or None where they can."""
    if head is None:
        return "the model has no output embeddings"
    if type(head) is not nn.Linear:
        return f"the head is {type(head).__module__}.{type(head).__name__}, not a plain linear layer"
    if head.weight.requires_grad:
        return "the head is trained"
    if head.bias is not None:
        return "the head has a bias"
    reason = why_called(head)
    return f"the head: {reason}" if reason is not None else None
