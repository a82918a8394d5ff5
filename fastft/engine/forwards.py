"""What a decoder layer runs when stock's own loop calls it: the engine's layer by itself, or stock's.

The whole stack at once is `backbone.py`.
"""

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastft.engine.attach import STATE
from fastft.engine.context import context_of, why_other_kernel
from fastft.engine.inputs import UNSEEN, Captured, owned, read_by_layer
from fastft.engine.parts import LayerCall, LayerParts, read_parts
from fastft.engine.precision import compute_dtype, why_mixed
from fastft.engine.runs import Run
from fastft.engine.stack import run_layers
from fastft.engine.state import (
    EngineSettings,
    ModuleState,
    backward_chunk_of,
    call_original,
    policy_of,
    why_not_differentiated,
)
from fastft.engine.support import why_no_layer, why_no_mask, writes_out
from fastft.kernels.attention.library import Seen
from fastft.models.kv_cache import KV_CACHE
from fastft.plan import keeps_input_only

_KNOWN = UNSEEN | {
    "hidden_states", "attention_mask", "position_embeddings", "position_ids", "use_cache", "is_causal",
    "output_attentions", "output_hidden_states",
}  # fmt: skip
"""Arguments that a fused layer reads, that change nothing in a layer of a known family, or are asked for by name."""


def layer_forward(self: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """A decoder layer: `hidden_states` (B × S × D) to the same, in a tuple where the family's layers return one."""
    state: ModuleState | None = self.__dict__.get(STATE)
    settings = None if state is None else state.settings
    if settings is not None and settings.captured is not None:
        settings.captured.take(Captured(hidden_states, kwargs.get("attention_mask"), kwargs["position_embeddings"]))
        return (hidden_states, None) if settings.spec.returns_tuple else hidden_states
    if state is None or settings is None or settings.why_stock is not None:
        return call_original(self, (hidden_states, *args), kwargs)
    # Where nothing is differentiated all is stock's, but for dropout: a reentrant checkpoint runs its first forward so,
    # and the second has to draw the same mask.
    if settings.is_off and not (self.training and settings.reading.may_drop):
        return call_original(self, (hidden_states, *args), kwargs)
    parts, reason = None, state.replaced or why_not_differentiated()
    if reason is None:
        parts, reason = _read(self, state)
    reason = reason or _why_not_now(self, settings, hidden_states, args, kwargs)
    if parts is None or reason is not None:
        assert reason is not None
        if torch.is_grad_enabled():
            settings.ledger.stock(state.name, "decoder_layer", reason)
        return _stock(self, state, hidden_states, args, kwargs)
    settings.ledger.fused(state.name, "decoder_layer", settings.ops.name)
    y_BSD = _fused(self, state, parts, hidden_states, kwargs)
    return (y_BSD, None) if settings.spec.returns_tuple else y_BSD


def _fused(
    layer: nn.Module, state: ModuleState, parts: LayerParts, hidden_BSD: torch.Tensor, kwargs: dict[str, Any]
) -> torch.Tensor:
    settings = state.settings
    mask = kwargs.get("attention_mask")
    written_out = mask is not None and writes_out(layer, settings.spec)
    seen = Seen(mask, parts.window, parts.softcap, written_out=written_out)
    dtype = compute_dtype(hidden_BSD)
    parts = parts.computing_in(dtype)
    context = context_of(settings, hidden_BSD, seen, kwargs["position_embeddings"], parts.head_dim, dtype)
    other = why_other_kernel(settings, context)
    if other is not None:
        settings.ledger.replaced(f"{state.name}.attention", "attention", context.attention.name, other)
    else:
        settings.ledger.paths.pop(f"{state.name}.attention", None)
    seed = int(torch.randint(2**62, (), device="cpu").item()) if parts.has_dropout else 0
    chunks = settings.mlp_chunk_tokens, backward_chunk_of(layer)
    call = LayerCall(settings.ops, parts, context, policy_of(layer), seed, *chunks)
    adapted = any(matrix is not None for matrix in parts.adapters)
    if adapted and torch.is_grad_enabled():
        hidden_BSD = owned(hidden_BSD)
    return run_layers(hidden_BSD, Run((call,), frozen=[parts.frozen]))


def _stock(
    layer: nn.Module, state: ModuleState, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Stock's layer; it honours the placement in its own way."""
    has_cache = kwargs.get(KV_CACHE) is not None or kwargs.get("layer_past") is not None
    chosen = state.settings.placement_is_fixed and keeps_input_only(policy_of(layer))
    if chosen and layer.training and not has_cache and not args:  # a cache must not be written twice

        def again(x: torch.Tensor) -> Any:
            return call_original(layer, (x,), kwargs)

        return checkpoint(again, hidden, use_reentrant=False)
    return call_original(layer, (hidden, *args), kwargs)


def _read(layer: nn.Module, state: ModuleState) -> tuple[LayerParts | None, str | None]:
    """The layer's parts as they are now, or why it cannot run fused."""
    settings = state.settings
    known = settings.reading.of(layer)
    if known is not None:
        return known
    reason = why_no_layer(layer, settings.spec, state.index)
    return (read_parts(layer, settings.spec, state.index) if reason is None else None), reason


def _why_not_now(
    layer: nn.Module, settings: EngineSettings, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str | None:
    if args:
        return "it was given more than hidden states by position"
    if kwargs.get("output_attentions"):
        return "attention weights are asked for"
    if kwargs.get(KV_CACHE) is not None or kwargs.get("layer_past") is not None:
        return "a key/value cache is in use"
    angles = kwargs.get("position_embeddings")
    if angles is None:
        return "no position embeddings were passed"
    if kwargs.get("is_causal") not in (None, True):
        return "attention was given is_causal"
    others = [name for name, value in kwargs.items() if value is not None and name not in _KNOWN]
    if others:
        read = read_by_layer(layer, settings.spec)
        for name in others:
            if name in read:
                return f"it was given {name}"
    B, S, _ = hidden.shape
    mask = kwargs.get("attention_mask")
    if mask is not None and not (
        isinstance(mask, torch.Tensor) and mask.dim() == 4 and mask.shape[0] in (1, B) and mask.shape[1:] == (1, S, S)
    ):
        return f"the attention mask is a {type(mask).__name__} of another kind than B × 1 × S × S"
    reason = why_no_mask(layer, settings.spec, mask, hidden.dtype)
    if reason is not None:
        return reason
    if any(t.shape[0] not in (1, B) or t.shape[-2] != S for t in angles):
        return "positions have another shape than the hidden states"
    if any(t.requires_grad for t in angles):
        return "positions are to be differentiated"
    # A variant of the family may have other norms; then `why_no_layer` has the reason.
    norm = getattr(layer, settings.spec.input_norm, None)
    weight = norm._parameters.get("weight") if isinstance(norm, nn.Module) else None
    return why_mixed(hidden.dtype, hidden if weight is None else weight)
