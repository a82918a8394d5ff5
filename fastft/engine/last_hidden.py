"""A model without its head: the last hidden states, for a value or a score that is made of them.

Asked through here, a patched model runs the same kernels with and without gradients, as it does for what TRL's head is
asked, and what is read of it is kept apart for each set of active adapters: a policy and its value, which are two
adapters on one base, do not make each other be read anew.

Legend: B batch, S sequence, D model.
"""

from operator import attrgetter
from typing import Any

import torch
from torch import nn

from fastft.adapters.lora import has_hooks
from fastft.engine import inputs
from fastft.engine.attach import STATE, is_ours
from fastft.engine.backbone import Stacked, backbone_forward, run_straight
from fastft.engine.loss import IGNORED, Targets
from fastft.engine.patch import base_model
from fastft.engine.state import EngineSettings, ModuleState, why_not_differentiated
from fastft.engine.support import why_sharded
from fastft.engine.trl_head import adapters_of


def last_hidden_states(model: nn.Module, ids_BS: torch.Tensor, mask_BS: torch.Tensor) -> torch.Tensor:
    """Behind the final norm (B × S × D, the dtype that the model computes in); what is at padding does not matter.

    Args:
        model: a Hugging Face model with head, or the `PeftModel` around it, patched or not.
        ids_BS: tokens (int64).
        mask_BS: which of them are real; padding is on the right.
    """
    inside = base_model(model)
    backbone: nn.Module = inside.base_model
    given = {"input_ids": ids_BS, "attention_mask": mask_BS.long(), "use_cache": False}
    state: ModuleState | None = inside.__dict__.get(STATE)
    if state is None:
        return _stock(backbone, given)
    settings = state.settings
    with settings.reading_for(adapters_of(inside)), settings.forward(), settings.head_decided():
        if not _runs_straight(inside, backbone, settings):
            return _stock(backbone, given)
        bound = inputs.bind(backbone, (), given)
        # Every real position may be looked at, and no other: padding can be left out.
        targets = Targets(torch.where(mask_BS, 0, IGNORED), shifted=True)
        stacked = run_straight(backbone, settings, bound, targets)
        return stacked.hidden_BSD if isinstance(stacked, Stacked) else _stock(backbone, given)


def _runs_straight(inside: Any, backbone: nn.Module, settings: EngineSettings) -> bool:
    """Whether the engine may run the decoder itself; else the decoder's own forward decides, and tells the ledger."""
    return (
        settings.spec is not None
        and settings.why_stock is None
        and attrgetter(settings.spec.backbone)(inside) is backbone
        and is_ours(backbone, backbone_forward)
        and not has_hooks(backbone)
        and why_not_differentiated() is None
        and why_sharded(inside) is None
    )


def _stock(backbone: nn.Module, given: dict[str, Any]) -> torch.Tensor:
    hidden_BSD: torch.Tensor = backbone(**given).last_hidden_state
    return hidden_BSD
