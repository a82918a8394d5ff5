"""TRL's own head, answered by the engine.

TRL's trainers give a model a `forward` that, asked with `fused_lm_head=True`, returns each label's log-probability, and
what else a trainer wants of its logits, in place of the logits (`trl.trainer.utils.add_fused_lm_head`).  The engine
answers such a call from labelled rows only, whatever else the batch holds, in training and without gradients alike: a
reference, which is the same model with its adapters off, then goes through the same kernels as the policy.

TRL puts its `forward` over whatever is there, so the engine's own, which was there first, is put on top again when the
PEFT model around comes by, before anything else happens.

Legend: B batch, S sequence, D model, T = B·S tokens, N labelled rows.
"""

import sys
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from fastft.adapters.lora import has_hooks
from fastft.engine import inputs
from fastft.engine.attach import STATE, WeakMethod, attach, is_ours, lay_over, stands_below, take_from_below
from fastft.engine.backbone import HEAD, Stacked, backbone_forward, run_straight
from fastft.engine.log_probs import linear_log_probs
from fastft.engine.loss import IGNORED, Targets
from fastft.engine.precision import compute_dtype
from fastft.engine.state import EngineSettings, ModuleState, call_original, why_not_differentiated
from fastft.engine.support import why_no_head, why_sharded
from fastft.kernels.cross_entropy import LogitTransform
from fastft.kernels.row_statistics import NAMES, unknown
from fastft.models.spec import LayerSpec

_OF_TUNERS = (BaseTuner.forward, AdaLoraModel.forward)
"""They call the `forward` of the model inside; AdaLoRA's adds its penalty to the loss."""
_UTILS, _KERNEL = "trl.trainer.utils", "_ChunkedLogProbFunction"
_FORWARD = "add_fused_lm_head.<locals>._fused_forward"


class TrlHead(NamedTuple):
    """What a trainer asked of the head that it added."""

    transform: LogitTransform
    in_fp32: bool
    """Whether the head computes in fp32, outside of autocast."""
    statistics: tuple[str, ...]
    """Beside the log-probabilities."""
    backbone: str
    """The attribute under which TRL finds the model without its head."""
    routes: bool
    """Whether the model's configuration asks for a loss of its router."""


def trls_head(model: nn.Module) -> TrlHead | None:
    """The head that TRL added to `model`; None where it added none, or one of a release that is not known."""
    forward, state = model.__dict__.get("forward"), model.__dict__.get(STATE)
    if state is not None and type(forward) is WeakMethod:
        forward = state.original  # it was there when the model was patched
    function = getattr(forward, "__func__", None)
    code, utils = getattr(function, "__code__", None), sys.modules.get(_UTILS)
    if utils is None or code is None or (code.co_filename, code.co_qualname) != (utils.__file__, _FORWARD):
        return None
    if getattr(getattr(utils, _KERNEL, None), "__module__", None) != "trl.kernels.chunked_logprob":
        return None  # somebody's own kernel
    told = {
        name: cell.cell_contents for name, cell in zip(code.co_freevars, function.__closure__, strict=True)  # type: ignore[union-attr]
    }  # fmt: skip
    try:
        return TrlHead(
            LogitTransform(float(told["logit_scale"]), told["final_logit_softcapping"], float(told["temperature"])),
            bool(told["cast_lm_head_to_fp32"]),
            tuple(name for name in told["outputs"] if name != "log_probs"),
            told["backbone_attr"],
            bool(getattr(told["text_config"], "output_router_logits", False)),
        )
    except (KeyError, TypeError, ValueError):
        return None


def install(model: nn.Module) -> None:
    """Stand where a PEFT model comes by on its way to the model inside, until `unpatch_model`."""
    tuner = getattr(model, "base_model", None)
    if isinstance(tuner, BaseTuner) and type(tuner).forward in _OF_TUNERS and "forward" not in tuner.__dict__:
        attach(tuner, {"forward": tuner_forward})
    if type(model) is PeftModel and "get_base_model" not in model.__dict__:
        attach(model, {"get_base_model": get_base_model})  # it calls what this gives, past its tuner


def tuner_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """PEFT's tuner, which calls the `forward` of the model inside."""
    _come_first(self.model)
    return type(self).forward(self, *args, **kwargs)


def get_base_model(self: Any) -> Any:
    """The model inside a `PeftModel` that is of no task's class."""
    model = type(self).get_base_model(self)
    _come_first(model)
    return model


def _come_first(model: nn.Module) -> None:
    """Put the engine's `forward` over the one that TRL put over it."""
    if stands_below(model, "forward") and trls_head(model) is not None:
        model.__dict__[STATE].original = lay_over(model, "forward")


def why_replaced(model: nn.Module, state: ModuleState) -> str | None:
    """`state.replaced`, but for TRL's head: what that is not asked by its keyword, it hands on as it is."""
    return None if state.replaced is None or trls_head(model) is not None else state.replaced


def take_off(model: nn.Module, before: Any) -> None:
    """Remove the head that TRL added to `model`, where it did; `before` is what its `forward` was."""
    if trls_head(model) is None:
        return
    if type(model.__dict__["forward"]) is WeakMethod:
        take_from_below(model, "forward")
        model.__dict__[STATE].original = None
    else:
        del model.__dict__["forward"]
        if before is not None:
            model.__dict__["forward"] = before


