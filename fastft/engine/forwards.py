"""The `forward`s that `patch` puts in place of Hugging Face's.

Each is bound to its module as an instance attribute, so the class and every other model stay untouched, and a deep
copy of the model gets copies bound to its own modules.  What cannot run fused at this call goes to the original, and
the ledger says why.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from operator import attrgetter
from typing import Any

import torch
import torch.nn.modules.module as _global_hooks
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastft.engine.aside import Aside
from fastft.engine.host_embedding import keep_on_host
from fastft.engine.loss import IGNORED, Targets
from fastft.engine.norm import norm_forward
from fastft.engine.packed import confirmation, told_documents
from fastft.engine.parts import LayerCall, LayerParts, StepContext, read_parts
from fastft.engine.runs import Run
from fastft.engine.runtime import Runtime, WrongAssumptionError
from fastft.engine.stack import run_layers
from fastft.engine.state import EngineSettings, ModuleState, compute_dtype, original_forward, policy_of, state_of
from fastft.engine.support import why_no_layer
from fastft.kernels.attention.library import Seen, choose_attention
from fastft.kernels.attention.seen import documents_of, mask_of
from fastft.models.kv_cache import KV_CACHE, given_cache
from fastft.plan import keeps_input_only

_ROWS = "_fastft_real_rows"
"""The keyword by which the backbone tells its layers which rows are real."""
_WORTH_LEAVING_OUT = 0.05
"""Share of padding from which on leaving it out pays for the copies around attention."""


def layer_forward(
    self: nn.Module,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = False,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    **kwargs: Any,
) -> Any:
    """A decoder layer: `hidden_states` (B × S × D) to the same, or unchanged where its call was put down for later; in
    a tuple where the family's layers return one."""
    cache = given_cache(past_key_values, kwargs)
    rows_R = kwargs.pop(_ROWS, None)
    state = state_of(self)
    settings = state.settings
    runtime = settings.runtime
    policy = policy_of(self)
    told = (hidden_states, attention_mask, cache, position_embeddings, rows_R, *kwargs, *kwargs.values())
    context = runtime.told_before(state.index, told) if state.original is None else None
    if context is not None:
        settings.ledger.fused(state.name, "decoder_layer", settings.ops.name)
        settings.ledger.paths.pop(f"{state.name}.attention", None)
        runtime.put_down(hidden_states, state.index, context, policy, 0)
        return (hidden_states, None) if settings.spec.returns_tuple else hidden_states
    reason = state.replaced or _why_not_now(
        self, settings, hidden_states, attention_mask, cache, position_embeddings, kwargs
    )
    parts = None
    documents = runtime.behind(attention_mask)
    if documents is not None:
        attention_mask = None
    if reason is None and runtime.begun:
        parts, reason = runtime.layer(state.index)
    elif reason is None:
        reason = why_no_layer(self, settings.spec)
        parts = read_parts(self, settings.spec) if reason is None else None
    if parts is not None:
        assert position_embeddings is not None
        seen = _seen(parts, attention_mask, documents)
        context = _context(state, parts, hidden_states, seen, position_embeddings, rows_R)
        # Drawn from the CPU's generator, which `torch.manual_seed` fixes, without touching the device's.
        seed = int(torch.randint(2**62, ()).item()) if parts.has_dropout else 0
        settings.ledger.fused(state.name, "decoder_layer", settings.ops.name)
        if runtime.put_down(hidden_states, state.index, context, policy, seed):
            y_BSD = hidden_states
            if settings.attention in ("auto", context.attention.name):
                runtime.remember(state.index, told, context)
        else:
            call = LayerCall(settings.ops, parts, context, policy, seed, settings.mlp_chunk_tokens)
            y_BSD = run_layers(hidden_states, Run((call,)))
        return (y_BSD, None) if settings.spec.returns_tuple else y_BSD
    assert reason is not None
    hidden_states = runtime.flush(hidden_states)
    of_layer = runtime.layer(state.index)[0] if documents is not None else None
    if of_layer is not None:
        B, S, _ = hidden_states.shape
        attention_mask = mask_of(_seen(of_layer, None, documents), B, S, hidden_states.device)
    arguments = {
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        KV_CACHE: cache,
        "use_cache": use_cache,
        "position_embeddings": position_embeddings,
        **kwargs,
    }
    original = original_forward(self)
    if not torch.is_grad_enabled():
        return original(hidden_states, **arguments)
    settings.ledger.stock(state.name, "decoder_layer", reason)
    if keeps_input_only(policy) and self.training and cache is None:
        # The stock layer honours the same placement in its own way; a cache must not be written twice.
        return checkpoint(original, hidden_states, use_reentrant=False, **arguments)
    return original(hidden_states, **arguments)


