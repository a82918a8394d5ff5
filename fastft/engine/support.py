"""What the engine can run, asked of the modules as they are now; each answer is a reason for the ledger."""

from operator import attrgetter

from torch import nn

from fastft.adapters.lora import why_called, why_not_fused
from fastft.models.spec import LayerSpec


def why_no_layer(layer: nn.Module, spec: LayerSpec) -> str | None:
    """Why the engine cannot run this decoder layer, or None where it can."""
    if type(layer).__name__ != spec.layer_class:
        return f"{type(layer).__name__} is not {spec.layer_class}"
    for path in (spec.input_norm, spec.mlp_norm):
        norm = attrgetter(path)(layer)
        reason = why_no_norm(norm, spec) or why_called(norm)
        if reason is not None:
            return f"{path}: {reason}"
    for path in spec.linears:
        reason = why_not_fused(attrgetter(path)(layer))
        if reason is not None:
            return f"{path.rpartition('.')[2]}: {reason}"
    attention, mlp = (attrgetter(path.rpartition(".")[0])(layer) for path in (spec.o, spec.down))
    for module in (attention, mlp, mlp.act_fn):
        reason = why_called(module)
        if reason is not None:
            return f"{type(module).__name__}: {reason}"
    if type(mlp.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
        return f"the activation is {type(mlp.act_fn).__name__}, not SiLU"
    if attention.config.output_attentions:
        return "attention weights are asked for"
    if attention.attention_dropout:
        return "attention has dropout"
    if not (attention.is_causal and getattr(attention.config, "is_causal", True)):
        return "attention is not causal"
    # Flash and flex attention learn of packed documents in ways of their own, not from a mask.
    if attention.config._attn_implementation not in ("sdpa", "eager"):
        return f"attn_implementation is {attention.config._attn_implementation}, not sdpa or eager"
    if hasattr(layer, "_hf_hook"):
        return "accelerate moves it between devices"
    return None


def why_no_norm(norm: nn.Module, spec: LayerSpec) -> str | None:
    """Why the engine cannot run this norm, or None where it can."""
    if type(norm).__name__ != spec.norm_class:
        return f"{type(norm).__name__} is not {spec.norm_class}"
    if getattr(norm.weight, "requires_grad", True):
        return "its weight is trained"
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
