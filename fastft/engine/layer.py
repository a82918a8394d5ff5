"""One decoder layer, forward and backward, written by hand over the backend's operations.

The placement policy decides what is saved; whatever is not saved is computed again from what is.  No policy needs the
down projection's output, so it is never recomputed, unless a norm stands behind it or its adapter reads it (DoRA).
`fastft.engine.stack` makes autograd call these functions.  What a family's layer looks like is data
(`fastft.models.spec`).

Legend: B batch, S sequence, T tokens (B·S, or the R real ones where padding is left out), D model, F feed-forward,
H query heads, K key/value heads, d head size.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastft.engine.dropped import dropped_of
from fastft.engine.parts import LayerCall, StepContext
from fastft.engine.saved import SAVED, Activations, Saved
from fastft.engine.tiles import backward_in_tiles, in_tiles
from fastft.engine.variants import by_linear, halves, of_variants, output_products, resolved, with_term
from fastft.kernels.lora_linear import AdapterTerm
from fastft.kernels.lora_linear.reference import (
    ScaledInput,
    a_gradients,
    adapter_terms,
    b_gradients,
    input_gradient,
    lora_linear,
    lora_linear_backward,
    low_rank_gradient,
)
from fastft.kernels.norm import Norm

# Dropout seeds of the groups must not meet: group g uses seed + position in the layer.
_QKV, _O, _GATE_UP, _DOWN = 0, 3, 4, 6


def forward_layer(x_TD: torch.Tensor, call: LayerCall) -> tuple[torch.Tensor, Saved]:
    """The layer's output (T × D, dtype of `x_TD`), and what `call.policy` saves."""
    call, kept_of_variants = resolved(call, x_TD.dtype)
    made, attention_saved = _attention_block(Activations(x_TD), call)
    made, y = in_tiles(_mlp_block, made, call)
    saved = _saved_names(call, x_TD.dtype)
    kept = Activations(*(t if name in saved else None for name, t in made._asdict().items()))  # type: ignore[arg-type]
    return y, Saved(kept, attention_saved if "attended" in saved else (), kept_of_variants)