def answer(model: Any, state: ModuleState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What TRL's head would answer, by the engine or by TRL's own code."""
    head = trls_head(model)
    found = None if head is None else _answer(model, head, args, kwargs)
    if found is not None:
        return found
    with state.settings.head_decided():
        return call_original(model, args, kwargs)


@torch.compiler.disable(reason="fastft's layers are compiled already: compile with fullgraph=False")
def _answer(model: Any, head: TrlHead, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """TRL's output, or None where TRL's own code has to make it; the ledger then says why."""
    state: ModuleState = model.__dict__[STATE]
    settings = state.settings
    if settings.why_stock is not None:
        return None
    with settings.reading_for(adapters_of(model)), settings.forward():
        given = dict(kwargs)
        del given["fused_lm_head"]
        labels, shifted, items = (given.pop(name, None) for name in ("labels", "shift_labels", "num_items_in_batch"))
        backbone: nn.Module = getattr(model, head.backbone)
        given = inputs.bind(backbone, args, {**given, "use_cache": False})
        reason = why_not_differentiated() or why_sharded(model)
        reason = reason or _why_not_answered(model, settings.spec, head, backbone, given, labels, shifted)
        if reason is not None:
            settings.ledger.stock(HEAD, "head_and_loss", reason)
            return None
        targets = Targets(labels) if shifted is None else Targets(shifted, shifted=True)
        return _scored(model, settings, head, backbone, given, targets, items, shifted=shifted is not None)


def _scored(
    model: Any,
    settings: EngineSettings,
    head: TrlHead,
    backbone: nn.Module,
    given: dict[str, Any],
    targets: Targets,
    items: Any,
    *,
    shifted: bool,
) -> Any:
    # Of a family without a specification the parts run fused.
    stacked = "" if settings.spec is None else run_straight(backbone, settings, given, targets)
    if isinstance(stacked, Stacked):
        hidden_BSD = stacked.hidden_BSD
    else:
        with settings.head_decided():
            hidden_BSD = backbone(**given).last_hidden_state
    output_embeddings = model.get_output_embeddings()
    weight_VD = output_embeddings.weight
    dtype = torch.float32 if head.in_fp32 else compute_dtype(hidden_BSD)
    if dtype != weight_VD.dtype and not head.in_fp32 and not torch.is_autocast_enabled(hidden_BSD.device.type):
        nn.Linear.forward(output_embeddings, hidden_BSD)  # raises what a product of two dtypes raises
    rows_N, targets_BS = targets.rows().to(hidden_BSD.device), targets.targets().to(hidden_BSD.device)
    settings.ledger.fused(HEAD, "head_and_loss", settings.ops.name)
    found = linear_log_probs(
        hidden_BSD.flatten(0, 1).to(dtype),
        weight_VD.to(dtype),
        targets_BS.flatten().clamp(min=0),  # as TRL's own does; those that are ignored are no rows
        rows_N,
        settings.ops,
        chunk_tokens=settings.loss_chunk_tokens,
        transform=head.transform,
        statistics=head.statistics,
    )

    def spread(value_N: torch.Tensor | None) -> torch.Tensor | None:
        """Each row's value in its place, zero elsewhere; without the last position, which has no next token."""
        if value_N is None:
            return None
        whole_T = value_N.new_zeros(targets_BS.numel()).index_copy(0, rows_N, value_N)
        whole_BS = whole_T.view(targets_BS.shape)
        return whole_BS if shifted else whole_BS[:, :-1]

    log_probs = spread(found.log_probs_N)
    assert log_probs is not None
    mask = targets_BS != IGNORED
    mask = mask if shifted else mask[:, :-1]
    divisor = mask.sum().clamp(min=1) if items is None else items
    statistics = zip(NAMES, map(spread, found.statistics), strict=True)
    output = sys.modules[_UTILS].FusedCausalLMOutput
    return output(loss=-log_probs.sum() / divisor, log_probs=log_probs, label_mask=mask, **dict(statistics))


def _why_not_answered(
    model: Any,
    spec: LayerSpec | None,
    head: TrlHead,
    backbone: nn.Module,
    given: dict[str, Any],
    labels: Any,
    shifted: Any,
) -> str | None:
    """Why TRL's own code has to answer, or None."""
    if (others := unknown(head.statistics)) or head.routes or given.get("output_router_logits"):
        return f"TRL's head was asked for {', '.join(others) or 'the loss of a router'}"
    if spec is not None:
        if attrgetter(spec.backbone)(model) is not backbone:
            return f"TRL's head takes another part of the model than {spec.backbone}"
        if not is_ours(backbone, backbone_forward) or has_hooks(backbone):
            return "the decoder is watched"
    if (reason := why_no_head(model.get_output_embeddings())) is not None:
        return reason
    tokens = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
    size = tokens.shape[:2] if isinstance(tokens, torch.Tensor) and tokens.dim() > 1 else None
    chosen = labels if shifted is None else shifted
    if not isinstance(chosen, torch.Tensor) or chosen.dtype != torch.int64 or chosen.shape != size:
        return "its labels are no tensor of int64, one a token"
    return None


def adapters_of(model: nn.Module) -> tuple[Any, ...]:
    """Which adapters are active; empty where all are off, or there are none."""
    first = next((module for module in model.modules() if isinstance(module, LoraLayer)), None)
    return () if first is None or first.disable_adapters else tuple(first.active_adapters)