def backbone_forward(
    self: nn.Module,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: torch.Tensor | None = None,
    use_cache: bool | None = None,
    *,
    targets: Targets | None = None,
    **kwargs: Any,
) -> Any:
    """The decoder without its head; spares training what only generation needs.

    In training, no key/value cache is built unless one is passed or asked for, and a mask that only hides right
    padding is dropped: causal attention never looks to the right, so no real token could see the padding anyway.
    The layers then leave padding out of all but attention.  The mask stays where padding itself is trained (`targets`
    has some there) and where positions are given: those are taken for packed documents if there is no mask.
    """
    runtime = state_of(self).settings.runtime
    arguments = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        KV_CACHE: given_cache(past_key_values, kwargs),
        "inputs_embeds": inputs_embeds,
        "use_cache": use_cache,
    }
    if not (self.training and torch.is_grad_enabled()):
        return original_forward(self)(**arguments, **kwargs)
    try:
        with suppress(WrongAssumptionError):
            return _train_forward(self, arguments, targets, kwargs, trust=True)
        # The exception, and what its frames hold, is gone before it all runs again.
        return _train_forward(self, arguments, targets, kwargs, trust=False)
    finally:
        runtime.end()


def _train_forward(
    backbone: nn.Module,
    given: dict[str, Any],
    targets: Targets | None,
    kwargs: dict[str, Any],
    *,
    trust: bool,
) -> Any:
    """`backbone_forward` in training; see there, and `Runtime.begin` for `trust`."""
    arguments, more = dict(given), dict(kwargs)
    settings = state_of(backbone).settings
    runtime = settings.runtime
    input_ids, attention_mask, position_ids = (given[name] for name in ("input_ids", "attention_mask", "position_ids"))
    inputs = input_ids if input_ids is not None else given["inputs_embeds"]
    if inputs is not None:
        settings.place(*inputs.shape[:2])
        if settings.host_embedding:
            keep_on_host(backbone.get_input_embeddings())  # type: ignore[operator]
    runtime.begin(
        *_layers_and_norm(backbone),
        settings.spec,
        settings.ops,
        gather=_may_gather(backbone, kwargs),
        graphs=settings.graphs,
        mlp_chunk_tokens=settings.mlp_chunk_tokens,
        resident_layers=settings.resident_layers,
        trust=trust,
    )
    if given[KV_CACHE] is None:
        arguments["use_cache"] = given["use_cache"] or False
        if position_ids is None and attention_mask is not None:
            device, recorded = attention_mask.device, runtime.may_record(attention_mask.numel(), attention_mask.device)
            if runtime.assumes and runtime.mask_hid_padding and recorded:
                runtime.assume(partial(_hides_padding, attention_mask, targets, Aside(device)))
                attention_mask = None
            else:
                runtime.mask_hid_padding, rows_R = without_padding(
                    attention_mask, None if targets is None else targets.targets()
                )
                if rows_R is not None and not recorded:
                    more[_ROWS] = rows_R
                if runtime.mask_hid_padding:
                    attention_mask = None
        if attention_mask is None and inputs is not None:
            attention_mask = _stand_in_for_a_mask(backbone, runtime, inputs, position_ids, kwargs)
    arguments["attention_mask"] = attention_mask
    return original_forward(backbone)(**arguments, **more)


def _hides_padding(attention_mask: torch.Tensor, targets: Targets | None, aside: Aside) -> bool:
    """The first answer of `without_padding`, without waiting for what was launched since."""
    with aside.asking():
        return without_padding(attention_mask, None if targets is None else targets.targets())[0]


def without_padding(
    attention_mask: torch.Tensor, targets: torch.Tensor | None = None
) -> tuple[bool, torch.Tensor | None]:
    """Whether a (B × S) mask only hides right padding, and which of the B·S tokens are then real.

    It does if every row has its ones first, at least one, and no target (B × S) outside of them.  The real tokens
    (ascending, int64) are None where nearly all are.  Costs one host synchronisation.
    """
    if attention_mask.dim() != 2 or attention_mask.shape[1] == 0:
        return False, None
    mask = attention_mask != 0
    right = (mask[:, 1:] <= mask[:, :-1]).all() & mask[:, 0].all()
    if targets is not None:
        right &= (mask | (targets.to(mask.device) == IGNORED)).all()
    only_padding, count = torch.stack([right.long(), mask.sum()]).tolist()
    if not only_padding or count >= (1 - _WORTH_LEAVING_OUT) * mask.numel():
        return bool(only_padding), None
    # A stable sort brings the real ones to the front in their order; `nonzero` would synchronise again.
    return True, mask.flatten().logical_not().to(torch.uint8).argsort(stable=True)[:count]


