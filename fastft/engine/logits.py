"""Head and loss together, in models whose `forward` is their own.

While such a forward runs, its head puts a `DeferredLogits` in the logits' place.  If the loss function gets that very
object, then nothing came between head and loss, whatever the family, and both run together (`fastft.engine.loss`).  If
the forward does anything else with it, a soft-cap for one, the logits are computed there and all goes on as stock.

Legend: B batch, S sequence, D model, V vocabulary.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map
from transformers.loss.loss_utils import ForCausalLMLoss

from fastft.engine.loss import IGNORED, linear_cross_entropy, shifted_targets
from fastft.engine.state import EngineSettings, compute_dtype, original_forward, state_of
from fastft.engine.support import why_no_head, why_no_loss

_READS_NO_LOGIT = {
    getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda")
} | {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.is_floating_point, torch.Tensor.__len__}


class DeferredLogits(torch.Tensor):
    """Logits (B × S × V) that are computed when somebody uses them; has their shape and dtype, and no memory."""

    @staticmethod
    def __new__(cls, head: nn.Module, hidden: torch.Tensor, dtype: torch.dtype) -> "DeferredLogits":
        """What `head` makes of `hidden` (B × S × D), as `dtype`."""
        shape = (*hidden.shape[:-1], head.weight.shape[0])  # type: ignore[index]
        make = torch.Tensor._make_wrapper_subclass
        made: DeferredLogits = make(cls, shape, dtype=dtype, device=hidden.device)
        return made

    def __init__(self, head: nn.Module, hidden: torch.Tensor, dtype: torch.dtype) -> None:
        kind = hidden.device.type
        self.head, self.hidden = head, hidden
        self.compute_dtype = compute_dtype(hidden)
        self._autocast = torch.autocast(
            kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind)
        )
        self._logits: torch.Tensor | None = None

    @property
    def is_pending(self) -> bool:
        """Whether nobody has used a logit yet."""
        return self._logits is None

    def compute(self) -> torch.Tensor:
        """The logits, differentiable, as the head would have computed them when it was called."""
        if self._logits is None:
            with self._autocast, torch.enable_grad():
                self._logits = nn.Linear.forward(self.head, self.hidden).to(self.dtype)  # type: ignore[arg-type]
        return self._logits

    def __repr__(self) -> str:  # type: ignore[override]
        return repr(self.compute())

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS_NO_LOGIT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if not kwargs and len(args) == 1 and type(args[0]) is cls and args[0].is_pending:
            # What forwards do on the way to the loss, which is computed in fp32 whatever the logits' dtype.
            if func is torch.Tensor.contiguous:
                return args[0]
            if func is torch.Tensor.float:
                return args[0].as_float()
        args, kwargs = tree_map(_computed, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        # Below autograd, where computing the logits would lose their gradient in silence.
        raise NotImplementedError(f"{func} was called on logits that were not computed")

    def as_float(self) -> "DeferredLogits":
        """The same logits in fp32."""
        made = DeferredLogits(self.head, self.hidden, torch.float32)
        made.compute_dtype, made._autocast = self.compute_dtype, self._autocast
        return made


def _computed(value: Any) -> Any:
    return value.compute() if type(value) is DeferredLogits else value


DEFERRING_FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {}
"""Those that were made so far, by the model's class."""


def deferring_forward_of(model_class: type[nn.Module]) -> Callable[..., Any]:
    """The `forward` for models of this class.  It has their own's signature, by which trainers choose columns."""
    if model_class not in DEFERRING_FORWARDS:

        @functools.wraps(model_class.forward)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return _deferring_forward(self, *args, **kwargs)

        DEFERRING_FORWARDS[model_class] = forward
    return DEFERRING_FORWARDS[model_class]


def _deferring_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    state = state_of(self)
    original = original_forward(self)
    if not (self.training and torch.is_grad_enabled()) or _labels(original, args, kwargs) is None:
        return original(*args, **kwargs)
    ledger = state.settings.ledger
    reason = state.replaced or why_not_together(self)
    if reason is not None:
        ledger.stock(state.name, "head_and_loss", reason)
        return original(*args, **kwargs)
    with _deferred(self, state.settings) as losses:
        output = original(*args, **kwargs)
    if losses:
        ledger.fused(state.name, "head_and_loss", state.settings.ops.name)
    else:
        ledger.stock(state.name, "head_and_loss", "the loss is not the cross-entropy of the head's own output")
    return output


def why_not_together(model: nn.Module) -> str | None:
    """Why head and loss of this model cannot run together, or None where its forward decides."""
    return why_no_loss(model) or why_no_head(model.get_output_embeddings())  # type: ignore[operator]


def _labels(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if "labels" in kwargs or not args:
        return kwargs.get("labels")
    return inspect.signature(original).bind_partial(*args, **kwargs).arguments.get("labels")


@contextmanager
def _deferred(model: nn.Module, settings: EngineSettings) -> Iterator[list[torch.Tensor]]:
    """Let the model's head defer, and its loss function compute both; what is yielded will hold those losses."""
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    losses: list[torch.Tensor] = []

    def defer(self: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        if not (torch.is_grad_enabled() and hidden.requires_grad):
            return nn.Linear.forward(self, hidden)  # type: ignore[arg-type]
        return DeferredLogits(self, hidden, compute_dtype(hidden))

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
        usual = type(logits) is DeferredLogits and logits.is_pending and ignore_index == IGNORED
        if not usual or vocab_size != logits.shape[-1] or targets.numel() * vocab_size != logits.numel():
            stock: torch.Tensor = ForCausalLMLoss(
                _computed(logits), labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs
            )
            return stock
        losses.append(_loss(logits, targets, num_items_in_batch, settings))  # type: ignore[arg-type]
        return losses[-1]

    before = model.__dict__.get("_loss_function")
    head.__dict__["forward"] = MethodType(defer, head)
    model.__dict__["_loss_function"] = loss_function
    try:
        yield losses
    finally:
        del head.__dict__["forward"]
        del model.__dict__["_loss_function"]
        if before is not None:
            model.__dict__["_loss_function"] = before


def _loss(
    logits: DeferredLogits, targets: torch.Tensor, divisor: torch.Tensor | None, settings: EngineSettings
) -> torch.Tensor:
    hidden, weight, dtype = logits.hidden, logits.head.weight, logits.compute_dtype
    assert isinstance(weight, torch.Tensor)
    return linear_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]).to(dtype),
        weight.to(dtype),
        targets.reshape(-1).to(hidden.device),
        settings.ops,
        divisor=divisor,
        chunk_tokens=settings.loss_chunk_tokens,
    )
