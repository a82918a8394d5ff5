"""The `forward`s that `patch` puts in place of Hugging Face's.

Each is bound to its module as an instance attribute, so the class and every other model stay untouched, and a deep
copy of the model gets copies bound to its own modules.  What cannot run fused at this call goes to the original, and
the ledger says why.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from fastft.backends import Backend
from fastft.engine.ledger import Ledger
from fastft.engine.loss import IGNORED, linear_cross_entropy, shifted_targets
from fastft.engine.norm import RmsNorm
from fastft.engine.parts import LayerCall, StepContext, epsilon, read_parts
from fastft.engine.stack import run_layers
from fastft.engine.support import why_no_head, why_no_layer, why_no_norm
from fastft.kernels.attention.library import choose_attention
from fastft.models.spec import LayerSpec
from fastft.plan import Policy

_ROWS = "_fastft_real_rows"
"""The keyword by which the backbone tells its layers which rows are real."""
_WORTH_LEAVING_OUT = 0.05
"""Share of padding from which on leaving it out pays for the copies around attention."""
STATE = "_fastft"
"""The attribute under which a patched module keeps its `ModuleState`."""


_SIZE_STEP = 64


@dataclass
class EngineSettings:
    """What every patched module of one model shares."""

    ops: Backend
    spec: LayerSpec
    ledger: Ledger
    placement: list[Policy]
    attention: str
    loss_chunk_tokens: int
    placement_is_fixed: bool
    """Whether the placement was chosen (a plan, the user), so that gradient checkpointing does not replace it."""
    choose_placement: Callable[[int, int], list[Policy]] | None = None
    """From (B, S) to the placement, asked when a batch of a new size comes (S is rounded up to a multiple of 64); None
    where the placement is given."""
    chosen: dict[tuple[int, int], list[Policy]] = field(default_factory=dict)

    def place(self, batch: int, tokens: int) -> None:
        """Set the placement for a micro-batch of `batch` rows of `tokens` tokens."""
        if self.choose_placement is None:
            return
        # Rounded up, so that ragged batches share an answer.
        size = (batch, -(-tokens // _SIZE_STEP) * _SIZE_STEP)
        if size not in self.chosen:
            self.chosen[size] = self.choose_placement(*size)
        self.placement = self.chosen[size]


@dataclass
class ModuleState:
    """What one patched module knows."""

    settings: EngineSettings
    name: str
    index: int = 0
    original: Callable[..., Any] | None = None
    """An instance's own `forward` from before the patch; None means the class's."""

    @property
    def replaced(self) -> str | None:
        """The reason not to run fused what somebody else had already given another `forward`."""
        return None if self.original is None else "its forward was replaced"


def state_of(module: nn.Module) -> ModuleState:
    """The state of a patched module."""
    state: ModuleState = module.__dict__[STATE]
    return state


def policy_of(layer: nn.Module) -> Policy:
    """What a patched layer saves: as placed; where that is left open, `full` if gradient checkpointing is on."""
    state = state_of(layer)
    if layer.gradient_checkpointing and not state.settings.placement_is_fixed:
        return "full"
    return state.settings.placement[state.index]


def original_forward(module: nn.Module) -> Callable[..., Any]:
    """The `forward` that stood before the patch, bound to `module`."""
    original = state_of(module).original
    return original if original is not None else type(module).forward.__get__(module)


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


def norm_forward(self: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """The final norm (… × D)."""
    state = state_of(self)
    settings = state.settings
    reason = state.replaced or why_no_norm(self, settings.spec)
    if reason is None and hidden_states.dtype != self.weight.dtype:
        reason = f"its weight is {self.weight.dtype}, the activations are {hidden_states.dtype}"
    if reason is not None:
        settings.ledger.stock(state.name, "norm", reason)
        stock: torch.Tensor = original_forward(self)(hidden_states)
        return stock
    settings.ledger.fused(state.name, "norm", settings.ops.name)
    normed: torch.Tensor = RmsNorm.apply(hidden_states, self.weight, epsilon(self), settings.ops)
    return normed


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


def causal_lm_forward(
    self: nn.Module,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    use_cache: bool | None = None,
    logits_to_keep: int | torch.Tensor = 0,
    **kwargs: Any,
) -> Any:
    """The whole model; with labels and gradients, head and loss run together and `logits` are made on demand."""
    state = state_of(self)
    settings = state.settings
    arguments = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "past_key_values": past_key_values,
        "inputs_embeds": inputs_embeds,
        "use_cache": use_cache,
        **kwargs,
    }
    if labels is None or not torch.is_grad_enabled() or not self.training:
        return original_forward(self)(**arguments, labels=labels, logits_to_keep=logits_to_keep)
    head = self.get_output_embeddings()  # type: ignore[operator]
    reason = state.replaced or why_no_head(head) or _why_no_loss(self, logits_to_keep, kwargs)
    if reason is not None:
        settings.ledger.stock(state.name, "head_and_loss", reason)
        return original_forward(self)(**arguments, labels=labels, logits_to_keep=logits_to_keep)
    settings.ledger.fused(state.name, "head_and_loss", settings.ops.name)
    items = arguments.pop("num_items_in_batch", None)
    shift_labels = arguments.pop("shift_labels", None)
    targets = shift_labels if shift_labels is not None else shifted_targets(labels)
    if STATE in self.model.__dict__:
        arguments["targets"] = targets
    outputs = self.model(**arguments)  # type: ignore[operator]
    hidden = outputs.last_hidden_state
    dtype = _compute_dtype(hidden) if torch.is_autocast_enabled(hidden.device.type) else head.weight.dtype
    loss = linear_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]).to(dtype),
        head.weight.to(dtype),
        targets.reshape(-1).to(hidden.device),
        settings.ops,
        divisor=items,
        chunk_tokens=settings.loss_chunk_tokens,
    )
    result = LazyLogitsOutput(
        loss=loss,
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )
    result.defer_logits(lambda: head(hidden))
    return result


class LazyLogitsOutput(CausalLMOutputWithPast):
    """Hugging Face's output, whose `logits` (B × S × V) are computed when somebody reads them."""

    def defer_logits(self, make: Callable[[], torch.Tensor]) -> None:
        """Compute the logits by `make` at the first access."""
        object.__setattr__(self, "_make_logits", make)

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name == "logits" and value is None:
            make = self.__dict__.get("_make_logits")
            if make is not None:
                value = make()
                object.__setattr__(self, "_make_logits", None)
                self.logits = value
        return value

    def __getitem__(self, key: Any) -> Any:
        """By name or position, as in the stock output; whatever may mean the logits computes them."""
        if key in ("loss", 0):
            return self.loss
        _ = self.logits
        return super().__getitem__(key)

    def to_tuple(self) -> tuple[Any, ...]:
        """What is there, in the stock output's order."""
        return tuple(value for each in fields(self) if (value := getattr(self, each.name)) is not None)


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