def _stand_in_for_a_mask(
    backbone: nn.Module,
    runtime: Runtime,
    inputs: torch.Tensor,
    position_ids: torch.Tensor | None,
    told: dict[str, Any],
) -> torch.Tensor | None:
    """What to pass so that Hugging Face builds no (B × 1 × S × S) mask, for packed documents or a sliding window, say.

    None where a layer, or somebody who looks, may need a real one.
    """
    if not (runtime.gathers and runtime.all_fused) or any(
        state_of(layer).replaced for layer in _layers_and_norm(backbone)[0]
    ):
        return None
    B, S = inputs.shape[:2]
    tells_documents = position_ids is not None and state_of(backbone).settings.spec.separates_documents
    documents = None
    if position_ids is not None and tells_documents:
        position_ids_BS = position_ids.expand(B, -1)
        guess = told_documents(told, inputs) if runtime.assumes else None
        if guess is not None:
            runtime.assume(confirmation(position_ids_BS, guess))
            documents = guess if len(guess[0]) > B + 1 else None
        else:
            documents = documents_of(position_ids_BS)
    # As large as a mask without its memory.  Only `layer_forward` ever gets it, and knows it.
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=inputs.device).expand(B, 1, S, S)
    runtime.stand_in(mask, documents)
    return mask


def _may_gather(backbone: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether nobody looks at what goes from one layer to the next, so that calls may be put down."""
    asked = ("output_hidden_states", "output_attentions")
    layers, norm = _layers_and_norm(backbone)
    return (
        not any(kwargs.get(name) or getattr(backbone.config, name, False) for name in asked)
        and _runs(norm, norm_forward)
        and all(_runs(layer, layer_forward) for layer in layers)
        and not (_global_hooks._global_forward_hooks or _global_hooks._global_forward_pre_hooks)
        and not getattr(backbone, "_is_replica", False)
    )


def _layers_and_norm(backbone: nn.Module) -> tuple[Any, Any]:
    spec = state_of(backbone).settings.spec
    return attrgetter(spec.layers, spec.final_norm)(backbone)


def _runs(module: Any, forward: Callable[..., Any]) -> bool:
    """Whether the engine's `forward` is called as it is: somebody's wrapper may checkpoint, or look."""
    return getattr(module.__dict__.get("forward"), "__func__", None) is forward


def _why_not_now(
    layer: nn.Module,
    settings: EngineSettings,
    hidden_states: torch.Tensor,
    attention_mask: Any,
    cache: Any,
    position_embeddings: Any,
    kwargs: dict[str, Any],
) -> str | None:
    if cache is not None or kwargs.get("layer_past") is not None:
        return "a key/value cache is in use"
    if position_embeddings is None:
        return "no position embeddings were passed"
    if attention_mask is not None and not (isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 4):
        return f"the attention mask is a {type(attention_mask).__name__} of another kind than B × 1 × S × S"
    if kwargs.get("output_attentions"):
        return "attention weights are asked for"
    for name in ("is_causal", "position_bias"):
        if kwargs.get(name) is not None:
            return f"attention was given {name}"
    # A variant of the family may have other norms; then `why_no_layer` has the reason.
    weight = getattr(getattr(layer, settings.spec.input_norm, None), "weight", hidden_states)
    dtype = compute_dtype(hidden_states)
    if not dtype == weight.dtype == hidden_states.dtype:
        return f"it computes in {dtype} on {getattr(weight, 'dtype', None)} weights"
    return None


def _seen(
    parts: LayerParts, attention_mask: torch.Tensor | None, documents: tuple[torch.Tensor | None, int] | None
) -> Seen:
    starts_N, longest = documents or (None, 0)
    return Seen(attention_mask, parts.window, parts.softcap, starts_N, longest)


def _context(
    state: ModuleState,
    parts: LayerParts,
    hidden_states: torch.Tensor,
    seen: Seen,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    rows_R: torch.Tensor | None,
) -> StepContext:
    """What this forward tells this layer; the same object for all layers that are told the same."""
    settings = state.settings
    B, S, _ = hidden_states.shape
    told = (*position_embeddings, *seen, rows_R, parts.head_dim)
    context = settings.runtime.shared_context(told)
    if context is None:
        cos, sin = (t.reshape(-1, t.shape[-1]).to(hidden_states.dtype) for t in position_embeddings)
        if rows_R is not None:
            # Row t of the angles is that of token t % S; with padding left out, each real token gets its own.
            cos, sin = (t.index_select(0, rows_R % t.shape[0]) for t in (cos, sin))
        # The queries do not exist yet; what they will look like decides.
        like_queries = hidden_states.new_empty(()).expand(B, S, 1, parts.head_dim)
        attention = choose_attention(settings.attention, like_queries, seen)
        context = StepContext(
            batch=B, tokens=B * S, attention=attention, cos_Sd=cos, sin_Sd=sin, seen=seen, rows_R=rows_R
        )
        settings.runtime.share_context(told, context)
    if settings.attention not in ("auto", context.attention.name):
        given = [name for name in ("mask", "window", "softcap", "documents") if getattr(seen, name) is not None]
        reason = f"{settings.attention} cannot run here with {' and '.join(given) or 'causal attention'}"
        settings.ledger.replaced(f"{state.name}.attention", "attention", context.attention.name, reason)
    else:
        settings.ledger.paths.pop(f"{state.name}.attention", None)
    return context
