"""The causal language model's `forward`: head and loss together, logits on demand."""

from collections.abc import Callable
from dataclasses import fields
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from fastft.engine.loss import IGNORED, Targets, linear_cross_entropy
from fastft.engine.state import STATE, compute_dtype, original_forward, state_of
from fastft.engine.support import why_no_head, why_no_loss
from fastft.kernels.cross_entropy import LogitTransform
from fastft.models.kv_cache import KV_CACHE, given_cache
from fastft.models.spec import LayerSpec


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
        KV_CACHE: given_cache(past_key_values, kwargs),
        "inputs_embeds": inputs_embeds,
        "use_cache": use_cache,
        **kwargs,
    }
    if labels is None or not torch.is_grad_enabled() or not self.training:
        return original_forward(self)(**arguments, labels=labels, logits_to_keep=logits_to_keep)
    head = self.get_output_embeddings()  # type: ignore[operator]
    reason = state.replaced or why_no_head(head) or _why_not_together(self, logits_to_keep, kwargs)
    if reason is not None:
        settings.ledger.stock(state.name, "head_and_loss", reason)
        return original_forward(self)(**arguments, labels=labels, logits_to_keep=logits_to_keep)
    settings.ledger.fused(state.name, "head_and_loss", settings.ops.name)
    items = arguments.pop("num_items_in_batch", None)
    shift_labels = arguments.pop("shift_labels", None)
    targets = Targets(labels) if shift_labels is None else Targets(shift_labels, shifted=True)
    backbone = attrgetter(settings.spec.backbone)(self)
    if STATE in backbone.__dict__ and attention_mask is not None:
        arguments["targets"] = targets
    outputs = backbone(**arguments)
    hidden = outputs.last_hidden_state
    transform = logit_transform(self.config, settings.spec)
    dtype = compute_dtype(hidden) if torch.is_autocast_enabled(hidden.device.type) else head.weight.dtype
    loss = linear_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]).to(dtype),
        head.weight.to(dtype),
        targets.targets().reshape(-1).to(hidden.device),
        settings.ops,
        divisor=items,
        chunk_tokens=settings.loss_chunk_tokens,
        transform=transform,
        rows_N=targets.rows().to(hidden.device),
    )
    result = LazyLogitsOutput(
        loss=loss,
        **{KV_CACHE: outputs.get(KV_CACHE)},
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )
    result.defer_logits(lambda: transformed(head(hidden), transform))
    return result


def logit_transform(config: Any, spec: LayerSpec) -> LogitTransform:
    """What a model of this configuration does to its logits before the softmax."""
    divisor = 1.0 if spec.logit_divisor is None else getattr(config, spec.logit_divisor)
    return LogitTransform(1.0 / divisor, None if spec.logit_softcap is None else getattr(config, spec.logit_softcap))


def transformed(logits: torch.Tensor, transform: LogitTransform) -> torch.Tensor:
    """The transform by itself, on logits of any shape, as Hugging Face's models do it."""
    if transform.multiplier != 1.0:
        logits = logits * transform.multiplier
    return logits if transform.softcap is None else torch.tanh(logits / transform.softcap) * transform.softcap


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


def _why_not_together(model: nn.Module, logits_to_keep: int | torch.Tensor, kwargs: dict[str, Any]) -> str | None:
    if kwargs.get("return_dict") is False:
        return "a tuple was asked for"
    if not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
        return "only some logits were asked for"
    reason = why_no_loss(model)
    if reason is None and kwargs.get("ignore_index", IGNORED) != IGNORED:
        reason = "another ignore_index was asked for"
    return reason
