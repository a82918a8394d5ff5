"""What the engine can run, asked of the modules as they are now; each answer is a reason for the ledger."""

from operator import attrgetter

from torch import nn

from fastft.adapters.lora import has_hooks, why_not_fused
from fastft.models.spec import LayerSpec


def why_no_layer(layer: nn.Module, spec: LayerSpec) -> str | None:
    """Why the engine cannot run this decoder layer, or None where it can."""
    if type(layer).__name__ != spec.layer_class:
        return f"{type(layer).__name__} is not {spec.layer_class}"
    for path in (spec.input_norm, spec.mlp_norm):
        reason = why_no_norm(attrgetter(path)(layer), spec)
        if reason is not None:
            return f"{path}: {reason}"
    for path in spec.linears:
        reason = why_not_fused(attrgetter(path)(layer))
        if reason is not None:
            return f"{path.rpartition('.')[2]}: {reason}"
    for path in {spec.o.rpartition(".")[0], spec.down.rpartition(".")[0]}:
        if has_hooks(attrgetter(path)(layer)):
            return f"{path}: it has hooks"
    activation = type(getattr(attrgetter(spec.down.rpartition(".")[0])(layer), "act_fn", None)).__name__
    if activation not in ("SiLU", "SiLUActivation"):
        return f"the activation is {activation}, not SiLU"
    if getattr(attrgetter(spec.o.rpartition(".")[0])(layer), "attention_dropout", 0.0):
        return "attention has dropout"
    if hasattr(layer, "_hf_hook"):
        return "accelerate moves it between devices"
    return None


def why_no_norm(norm: nn.Module, spec: LayerSpec) -> str | None:
    """Why the engine cannot run this norm, or None where it can."""
    if type(norm).__name__ != spec.norm_class:
        return f"{type(norm).__name__} is not {spec.norm_class}"
    if getattr(norm.weight, "requires_grad", True):
        return "its weight is trained"
    if has_hooks(norm):
        return "it has hooks"
    return None


def why_no_head(head: nn.Module | None) -> str | None:
    """Why head and loss cannot run together, or None where they can."""
    if head is None:
        return "the model has no output embeddings"
    if type(head) is not nn.Linear:
        return f"the head is {type(head).__name__}, not a plain linear layer"
    if head.weight.requires_grad:
        return "the head is trained"
    if head.bias is not None:
        return "the head has a bias"
    if has_hooks(head):
        return "the head has hooks"
    return None
