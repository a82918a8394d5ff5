"""One decoder layer, forward and backward, written by hand over the backend's operations.

The placement policy decides what is saved; whatever is not saved is computed again from what is.  No policy ever needs
the down projection's output, so it is never recomputed.  `fastft.engine.stack` makes autograd call these functions.

Legend: B batch, S sequence, T tokens (B·S, or the R real ones where padding is left out), D model, F feed-forward,
H query heads, K key/value heads, d head size.
"""

from typing import NamedTuple

import torch

from fastft.engine.parts import LayerCall, StepContext
from fastft.kernels.lora_linear.reference import (
    adapter_gradients,
    input_gradient,
    lora_linear,
    lora_linear_backward,
    low_rank,
    low_rank_gradient,
)
from fastft.plan import Policy

# Dropout seeds of the groups must not meet: group g uses seed + position in the layer.
_QKV, _O, _GATE_UP, _DOWN = 0, 3, 4, 6


class _Activations(NamedTuple):
    """The intermediates of one layer; None where the policy did not save one."""

    x: torch.Tensor
    rstd1: torch.Tensor | None = None
    h1: torch.Tensor | None = None
    q: torch.Tensor | None = None
    k: torch.Tensor | None = None
    v: torch.Tensor | None = None
    low_qkv: torch.Tensor | None = None
    attended: torch.Tensor | None = None
    low_o: torch.Tensor | None = None
    x2: torch.Tensor | None = None
    rstd2: torch.Tensor | None = None
    h2: torch.Tensor | None = None
    gate: torch.Tensor | None = None
    up: torch.Tensor | None = None
    low_gate_up: torch.Tensor | None = None
    act: torch.Tensor | None = None
    low_down: torch.Tensor | None = None


_FULL = frozenset({"x"})
_MLP = _FULL | {"rstd1", "q", "k", "v", "low_qkv", "attended", "low_o", "x2", "rstd2"}
_LIGHT = _MLP | {"gate", "up", "low_gate_up", "low_down"}
_KEEP = frozenset(_Activations._fields)
SAVED: dict[Policy, frozenset[str]] = {"keep": _KEEP, "light": _LIGHT, "mlp": _MLP, "full": _FULL}
"""Which intermediates each policy saves.  Attention's own statistics go with `attended`."""


class Saved(NamedTuple):
    """What one layer keeps for its backward."""

    made: _Activations
    attention: tuple[torch.Tensor, ...]
    """Attention's own statistics."""


def forward_layer(x_TD: torch.Tensor, call: LayerCall) -> tuple[torch.Tensor, Saved]:
    """The layer's output (T × D, dtype of `x_TD`), and what `call.policy` saves.

    Pre-norm attention and SwiGLU with residuals: y = x₂ + MLP(norm(x₂)), x₂ = x + attention(norm(x)).
    """
    made, attention_saved = _attention_block(_Activations(x_TD), call)
    made = _gate_up_block(made, call)
    assert made.x2 is not None
    act = call.ops.swiglu(made.gate, made.up)
    (y,), low_down = lora_linear(act, (call.parts.down,), seed=call.seed + _DOWN)
    y.add_(made.x2)
    made = made._replace(act=act, low_down=low_down)
    saved = SAVED[call.policy]
    kept = _Activations(*(t if name in saved else None for name, t in made._asdict().items()))  # type: ignore[arg-type]
    return y, Saved(kept, attention_saved if "attended" in saved else ())