def backward_layer(
    dy_TD: torch.Tensor, saved: Saved, call: LayerCall, *, needs_dx: bool, overwrite: bool = False
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """The gradients of the layer's input (T × D; None unless `needs_dx`) and of `call.parts.adapters`.

    With `overwrite`, what was saved may be overwritten: this backward is its last.
    """
    made, attention_saved, kept_of_variants = saved
    if call.backward_chunk_tokens is not None and len(dy_TD) <= 2 * call.backward_chunk_tokens:
        # More than two tiles cost launches for which the host has no time, and the peak is elsewhere then.
        call = call._replace(mlp_chunk_tokens=call.backward_chunk_tokens)
    given, (call, _) = call, resolved(call, made.x.dtype, kept_of_variants)
    if made.attended is None:
        made, attention_saved = _attention_block(made, call)
    elif made.x2 is None and call.parts.mlp_norm is not None:
        made = _residual_block(made, made.o, call)
    if call.mlp_chunk_tokens is not None and _scales(call.parts.mlp_norm, dy_TD.dtype):
        made = made._replace(h2=None)  # tile by tile again, so that the whole need not be there
    dx2, dh1, mlp_gradients = backward_in_tiles(_mlp_backward, dy_TD, made, call, overwrite)
    # Freed before attention's backward, where the other large intermediates live; and handed over, so that it can free
    # them in turn.
    rest = [made._replace(x2=None, gate=None, up=None, h2=None, down=None)]
    del saved, made, dy_TD
    dx, attention_gradients = _attention_backward(dx2, dh1, rest.pop(), attention_saved, call, needs_dx)
    gradients = [*attention_gradients, *mlp_gradients]
    return dx, of_variants(given, call, gradients) if given.parts.has_variants else gradients


def _saved_names(call: LayerCall, dtype: torch.dtype) -> frozenset[str]:
    """What is saved of this layer: of what a norm takes and what it gives, only the one, unless all is kept."""
    names, parts = SAVED[call.policy], call.parts
    if _scales(parts.input_norm, dtype):
        names -= {"h1"}
    if _scales(parts.mlp_norm, dtype):
        names -= {"h2"}
    if call.policy == "keep":
        return names
    if _keeps_q_and_k(call):
        names -= {"q", "k"}
    if _keeps_o(call) or parts.mlp_norm is None:
        names -= {"x2", "rstd2"}
    return names


def _attention_block(made: Activations, call: LayerCall) -> tuple[Activations, tuple[torch.Tensor, ...]]:
    """From x to x₂ and the MLP's normalised input."""
    parts, context = call.parts, call.context
    h1, rstd1 = call.ops.normalise(made.x, parts.input_norm)
    left_out = (0, 1) if _rotation_adds(call) else ()
    dropped = dropped_of(h1, parts.qkv, _QKV, call, made.low_qkv)
    outputs, low_qkv = lora_linear(h1, parts.qkv, dropped=dropped, low_TR=made.low_qkv, left_out=left_out)
    del dropped
    # Those of a packed linear are views of its output.
    q, k, v = outputs if len(outputs) == 3 else outputs[0].split(parts.qkv_columns, dim=1)
    read_again = parts.mlp_norm is None or not _scales(parts.input_norm, made.x.dtype)
    made = made._replace(rstd1=rstd1, h1=h1 if read_again else None, v=v, low_qkv=low_qkv)
    del h1, outputs
    made = _heads_block(made, q, k, call)
    assert made.q is not None
    assert made.k is not None
    assert context.seen.softcap == parts.softcap, "the context is of another layer"
    per_sequence = (_per_sequence(t, context, parts.head_dim) for t in (made.q, made.k, v))
    attended, attention_saved = context.attention.forward(*per_sequence, context.seen, parts.scale)
    attended = pick_rows(attended.flatten(0, 1).flatten(1), context.rows_R)
    dropped = dropped_of(attended, (parts.o,), _O, call, made.low_o)
    (o,), low_o = lora_linear(attended, (parts.o,), dropped=dropped, low_TR=made.low_o)
    return _residual_block(made._replace(attended=attended, low_o=low_o), o, call), attention_saved


def _heads_block(made: Activations, q: torch.Tensor | None, k: torch.Tensor | None, call: LayerCall) -> Activations:
    """From the projections to the queries and keys that attention takes; in their place, unless they are kept."""
    assert q is not None
    assert k is not None
    if _keeps_q_and_k(call):
        made = made._replace(q_in=q, k_in=k)
        if call.parts.head_norms is None:
            q, k = q.clone(), k.clone()
    if call.parts.head_norms is not None:
        q_norm, k_norm = call.parts.head_norms
        q, q_rstd = _normalise_heads(q, q_norm, call)
        k, k_rstd = _normalise_heads(k, k_norm, call)
        made = made._replace(q_rstd=q_rstd, k_rstd=k_rstd)
    if call.parts.rotary:
        terms = adapter_terms(made.low_qkv, call.parts.qkv)[:2] if _rotation_adds(call) else ()
        _rotate((q, k), call, *terms)
    return made._replace(q=q, k=k)


def _residual_block(made: Activations, o: torch.Tensor | None, call: LayerCall) -> Activations:
    """From attention's output to x₂ and the MLP's normalised input."""
    parts = call.parts
    assert o is not None
    branch, o_rstd = _behind(o, parts.post_attention_norm, call)
    if _keeps_o(call):
        made = made._replace(o=o, o_rstd=o_rstd)
    if parts.mlp_norm is None:
        return made._replace(x2=torch.add(made.x, branch, alpha=parts.residual_multiplier), h2=made.h1)
    x2, h2, rstd2 = call.ops.add_and_normalise(branch, made.x, parts.mlp_norm, parts.residual_multiplier)
    return made._replace(x2=x2, h2=h2, rstd2=rstd2)


def _mlp_block(made: Activations, call: LayerCall) -> tuple[Activations, torch.Tensor]:
    """From x₂ and its normalised form to the layer's output."""
    made = _gate_up_block(made, call)
    made, y = _down_block(made, call)
    return _second_residual(made, y, call)


def _gate_up_block(made: Activations, call: LayerCall) -> Activations:
    """From x₂ (or its normalised form, where that is at hand) to gate and up."""
    parts = call.parts
    if made.gate is not None:
        return made
    made = _mlp_input(made, call)
    assert made.h2 is not None
    outputs, low = lora_linear(
        made.h2,
        parts.gate_up,
        dropped=dropped_of(made.h2, parts.gate_up, _GATE_UP, call, made.low_gate_up),
        low_TR=made.low_gate_up,
        left_out=range(len(parts.gate_up)) if _activation_adds(call) else (),
    )
    gate, up = outputs[0], None
    if parts.gated:
        gate, up = outputs if len(outputs) == 2 else outputs[0].chunk(2, dim=1)
    if _scales(parts.mlp_norm, made.h2.dtype):
        made = made._replace(h2=None)  # nobody reads it again
    return made._replace(gate=gate, up=up, low_gate_up=low)


def _mlp_input(made: Activations, call: LayerCall) -> Activations:
    """h₂, where it is not at hand."""
    if made.h2 is not None:
        return made
    if call.parts.mlp_norm is None:
        h1, _ = call.ops.normalise(made.x, call.parts.input_norm)
        return made._replace(h1=h1, h2=h1)
    return made._replace(h2=call.ops.normalise(made.x2, call.parts.mlp_norm)[0])


def _down_block(made: Activations, call: LayerCall) -> tuple[Activations, torch.Tensor]:
    """From gate and up to the down projection's output, without its adapter's term where the residual adds that."""
    parts = call.parts
    if _activation_adds(call):
        act = call.ops.activate_adapted(made.gate, made.up, parts.activation, *_gate_up_terms(made, call))
    else:
        act = call.ops.activate(made.gate, made.up, parts.activation)
    (down,), low_down = lora_linear(
        act,
        (parts.down,),
        dropped=dropped_of(act, (parts.down,), _DOWN, call, made.low_down),
        low_TR=made.low_down,
        left_out=(0,) if _residual_adds(call) else (),
    )
    made = made._replace(low_down=low_down)
    return (made._replace(down=down) if _keeps_down(call) else made), down


def _second_residual(made: Activations, y: torch.Tensor, call: LayerCall) -> tuple[Activations, torch.Tensor]:
    """The layer's output, from the down projection's, in its place or that of what a norm makes of it."""
    parts = call.parts
    assert made.x2 is not None
    if _residual_adds(call):
        (term,) = adapter_terms(made.low_down, (parts.down,))
        return made, call.ops.add_adapted(y, made.x2, term, parts.residual_multiplier)
    y, down_rstd = _behind(y, parts.post_mlp_norm, call)
    out = y if y.dtype == made.x2.dtype and y is not made.down else None
    return made._replace(down_rstd=down_rstd), torch.add(made.x2, y, alpha=parts.residual_multiplier, out=out)


def _keeps_q_and_k(call: LayerCall) -> bool:
    """Whether the backward reads what the projections give, before norms and rotation."""
    parts = call.parts
    return parts.head_norms is not None or any(linear.reads_output for linear in parts.qkv[:2])


def _keeps_o(call: LayerCall) -> bool:
    """Whether the backward reads what o gives."""
    return call.parts.post_attention_norm is not None or call.parts.o.reads_output


def _keeps_down(call: LayerCall) -> bool:
    """Whether the backward reads what the down projection gives."""
    return call.parts.post_mlp_norm is not None or call.parts.down.reads_output


def _rotation_adds(call: LayerCall) -> bool:
    """Whether the rotation adds the terms of q and k, which nothing else comes before."""
    parts = call.parts
    ranks = [linear.a.shape[0] for linear in parts.qkv[:2] if linear.a is not None]
    apart = len(parts.qkv) == 3 and parts.rotary and not _keeps_q_and_k(call)
    return apart and len(ranks) == 2 and max(ranks) <= call.ops.max_rank


def _activation_adds(call: LayerCall) -> bool:
    """Whether the activation adds the terms of gate and up, and its backward that of down."""
    parts, ops = call.parts, call.ops
    linears = (*parts.gate_up, parts.down)
    ranks = [linear.a.shape[0] for linear in linears if linear.a is not None]
    return 0 < max(ranks, default=0) <= ops.max_rank


def _residual_adds(call: LayerCall) -> bool:
    """Whether the residual addition adds the term of down."""
    a = call.parts.down.a
    return not _keeps_down(call) and a is not None and a.shape[0] <= call.ops.max_rank


def _gate_up_terms(made: Activations, call: LayerCall) -> tuple[AdapterTerm | None, AdapterTerm | None]:
    """What the adapters add to gate and to up."""
    terms = adapter_terms(made.low_gate_up, call.parts.gate_up)
    if len(terms) == 2:
        return terms[0], terms[1]
    (term,) = terms
    if term is None or not call.parts.gated:
        return term, None
    gate, up = term.matrix_RO.chunk(2, dim=1)
    return term._replace(matrix_RO=gate), term._replace(matrix_RO=up)


def _mlp_backward(
    dy: torch.Tensor, made: Activations, call: LayerCall, overwrite: bool
) -> tuple[torch.Tensor, torch.Tensor | None, list[torch.Tensor | None]]:
    """From dy to dx₂, to the part of dh₁ that comes from the MLP where that reads h₁, and the gradients of the
    adapters of gate, up and down (A, B and two without each)."""
    parts = call.parts
    overwrite = overwrite or made.gate is None  # what is computed again here is nobody else's
    made = _gate_up_block(made, call)
    if _keeps_down(call) and made.down is None:
        made = _down_block(made, call)[0]
    ddown = _behind_backward(dy, made.down, made.down_rstd, parts.post_mlp_norm, call)
    # Where gate and up are still to be read, their gradients must not take their places.
    reads = any(linear.reads_output for linear in parts.gate_up)
    d = _through_activation(ddown, made, call, overwrite and not reads)
    of_gate_up = output_products(halves(d.gate_up, call), (made.gate, made.up), parts.gate_up, call)
    if _activation_adds(call):
        of_gate_up = list(map(with_term, of_gate_up, d.db_gate_up, parts.gate_up))
    (of_down,) = output_products((ddown,), (made.down,), (parts.down,), call)
    del ddown
    made = made._replace(gate=None, up=None, down=None)
    dlow = low_rank_gradient(d.gate_up, parts.gate_up)
    if dlow is not None and not _scales(parts.mlp_norm, dy.dtype):
        made = _mlp_input(made, call)
    x = _input(made.x2, made.h2, made.rstd2, parts.mlp_norm)
    dropped = dropped_of(made.x if made.x2 is None else made.x2, parts.gate_up, _GATE_UP, call)
    da = a_gradients(dlow, x, parts.gate_up, dropped)
    dh2 = input_gradient(d.gate_up, dlow, parts.gate_up, dropped)
    gradients = [*by_linear(da, d.db_gate_up, of_gate_up), d.da_down, d.db_down, of_down, None]
    del d, x, dropped
    if parts.mlp_norm is None:
        return dy, dh2, gradients
    return call.ops.normalise_backward(dh2, made.x2, parts.mlp_norm, made.rstd2, dy), None, gradients


class _ActivationGradients(NamedTuple):
    """What the backward from the down projection's output to those of gate and up gives."""

    gate_up: Sequence[torch.Tensor]
    """As their linears have them: one each, or one for both."""
    db_gate_up: list[torch.Tensor | None]
    da_down: torch.Tensor | None
    db_down: torch.Tensor | None


def _through_activation(
    ddown: torch.Tensor, made: Activations, call: LayerCall, overwrite: bool
) -> _ActivationGradients:
    """From the gradient of the down projection's output to those of gate and up, and what adapters there are."""
    parts, down = call.parts, (call.parts.down,)
    dlow, (db_down,) = call.ops.narrow_gradients((ddown,), made.low_down, down)
    adds = _activation_adds(call)
    dropped = dropped_of(made.gate if made.up is None else made.up, down, _DOWN, call)
    dact = input_gradient((ddown,), None if adds else dlow, down, None if adds else dropped)
    packed = dact.new_empty(dact.shape[0], 2 * dact.shape[1]) if parts.gated and len(parts.gate_up) == 1 else None
    halves = None if packed is None else packed.chunk(2, dim=1)
    if not adds:
        dgate, dup, act = call.ops.activate_backward(
            dact, made.gate, made.up, parts.activation, halves, overwrite=overwrite
        )
        (da_down,) = a_gradients(dlow, act, down, dropped)
        together = (packed,) if packed is not None else (dgate,) if dup is None else (dgate, dup)
        return _ActivationGradients(together, b_gradients(together, made.low_gate_up, parts.gate_up), da_down, db_down)
    a = parts.down.a
    dact_term = None if dlow is None or a is None else AdapterTerm(dlow, a.to(dlow.dtype))
    matrices = [linear.b for linear in parts.gate_up]
    trained = next(m for m in (*matrices, a) if m is not None)
    d = call.ops.activate_adapted_backward(
        dact, made.gate, made.up, parts.activation, *_gate_up_terms(made, call), dact_term, halves,
        overwrite=overwrite, dtype=trained.dtype, masks=None if dropped is None else dropped.masks,
    )  # fmt: skip
    dbs: list[torch.Tensor | None] = [d.db_gate_FR, d.db_up_FR]
    together = (d.dgate_TF,) if d.dup_TF is None else (d.dgate_TF, d.dup_TF)
    if packed is not None:
        halves_of_b = [db for db in dbs if db is not None]
        dbs = [torch.cat(halves_of_b) if halves_of_b else None]
        together = (packed,)
    db_gate_up = [None if b is None or db is None else db.to(b.dtype) for b, db in zip(matrices, dbs, strict=False)]
    da_down = None if a is None or d.da_down_RF is None else d.da_down_RF.to(a.dtype)
    return _ActivationGradients(together, db_gate_up, da_down, db_down)


def _attention_backward(
    dx2: torch.Tensor,
    dh1: torch.Tensor | None,
    made: Activations,
    attention_saved: tuple[torch.Tensor, ...],
    call: LayerCall,
    needs_dx: bool,
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """From dx₂, and what the MLP adds to dh₁, to dx, and the gradients of the adapters of q, k, v and o (A, B and two
    without each)."""
    parts, context = call.parts, call.context
    assert made.attended is not None
    do = _behind_backward(dx2, made.o, made.o_rstd, parts.post_attention_norm, call)
    narrow = call.ops.narrow_gradients
    dropped = dropped_of(made.attended, (parts.o,), _O, call)
    o = lora_linear_backward((do,), made.attended, made.low_o, (parts.o,), dropped=dropped, narrow=narrow)
    assert o.dx_TI is not None
    of_o = output_products((do,), (made.o,), (parts.o,), call)
    del do, dropped
    if made.q is None:
        made = _heads_block(made, made.q_in, made.k_in, call)
    dattended, q, k, v, attended = (
        _per_sequence(t, context, parts.head_dim)
        for t in (o.dx_TI, made.q, made.k, made.v, made.attended)
        if t is not None
    )
    d_qkv = context.attention.backward(dattended, q, k, v, attended, attention_saved, context.seen, parts.scale)
    outputs = (made.q_in, made.k_in, made.v) if any(linear.reads_output for linear in parts.qkv) else ()
    made, o_gradients = made._replace(q=None, k=None, v=None, attended=None), by_linear(o.da, o.db, of_o)
    del dattended, q, k, v, attended, o
    rows = [pick_rows(d.flatten(0, 1).flatten(1), context.rows_R) for d in d_qkv]
    del d_qkv
    rows[:2] = _heads_backward(rows[0], rows[1], made, call)
    h1 = made.h1
    adapted = any(linear.a is not None for linear in parts.qkv)
    if h1 is None and adapted and not _scales(parts.input_norm, made.x.dtype):
        h1, _ = call.ops.normalise(made.x, parts.input_norm)
    of_qkv = output_products(rows, outputs, parts.qkv, call)
    dy = rows if len(parts.qkv) == len(rows) else [torch.cat(rows, dim=1)]
    del rows, outputs
    x = _input(made.x, h1, made.rstd1, parts.input_norm)
    dropped = dropped_of(made.x, parts.qkv, _QKV, call)
    qkv = lora_linear_backward(dy, x, made.low_qkv, parts.qkv, dropped=dropped, needs_dx=needs_dx, narrow=narrow)
    gradients = by_linear(qkv.da, qkv.db, of_qkv) + o_gradients
    del dy, x, dropped
    if not needs_dx:
        return None, gradients
    assert qkv.dx_TI is not None
    if dh1 is not None:
        qkv.dx_TI.add_(dh1)
    return call.ops.normalise_backward(qkv.dx_TI, made.x, parts.input_norm, made.rstd1, dx2), gradients


def _scales(norm: Norm | None, dtype: torch.dtype) -> bool:
    """Whether the gradients of the group's A are made from what the norm in front of it takes, not from what it gives.

    An RMS norm only scales rows and columns, and those of a narrow matrix are scaled sooner.  fp16 might not hold the
    scaled gradient, and what it takes may be wider than what products are made of.
    """
    return norm is not None and norm.kind != "layer" and dtype != torch.float16 and norm.dtype is None


def _input(
    x_TD: torch.Tensor | None,
    h_TD: torch.Tensor | None,
    rstd_T: torch.Tensor | None,
    norm: Norm | None,
) -> torch.Tensor | ScaledInput | None:
    """A group's input for the gradients of A: what its norm gives (None if no adapter asks for it), or what it takes
    and by what it scales that."""
    if norm is not None and x_TD is not None and rstd_T is not None and _scales(norm, x_TD.dtype):
        return ScaledInput(x_TD, rstd_T, norm.weight_D + 1 if norm.kind == "rms_unit_offset" else norm.weight_D)
    return h_TD


def _heads_backward(
    dq: torch.Tensor, dk: torch.Tensor, made: Activations, call: LayerCall
) -> tuple[torch.Tensor, torch.Tensor]:
    """From the gradients of what attention takes (overwritten) to those of the projections."""
    if call.parts.rotary:
        _rotate((dq, dk), call, inverse=True)
    if call.parts.head_norms is None:
        return dq, dk
    q_norm, k_norm = call.parts.head_norms

    def through(d: torch.Tensor, taken: torch.Tensor | None, norm: Norm, rstd: torch.Tensor | None) -> torch.Tensor:
        assert taken is not None
        rows = (t.reshape(-1, call.parts.head_dim) for t in (d, taken))
        return call.ops.normalise_backward(*rows, norm, rstd).view_as(d)

    return through(dq, made.q_in, q_norm, made.q_rstd), through(dk, made.k_in, k_norm, made.k_rstd)


def _normalise_heads(x_TC: torch.Tensor, norm: Norm, call: LayerCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Each head of each token normalised (T × heads·d), and its statistics (T·heads)."""
    y, rstd = call.ops.normalise(x_TC.reshape(-1, call.parts.head_dim), norm)
    return y.view(x_TC.shape), rstd


def _rotate(
    projections: tuple[torch.Tensor, torch.Tensor],
    call: LayerCall,
    q_term: AdapterTerm | None = None,
    k_term: AdapterTerm | None = None,
    *,
    inverse: bool = False,
) -> None:
    """Rotate the heads of q and k, plus their terms, in place by their positions."""
    heads = (_heads(x_TC, call.parts.head_dim) for x_TC in projections)
    call.ops.rotate_adapted_(*heads, call.context.cos_Sd, call.context.sin_Sd, q_term, k_term, inverse=inverse)


def _behind(branch: torch.Tensor, norm: Norm | None, call: LayerCall) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a branch adds to the residual stream: its output, through the norm behind it if there is one."""
    return (branch, None) if norm is None else call.ops.normalise(branch, norm)


def _behind_backward(
    d: torch.Tensor, taken: torch.Tensor | None, rstd: torch.Tensor | None, norm: Norm | None, call: LayerCall
) -> torch.Tensor:
    """From the gradient of the residual stream to that of a branch's output, which is `taken` by `norm`."""
    if call.parts.residual_multiplier != 1.0:
        d = d * call.parts.residual_multiplier
    if norm is None:
        return d if call.parts.dtype is None else d.to(call.parts.dtype)
    if rstd is None:
        _, rstd = call.ops.normalise(taken, norm)
    return call.ops.normalise_backward(d, taken, norm, rstd)


def pick_rows(x_TD: torch.Tensor, rows_R: torch.Tensor | None) -> torch.Tensor:
    """The real tokens' rows (R × D), or all."""
    return x_TD if rows_R is None else x_TD.index_select(0, rows_R)


def spread_rows(x_RD: torch.Tensor, rows_R: torch.Tensor | None, tokens: int) -> torch.Tensor:
    """The inverse: rows back in their places (`tokens` × D), zeros elsewhere."""
    return x_RD if rows_R is None else x_RD.new_zeros(tokens, x_RD.shape[1]).index_copy_(0, rows_R, x_RD)


def _heads(x_TD: torch.Tensor, head_dim: int) -> torch.Tensor:
    return x_TD.unflatten(1, (x_TD.shape[1] // head_dim, head_dim))


def _per_sequence(x_TD: torch.Tensor, context: StepContext, head_dim: int) -> torch.Tensor:
    """(T × heads·d) as (B, S, heads, d), with padding back in its place."""
    tokens = context.tokens
    return spread_rows(x_TD, context.rows_R, tokens).view(context.batch, tokens // context.batch, -1, head_dim)
