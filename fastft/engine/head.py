"""The causal language model's `forward`: head and loss together, logits on demand."""

import functools
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
import transformers.modeling_outputs as outputs_of
from torch import nn

from fastft.adapters.lora import has_hooks
from fastft.engine import inputs
from fastft.engine.attach import STATE, is_ours
from fastft.engine.backbone import HEAD, Stacked, backbone_forward, run_straight
from fastft.engine.deferred import defer
from fastft.engine.loss import IGNORED, Targets, linear_cross_entropy
from fastft.engine.precision import compute_dtype
from fastft.engine.state import (
    EngineSettings,
    ModuleState,
    call_original,
    why_not_differentiated,
)
from fastft.engine.support import NO_LABELS, why_no_divisor, why_no_head, why_no_loss, why_other_head, why_sharded
from fastft.engine.trl_head import answer, why_replaced
from fastft.kernels.cross_entropy import LogitTransform
from fastft.models.identity import why_other_class
from fastft.models.kv_cache import KV_CACHE
from fastft.models.spec import LayerSpec

_STOCKS_CALL = ("input_ids", "attention_mask", "position_ids", KV_CACHE, "inputs_embeds", "use_cache")


@functools.cache
def causal_lm_forward_of(kind: Any) -> Callable[..., Any]:
    """The `forward` for models of this class.  It has their own's signature, by which trainers choose columns."""

    @functools.wraps(kind.forward)
    def causal_lm_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state: ModuleState | None = self.__dict__.get(STATE)
        if state is not None and kwargs.get("fused_lm_head"):
            return answer(self, state, args, kwargs)
        if state is None or not torch.is_grad_enabled() or state.settings.why_stock is not None:
            return call_original(self, args, kwargs)
        return _causal_lm(self, state, args, kwargs)

    return causal_lm_forward


@torch.compiler.disable(reason="fastft's layers are compiled already: compile with fullgraph=False")
def _causal_lm(self: nn.Module, state: ModuleState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    settings = state.settings
    with settings.forward():
        reason = why_not_differentiated() or why_sharded(self)
        if reason is not None:
            settings.ledger.whole(reason)
            with settings.stock_only(reason):
                return call_original(self, args, kwargs)
        given = inputs.bind(self, args, kwargs)
        reason = why_replaced(self, state) or _why_not_together(self, settings.spec, given)
        if reason is None:
            return _together(self, settings, given)
        with settings.head_decided():
            note = settings.ledger.expected if reason == NO_LABELS else settings.ledger.stock
            note(HEAD, "head_and_loss", reason)
            return call_original(self, args, kwargs)


def _together(model: nn.Module, settings: EngineSettings, given: dict[str, Any]) -> Any:
    """Loss, and what else there is, of a model whose head and loss run together."""
    spec = settings.spec
    given = dict(given)
    labels, shifted = given.pop("labels"), given.pop("shift_labels", None)
    for name in ("logits_to_keep", "ignore_index"):
        given.pop(name, None)
    targets = Targets(labels) if shifted is None else Targets(shifted, shifted=True)
    backbone: nn.Module = attrgetter(spec.backbone)(model)
    stacked: Stacked | str = "the decoder is watched"
    if is_ours(backbone, backbone_forward) and not has_hooks(backbone):
        stacked = run_straight(backbone, settings, given, targets)
    if isinstance(stacked, Stacked):
        hidden, cache, more = stacked.hidden_BSD, stacked.cache, {}
    else:
        with settings.head_decided():
            # As stock's forward calls it, for whoever looks.
            given.pop("return_dict", None)
            named = {name: given.pop(name, None) for name in _STOCKS_CALL}
            outputs = backbone(**named, **given)
        hidden, cache = outputs.last_hidden_state, outputs.get(KV_CACHE)
        more = {"hidden_states": outputs.hidden_states, "attentions": outputs.attentions}
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    weight = head.weight
    assert isinstance(weight, torch.Tensor)
    transform = logit_transform(model.config, spec)
    autocast = torch.is_autocast_enabled(hidden.device.type)
    dtype = compute_dtype(hidden) if autocast else weight.dtype
    if not autocast and hidden.dtype != weight.dtype:
        nn.Linear.forward(head, hidden)  # type: ignore[arg-type]  # raises what stock's raises
    settings.ledger.fused(HEAD, "head_and_loss", settings.ops.name)
    rows_N = targets.rows().to(hidden.device)
    items = given.get("num_items_in_batch")
    logits = defer(
        hidden, dtype, lambda x: transformed(nn.Linear.forward(head, x), transform), weight,  # type: ignore[arg-type]
        stacked.left_out if isinstance(stacked, Stacked) else None,
    )  # fmt: skip
    loss = linear_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]).to(dtype),
        weight.to(dtype),
        targets.targets().reshape(-1).to(hidden.device),
        settings.ops,
        divisor=items,
        chunk_tokens=settings.loss_chunk_tokens,
        transform=transform,
        rows_N=rows_N,
        logits=logits,
    )
    output = getattr(outputs_of, spec.model_output)
    return output(loss=loss, logits=logits, **{KV_CACHE: cache}, **more)


def logit_transform(config: Any, spec: LayerSpec) -> LogitTransform:
    """What a model of this configuration does to its logits before the softmax."""
    divisor = 1.0 if spec.logit_divisor is None else getattr(config, spec.logit_divisor)
    return LogitTransform(1.0 / divisor, None if spec.logit_softcap is None else getattr(config, spec.logit_softcap))


def transformed(logits: torch.Tensor, transform: LogitTransform) -> torch.Tensor:
    """The transform by itself, on logits of any shape, as Hugging Face's models do it."""
    if transform.multiplier != 1.0:
        logits = logits * transform.multiplier
    return logits if transform.softcap is None else torch.tanh(logits / transform.softcap) * transform.softcap


def _why_not_together(model: Any, spec: LayerSpec, given: dict[str, Any]) -> str | None:
    """Why head and loss of this call cannot run together, or None."""
    labels, keep = given.get("labels"), given.get("logits_to_keep", 0)
    if labels is None:
        return NO_LABELS
    tokens = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
    size = tokens.shape[:2] if isinstance(tokens, torch.Tensor) else None
    reason = why_other_class(model, spec.module, spec.model_class)
    if reason is not None:
        return reason
    head = model.get_output_embeddings()
    reason = why_other_head(model, head) or why_no_head(head) or why_no_loss(model)
    if reason is not None:
        return reason
    if given.get("return_dict") is False or (given.get("return_dict") is None and not model.config.return_dict):
        return "a tuple was asked for"
    if not (isinstance(keep, int) and keep == 0):
        return "only some logits were asked for"
    if given.get("ignore_index") not in (None, IGNORED):
        return "another ignore_index was asked for"
    for name in ("labels", "shift_labels"):
        value = given.get(name)
        if value is None:
            continue
        if not (isinstance(value, torch.Tensor) and value.dim() == 2):
            return f"{name} are no B × S tensor"
        if value.dtype != torch.int64 or value.shape != size:
            return f"{name} are {tuple(value.shape)} {value.dtype}"
    reason = why_no_divisor(given.get("num_items_in_batch"))
    if reason is not None:
        return reason
    if getattr(model.config, "vocab_size", None) != head.weight.shape[0]:
        return "the head has another size than the vocabulary"
    return None
