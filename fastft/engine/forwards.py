"""The `forward`s that `patch` puts in place of Hugging Face's.

Each is bound to its module as an instance attribute, so the class and every other model stay untouched, and a deep
copy of the model gets copies bound to its own modules.  What cannot run fused at this call goes to the original, and
the ledger says why.
"""

from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastft.engine.loss import IGNORED
from fastft.engine.parts import LayerCall, StepContext, read_parts
from fastft.engine.stack import run_layers
from fastft.engine.state import (
    EngineSettings,
    ModuleState,
    compute_dtype,
    original_forward,
    policy_of,
    state_of,
)
from fastft.engine.support import why_no_layer
from fastft.kernels.attention.library import Seen, choose_attention
from fastft.plan import Policy

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
) -> torch.Tensor:
    """A decoder layer: `hidden_states` (B × S × D) to the same."""
    rows_R = kwargs.pop(_ROWS, None)
    state = state_of(self)
    settings = state.settings
    policy = policy_of(self)
    reason = state.replaced or _why_not_now(
        self, settings, hidden_states, attention_mask, past_key_values, position_embeddings, kwargs
    )
    if reason is None:
        assert position_embeddings is not None
        call = _layer_call(self, state, policy, hidden_states, attention_mask, position_embeddings, rows_R)
        settings.ledger.fused(state.name, "decoder_layer", settings.ops.name)
        return run_layers(hidden_states, [call])
    arguments = {
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "past_key_values": past_key_values,
        "use_cache": use_cache,
        "position_embeddings": position_embeddings,
        **kwargs,
    }
    original = original_forward(self)
    if not torch.is_grad_enabled():
        return original(hidden_states, **arguments)
    settings.ledger.stock(state.name, "decoder_layer", reason)
    if policy == "full" and self.training and not self.gradient_checkpointing and past_key_values is None:
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
    targets: torch.Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """The decoder without its head; spares training what only generation needs.

    In training, no key/value cache is built unless one is passed or asked for, and a mask that only hides right
    padding is dropped: causal attention never looks to the right, so no real token could see the padding anyway.
    The layers then leave padding out of all but attention.  The mask stays where padding itself is trained (`targets`,
    B × S, has some there) and where positions are given: those are taken for packed documents if there is no mask.
    """
    if self.training and torch.is_grad_enabled():
        inputs = input_ids if input_ids is not None else inputs_embeds
        if inputs is not None:
            state_of(self).settings.place(*inputs.shape[:2])
        if past_key_values is None:
            use_cache = use_cache or False
            if position_ids is None and attention_mask is not None and hides_only_padding(attention_mask, targets):
                rows_R = real_rows(attention_mask)
                if rows_R is not None:
                    kwargs[_ROWS] = rows_R
                attention_mask = None
    return original_forward(self)(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        inputs_embeds=inputs_embeds,
        use_cache=use_cache,
        **kwargs,
    )


def real_rows(attention_mask: torch.Tensor) -> torch.Tensor | None:
    """Which of the B·S tokens a (B × S) mask leaves visible (int64), or None where nearly all are."""
    rows_R = attention_mask.flatten().nonzero().squeeze(1)
    return rows_R if rows_R.numel() < (1 - _WORTH_LEAVING_OUT) * attention_mask.numel() else None


def hides_only_padding(attention_mask: torch.Tensor, targets: torch.Tensor | None = None) -> bool:
    """Whether a (B × S) mask has its ones first in every row, at least one, and no target (B × S) outside of them."""
    if attention_mask.dim() != 2 or attention_mask.shape[1] == 0:
        return False
    mask = attention_mask != 0
    answer = (mask[:, 1:] <= mask[:, :-1]).all() & mask[:, 0].all()
    if targets is not None:
        answer &= (mask | (targets.to(mask.device) == IGNORED)).all()
    return bool(answer)


def _why_not_now(
    layer: nn.Module,
    settings: EngineSettings,
    hidden_states: torch.Tensor,
    attention_mask: Any,
    past_key_values: Any,
    position_embeddings: Any,
    kwargs: dict[str, Any],
) -> str | None:
    if past_key_values is not None:
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
    weight = getattr(attrgetter(settings.spec.input_norm)(layer), "weight", None)
    dtype = compute_dtype(hidden_states)
    if weight is None or not (dtype == weight.dtype == hidden_states.dtype):
        return f"it computes in {dtype} on {getattr(weight, 'dtype', None)} weights"
    return why_no_layer(layer, settings.spec)


def _layer_call(
    layer: nn.Module,
    state: ModuleState,
    policy: Policy,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    rows_R: torch.Tensor | None,
) -> LayerCall:
    settings = state.settings
    parts = read_parts(layer, settings.spec)
    B, S, _ = hidden_states.shape
    cos, sin = (t.reshape(-1, t.shape[-1]).to(hidden_states.dtype) for t in position_embeddings)
    if rows_R is not None:
        # Row t of the angles is that of token t % S; with padding left out, each real token gets its own.
        cos, sin = (t.index_select(0, rows_R % t.shape[0]) for t in (cos, sin))
    seen = Seen(attention_mask)
    # The queries do not exist yet; what they will look like decides.
    like_queries = hidden_states.new_empty(()).expand(B, S, 1, parts.head_dim)
    attention = choose_attention(settings.attention, like_queries, seen)
    if settings.attention not in ("auto", attention.name):
        reason = f"{settings.attention} cannot run {'with' if attention_mask is not None else 'without'} a mask here"
        settings.ledger.replaced(f"{state.name}.attention", "attention", attention.name, reason)
    else:
        settings.ledger.paths.pop(f"{state.name}.attention", None)
    return LayerCall(
        ops=settings.ops,
        parts=parts,
        context=StepContext(
            batch=B, tokens=B * S, attention=attention, cos_Sd=cos, sin_Sd=sin, seen=seen, rows_R=rows_R
        ),
        policy=policy,
        # Drawn from the CPU's generator, which `torch.manual_seed` fixes, without touching the device's.
        seed=int(torch.randint(2**62, ()).item()) if parts.has_dropout else 0,
    )