def backward_layer(
    dy_TD: torch.Tensor, saved: Saved, call: LayerCall, *, needs_dx: bool
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """The gradients of the layer's input (T × D; None unless `needs_dx`) and of `call.parts.adapters`."""
    made, attention_saved = saved
    if made.x2 is None:
        made, attention_saved = _attention_block(made, call)
    dx2, mlp_gradients = _mlp_backward(dy_TD, made, call)
    # Freed before attention's backward, where the other large intermediates live.
    made = made._replace(gate=None, up=None, act=None, h2=None)
    del saved
    dx, attention_gradients = _attention_backward(dx2, made, attention_saved, call, needs_dx)
    return dx, [*attention_gradients, *mlp_gradients]


def _attention_block(made: _Activations, call: LayerCall) -> tuple[_Activations, tuple[torch.Tensor, ...]]:
    """From x to x₂ and the MLP's normalised input."""
    parts, context = call.parts, call.context
    h1, rstd1 = call.ops.rms_norm(made.x, parts.input_norm_D, parts.input_eps)
    (q, k, v), low_qkv = lora_linear(h1, parts.qkv, seed=call.seed + _QKV)
    for rotated in (q, k):
        call.ops.rope_(_heads(rotated, parts.head_dim), context.cos_Sd, context.sin_Sd)
    per_sequence = (_per_sequence(t, context, parts.head_dim) for t in (q, k, v))
    attended, attention_saved = context.attention.forward(*per_sequence, context.seen, parts.scale)
    attended = pick_rows(attended.flatten(0, 1).flatten(1), context.rows_R)
    (o,), low_o = lora_linear(attended, (parts.o,), seed=call.seed + _O)
    x2, h2, rstd2 = call.ops.add_rms_norm(o, made.x, parts.mlp_norm_D, parts.mlp_eps)
    made = made._replace(
        rstd1=rstd1, h1=h1, q=q, k=k, v=v, low_qkv=low_qkv, attended=attended, low_o=low_o, x2=x2, rstd2=rstd2, h2=h2
    )
    return made, attention_saved


def _gate_up_block(made: _Activations, call: LayerCall) -> _Activations:
    """From x₂ (or its normalised form, where that is at hand) to gate and up."""
    h2 = made.h2
    if h2 is None:
        h2, _ = call.ops.rms_norm(made.x2, call.parts.mlp_norm_D, call.parts.mlp_eps)
    if made.gate is not None:
        return made._replace(h2=h2)
    (gate, up), low = lora_linear(h2, call.parts.gate_up, seed=call.seed + _GATE_UP)
    return made._replace(h2=h2, gate=gate, up=up, low_gate_up=low)


def _mlp_backward(
    dy: torch.Tensor, made: _Activations, call: LayerCall
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """From dy to dx₂, and the gradients of the adapters of gate, up and down (A, B each)."""
    made = _gate_up_block(made, call)
    down = (call.parts.down,)
    seed = call.seed + _DOWN
    dlow_down = low_rank_gradient((dy,), down)
    dact = input_gradient((dy,), dlow_down, down, seed=seed)
    dgate, dup, act = call.ops.swiglu_backward(dact, made.gate, made.up)
    del dact
    low_down = made.low_down
    if low_down is None:
        low_down = low_rank(act, down, seed)
    da_down, db_down = adapter_gradients((dy,), dlow_down, act, low_down, down, seed=seed)
    del act
    assert made.h2 is not None
    gate_up = lora_linear_backward(
        (dgate, dup), made.h2, made.low_gate_up, call.parts.gate_up, seed=call.seed + _GATE_UP
    )
    del dgate, dup
    dx2 = call.ops.rms_norm_backward(gate_up.dx_TI, made.x2, call.parts.mlp_norm_D, made.rstd2, dy)
    return dx2, _interleave(gate_up.da, gate_up.db) + _interleave(da_down, db_down)


def _attention_backward(
    dx2: torch.Tensor, made: _Activations, attention_saved: tuple[torch.Tensor, ...], call: LayerCall, needs_dx: bool
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """From dx₂ to dx, and the gradients of the adapters of q, k, v and o (A, B each)."""
    parts, context = call.parts, call.context
    assert made.attended is not None
    o = lora_linear_backward((dx2,), made.attended, made.low_o, (parts.o,), seed=call.seed + _O)
    assert o.dx_TI is not None
    dattended, q, k, v, attended = (
        _per_sequence(t, context, parts.head_dim)
        for t in (o.dx_TI, made.q, made.k, made.v, made.attended)
        if t is not None
    )
    d_qkv = context.attention.backward(dattended, q, k, v, attended, attention_saved, context.seen, parts.scale)
    del dattended, q, k, v, attended
    rows = [pick_rows(d.flatten(0, 1).flatten(1), context.rows_R) for d in d_qkv]
    del d_qkv
    for rotated in rows[:2]:
        call.ops.rope_(_heads(rotated, parts.head_dim), context.cos_Sd, context.sin_Sd, inverse=True)
    h1 = made.h1
    if h1 is None and any(linear.a is not None for linear in parts.qkv):
        h1, _ = call.ops.rms_norm(made.x, parts.input_norm_D, parts.input_eps)
    qkv = lora_linear_backward(
        rows, h1 if h1 is not None else made.x, made.low_qkv, parts.qkv, seed=call.seed + _QKV, needs_dx=needs_dx
    )
    gradients = _interleave(qkv.da, qkv.db) + _interleave(o.da, o.db)
    if not needs_dx:
        return None, gradients
    return call.ops.rms_norm_backward(qkv.dx_TI, made.x, parts.input_norm_D, made.rstd1, dx2), gradients


def pick_rows(x_TD: torch.Tensor, rows_R: torch.Tensor | None) -> torch.Tensor:
    """The real tokens' rows (R × D), or all."""
    return x_TD if rows_R is None else x_TD.index_select(0, rows_R)


def spread_rows(x_RD: torch.Tensor, rows_R: torch.Tensor | None, tokens: int) -> torch.Tensor:
    """The inverse: rows back in their places (`tokens` × D), zeros elsewhere."""
    return x_RD if rows_R is None else x_RD.new_zeros(tokens, x_RD.shape[1]).index_copy_(0, rows_R, x_RD)


def _heads(x_TD: torch.Tensor, head_dim: int) -> torch.Tensor:
    return x_TD.view(x_TD.shape[0], -1, head_dim)


def _per_sequence(x_TD: torch.Tensor, context: StepContext, head_dim: int) -> torch.Tensor:
    """(T × heads·d) as (B, S, heads, d), with padding back in its place."""
    tokens = context.tokens
    return spread_rows(x_TD, context.rows_R, tokens).view(context.batch, tokens // context.batch, -1, head_dim)


def _interleave(da: list[torch.Tensor | None], db: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    return [gradient for pair in zip(da, db, strict=True) for gradient in pair]
