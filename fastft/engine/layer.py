"""One decoder layer as one autograd function.

The function's arguments are the layer's input and its adapters; the frozen weights come with the `LayerCall`.  The
placement policy decides what is saved; whatever is not saved is computed again from what is.  No policy ever needs
the down projection's output, so it is never recomputed.

Legend: B batch, S sequence, T = B·S tokens, D model, F feed-forward, H query heads, K key/value heads, d head size.
"""

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from fastft.adapters.lora import AdaptedLinear
from fastft.backends import Backend
from fastft.kernels.attention.library import Attention
from fastft.kernels.lora_linear.reference import (
    adapter_gradients,
    input_gradient,
    lora_linear,
    lora_linear_backward,
    low_rank,
    low_rank_gradient,
)
from fastft.plan import Policy


class LayerCall(NamedTuple):
    """Everything about one call of one layer that is not differentiated."""

    ops: Backend
    attention: Attention
    policy: Policy
    input_norm_D: torch.Tensor
    input_eps: float
    mlp_norm_D: torch.Tensor
    mlp_eps: float
    qkv: tuple[AdaptedLinear, AdaptedLinear, AdaptedLinear]
    o: AdaptedLinear
    gate_up: tuple[AdaptedLinear, AdaptedLinear]
    down: AdaptedLinear
    head_dim: int
    scale: float
    cos_Sd: torch.Tensor
    sin_Sd: torch.Tensor
    mask: torch.Tensor | None
    """What attention may see: None for causal, else (B, 1, S, S)."""
    rows_R: torch.Tensor | None
    """Which of the B·S tokens are real, ascending (int64), where the others are right padding and worth leaving out:
    everything but attention then runs on R rows only, and the output of the others is zero.  None for all."""
    seed: int
    """Of the dropout masks; a recomputation draws the same ones."""

    @property
    def linears(self) -> tuple[AdaptedLinear, ...]:
        """The seven linear layers, in the order of the function's adapter arguments."""
        return (*self.qkv, self.o, *self.gate_up, self.down)


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


def decoder_layer(x_BSD: torch.Tensor, call: LayerCall) -> torch.Tensor:
    """The layer's output (B × S × D, dtype of `x_BSD`); differentiable in the input and the adapters."""
    adapters = [matrix for linear in call.linears for matrix in (linear.a, linear.b)]
    output: torch.Tensor = DecoderLayer.apply(x_BSD, call, *adapters)
    return output


class DecoderLayer(torch.autograd.Function):
    """Pre-norm attention and SwiGLU with residuals: y = x₂ + MLP(norm(x₂)), x₂ = x + attention(norm(x))."""

    @staticmethod
    def forward(ctx: Any, x_BSD: torch.Tensor, call: LayerCall, *adapters: torch.Tensor | None) -> torch.Tensor:
        """Compute the output and save what `call.policy` says."""
        # The adapters reach the linears through `call`; as arguments they are what autograd sees.
        with torch.autocast(x_BSD.device.type, enabled=False):
            shape = x_BSD.shape
            x = _pick(x_BSD.reshape(-1, shape[-1]), call.rows_R)
            made, attention_saved = _attention_block(_Activations(x), call, shape)
            made = _gate_up_block(made, call)
            assert made.x2 is not None
            act = call.ops.swiglu(made.gate, made.up)
            (y,), low_down = lora_linear(act, (call.down,), seed=call.seed + _DOWN)
            y.add_(made.x2)
            made = made._replace(act=act, low_down=low_down)
        if any(ctx.needs_input_grad):
            saved = SAVED[call.policy]
            kept = [tensor if name in saved else None for name, tensor in made._asdict().items()]
            ctx.call, ctx.shape = call, shape
            ctx.save_for_backward(*kept, *(attention_saved if "attended" in saved else ()), *adapters)
        return _spread(y, call.rows_R, shape[0] * shape[1]).view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        """Gradients of the input (None where nobody asks) and of each adapter matrix."""
        call: LayerCall = ctx.call
        tensors = ctx.saved_tensors
        fields = len(_Activations._fields)
        made = _Activations(*tensors[:fields])
        attention_saved = tensors[fields : len(tensors) - 2 * len(call.linears)]
        B, S, D = ctx.shape
        dy = _pick(grad_outputs[0].reshape(-1, D), call.rows_R).to(made.x.dtype)
        needs_dx = ctx.needs_input_grad[0]
        del tensors

        if made.x2 is None:
            made, attention_saved = _attention_block(made, call, ctx.shape)
        dx2, mlp_gradients = _mlp_backward(dy, made, call)
        # Freed before attention's backward, where the other large intermediates live.
        made = made._replace(gate=None, up=None, act=None, h2=None)
        dx, attention_gradients = _attention_backward(dx2, made, attention_saved, call, ctx.shape, needs_dx)
        gradients = [*attention_gradients, *mlp_gradients]
        wanted = ctx.needs_input_grad[2:]
        return (
            None if dx is None else _spread(dx, call.rows_R, B * S).view(ctx.shape),
            None,
            *(gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)),
        )