def _why_no_loss(model: nn.Module, logits_to_keep: int | torch.Tensor, kwargs: dict[str, Any]) -> str | None:
    if kwargs.get("return_dict") is False:
        return "a tuple was asked for"
    if not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
        return "only some logits were asked for"
    if model.loss_function is not ForCausalLMLoss:
        return f"its loss function is {getattr(model.loss_function, '__name__', model.loss_function)}"
    if kwargs.get("ignore_index", IGNORED) != IGNORED:
        return "another ignore_index was asked for"
    return None


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
    dtype = _compute_dtype(hidden_states)
    if weight is None or not (dtype == weight.dtype == hidden_states.dtype):
        return f"it computes in {dtype} on {getattr(weight, 'dtype', None)} weights"
    return why_no_layer(layer, settings.spec)


def _compute_dtype(hidden_states: torch.Tensor) -> torch.dtype:
    device = hidden_states.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden_states.dtype


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
    # The queries do not exist yet; what they will look like decides.
    like_queries = hidden_states.new_empty(()).expand(B, S, 1, parts.head_dim)
    attention = choose_attention(settings.attention, like_queries, attention_mask)
    if settings.attention not in ("auto", attention.name):
        reason = f"{settings.attention} cannot run {'with' if attention_mask is not None else 'without'} a mask here"
        settings.ledger.replaced(f"{state.name}.attention", "attention", attention.name, reason)
    else:
        settings.ledger.paths.pop(f"{state.name}.attention", None)
    return LayerCall(
        ops=settings.ops,
        parts=parts,
        context=StepContext(
            batch=B, tokens=B * S, attention=attention, cos_Sd=cos, sin_Sd=sin, mask=attention_mask, rows_R=rows_R
        ),
        policy=policy,
        # Drawn from the CPU's generator, which `torch.manual_seed` fixes, without touching the device's.
        seed=int(torch.randint(2**62, ()).item()) if parts.has_dropout else 0,
    )
