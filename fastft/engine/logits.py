"""Head and loss together, in models whose `forward` is their own.

While such a forward runs, its head puts a `Deferred` tensor in the logits' place.  If the loss function gets that very
object, then nothing came between head and loss, whatever the family, and both run together (`fastft.engine.loss`).  If
the forward does anything else with it, a soft-cap for one, the logits are computed there and all goes on as stock.

Legend: B batch, S sequence, D model, V vocabulary.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any, cast

import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from fastft.engine.attach import STATE
from fastft.engine.deferred import Deferred, computed, defer
from fastft.engine.loss import IGNORED, linear_cross_entropy, shifted_targets
from fastft.engine.precision import compute_dtype
from fastft.engine.state import EngineSettings, ModuleState, call_original, why_not_differentiated
from fastft.engine.support import NO_LABELS, why_no_divisor, why_no_head, why_no_loss, why_sharded
from fastft.engine.trl_head import answer, why_replaced


@functools.cache
def deferring_forward_of(kind: Any) -> Callable[..., Any]:
    """The `forward` for models of this class.  It has their own's signature, by which trainers choose columns."""

    @functools.wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state: ModuleState | None = self.__dict__.get(STATE)
        if state is not None and kwargs.get("fused_lm_head"):
            return answer(self, state, args, kwargs)
        if state is None or not torch.is_grad_enabled() or state.settings.why_stock is not None:
            return call_original(self, args, kwargs)
        return _deferring(self, state, args, kwargs)

    return forward


@torch.compiler.disable(reason="fastft's layers are compiled already: compile with fullgraph=False")
def _deferring(self: nn.Module, state: ModuleState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    settings = state.settings
    with settings.forward():
        reason = why_not_differentiated() or why_sharded(self)
        if reason is not None:
            settings.ledger.whole(reason)
            with settings.stock_only(reason):
                return call_original(self, args, kwargs)
        if _labels(self, args, kwargs) is None:
            settings.ledger.expected(state.name, "head_and_loss", NO_LABELS)
            return call_original(self, args, kwargs)
        reason = why_replaced(self, state) or why_not_together(self)
        if reason is not None:
            settings.ledger.stock(state.name, "head_and_loss", reason)
            return call_original(self, args, kwargs)
        with _deferred(self, settings) as losses:
            output = call_original(self, args, kwargs)
        if losses:
            settings.ledger.fused(state.name, "head_and_loss", settings.ops.name)
        else:
            other = "the loss is not the cross-entropy of the head's own output"
            settings.ledger.stock(state.name, "head_and_loss", other)
        return output


def why_not_together(model: nn.Module) -> str | None:
    """Why head and loss of this model cannot run together, or None where its forward decides."""
    return why_no_loss(model) or why_no_head(model.get_output_embeddings())  # type: ignore[operator]


def _labels(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if "labels" in kwargs or not args:
        return kwargs.get("labels")
    return inspect.signature(type(model).forward).bind_partial(model, *args, **kwargs).arguments.get("labels")


@contextmanager
def _deferred(model: nn.Module, settings: EngineSettings) -> Iterator[list[torch.Tensor]]:
    """Let the model's head defer, and its loss function compute both; what is yielded will hold those losses."""
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    losses: list[torch.Tensor] = []

    def late(self: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        mixed = hidden.dtype != self.weight.dtype and not torch.is_autocast_enabled(hidden.device.type)
        if mixed or not (torch.is_grad_enabled() and hidden.requires_grad):
            return nn.Linear.forward(self, hidden)  # type: ignore[arg-type]
        make = partial(nn.Linear.forward, cast(nn.Linear, self))
        return defer(hidden, compute_dtype(hidden), make, self.weight)  # type: ignore[arg-type]

    def loss_function(
        logits: torch.Tensor,
        labels: torch.Tensor,
        vocab_size: int,
        num_items_in_batch: torch.Tensor | None = None,
        ignore_index: int = IGNORED,
        shift_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        targets = shift_labels if shift_labels is not None else shifted_targets(labels)
        usual = type(logits) is Deferred and logits.is_pending and ignore_index == IGNORED
        usual = usual and targets.dtype == torch.int64 and why_no_divisor(num_items_in_batch) is None
        if not usual or vocab_size != logits.shape[-1] or targets.numel() * vocab_size != logits.numel():
            stock: torch.Tensor = ForCausalLMLoss(
                computed(logits), labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs
            )
            return stock
        losses.append(_loss(cast(Deferred, logits), head, targets, num_items_in_batch, settings))
        return losses[-1]

    before = model.__dict__.get("_loss_function")
    head.__dict__["forward"] = MethodType(late, head)
    model.__dict__["_loss_function"] = loss_function
    try:
        yield losses
    finally:
        del head.__dict__["forward"]
        del model.__dict__["_loss_function"]
        if before is not None:
            model.__dict__["_loss_function"] = before


def _loss(
    logits: Deferred, head: nn.Module, targets: torch.Tensor, divisor: torch.Tensor | None, settings: EngineSettings
) -> torch.Tensor:
    hidden, weight = logits.source.hidden, head.weight
    assert isinstance(weight, torch.Tensor)
    dtype = logits.source.dtype
    return linear_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]).to(dtype),
        weight.to(dtype),
        targets.reshape(-1).to(hidden.device),
        settings.ops,
        divisor=divisor,
        chunk_tokens=settings.loss_chunk_tokens,
        logits=logits,
    )