def _attention_block(
    made: _Activations, call: LayerCall, shape: torch.Size
) -> tuple[_Activations, tuple[torch.Tensor, ...]]:
    """From x to x₂ and the MLP's normalised input."""
    B, S, _ = shape
    h1, rstd1 = call.ops.rms_norm(made.x, call.input_norm_D, call.input_eps)
    (q, k, v), low_qkv = lora_linear(h1, call.qkv, seed=call.seed + _QKV)
    for rotated in (q, k):
        call.ops.rope_(rotated.view(rotated.shape[0], -1, call.head_dim), call.cos_Sd, call.sin_Sd)
    per_sequence = (_spread(t, call.rows_R, B * S).view(B, S, -1, call.head_dim) for t in (q, k, v))
    attended, attention_saved = call.attention.forward(*per_sequence, call.mask, call.scale)
    attended = _pick(attended.reshape(B * S, -1), call.rows_R)
    (o,), low_o = lora_linear(attended, (call.o,), seed=call.seed + _O)
    x2, h2, rstd2 = call.ops.add_rms_norm(o, made.x, call.mlp_norm_D, call.mlp_eps)
    made = made._replace(
        rstd1=rstd1, h1=h1, q=q, k=k, v=v, low_qkv=low_qkv, attended=attended, low_o=low_o, x2=x2, rstd2=rstd2, h2=h2
    )
    return made, attention_saved


def _gate_up_block(made: _Activations, call: LayerCall) -> _Activations:
    """From x₂ (or its normalised form, where that is at hand) to gate and up."""
    h2 = made.h2
    if h2 is None:
        h2, _ = call.ops.rms_norm(made.x2, call.mlp_norm_D, call.mlp_eps)
    if made.gate is not None:
        return made._replace(h2=h2)
    (gate, up), low = lora_linear(h2, call.gate_up, seed=call.seed + _GATE_UP)
    return made._replace(h2=h2, gate=gate, up=up, low_gate_up=low)


def _mlp_backward(
    dy: torch.Tensor, made: _Activations, call: LayerCall
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """From dy to dx₂, and the gradients of the adapters of gate, up and down (A, B each)."""
    made = _gate_up_block(made, call)
    down = (call.down,)
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
    gate_up = lora_linear_backward((dgate, dup), made.h2, made.low_gate_up, call.gate_up, seed=call.seed + _GATE_UP)
    del dgate, dup
    dx2 = call.ops.rms_norm_backward(gate_up.dx_TI, made.x2, call.mlp_norm_D, made.rstd2, dy)
    return dx2, _interleave(gate_up.da, gate_up.db) + _interleave(da_down, db_down)


def _attention_backward(
    dx2: torch.Tensor,
    made: _Activations,
    attention_saved: tuple[torch.Tensor, ...],
    call: LayerCall,
    shape: torch.Size,
    needs_dx: bool,
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """From dx₂ to dx, and the gradients of the adapters of q, k, v and o (A, B each)."""
    B, S, _ = shape
    assert made.attended is not None
    o = lora_linear_backward((dx2,), made.attended, made.low_o, (call.o,), seed=call.seed + _O)
    assert o.dx_TI is not None
    dattended, q, k, v, attended = (
        _spread(t, call.rows_R, B * S).view(B, S, -1, call.head_dim)
        for t in (o.dx_TI, made.q, made.k, made.v, made.attended)
        if t is not None
    )
    d_qkv = call.attention.backward(dattended, q, k, v, attended, attention_saved, call.mask, call.scale)
    del dattended, q, k, v, attended
    rows = [_pick(d.reshape(B * S, -1), call.rows_R) for d in d_qkv]
    del d_qkv
    for rotated in rows[:2]:
        call.ops.rope_(rotated.view(rotated.shape[0], -1, call.head_dim), call.cos_Sd, call.sin_Sd, inverse=True)
    h1 = made.h1
    if h1 is None and any(linear.a is not None for linear in call.qkv):
        h1, _ = call.ops.rms_norm(made.x, call.input_norm_D, call.input_eps)
    qkv = lora_linear_backward(
        rows, h1 if h1 is not None else made.x, made.low_qkv, call.qkv, seed=call.seed + _QKV, needs_dx=needs_dx
    )
    gradients = _interleave(qkv.da, qkv.db) + _interleave(o.da, o.db)
    if not needs_dx:
        return None, gradients
    return call.ops.rms_norm_backward(qkv.dx_TI, made.x, call.input_norm_D, made.rstd1, dx2), gradients


def _pick(x_TD: torch.Tensor, rows_R: torch.Tensor | None) -> torch.Tensor:
    """The real tokens' rows (R × D), or all."""
    return x_TD if rows_R is None else x_TD.index_select(0, rows_R)


def _spread(x_RD: torch.Tensor, rows_R: torch.Tensor | None, tokens: int) -> torch.Tensor:
    """The inverse: rows back in their places (T × D), zeros elsewhere."""
    return x_RD if rows_R is None else x_RD.new_zeros(tokens, x_RD.shape[1]).index_copy_(0, rows_R, x_RD)


def _interleave(da: list[torch.Tensor | None], db: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    return [gradient for pair in zip(da, db, strict=True) for gradient in pair]
