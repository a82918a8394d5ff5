"""ORPO without all logits: TRL's takes the softmax of every token of a batch, over the whole vocabulary.

Source of the method: "ORPO: Monolithic Preference Optimization without Reference Model",
https://huggingface.co/papers/2403.07691; its loss is TRL's `odds_ratio_loss`, which is called as it is.

Legend: B prompts, S tokens a row; a batch has 2·B rows, the chosen and then the rejected.
"""

from typing import Any

import torch
from pydantic import Field

from fastft.data.calculations import preferences
from fastft.data.trl_rows import PREFERENCE
from fastft.engine.attach import WeakMethod
from fastft.engine.loss import IGNORED
from fastft.engine.patch import base_model
from fastft.engine.trl_head import take_off
from fastft.training.methods.method import Method, OfferedSettings

_NAME = "concatenated_forward"
_BEFORE = "_fastft_forward_before"
"""Where a trainer keeps what its model's `forward` was."""
_STATISTICS = ("log_probs", "mean_logits")


class OrpoSettings(OfferedSettings):
    """As `trl.experimental.orpo.ORPOConfig` describes them."""

    beta: float | None = Field(None, gt=0)
    """Weight of the odds ratio's loss: λ in the paper."""


METHOD = Method(
    name="orpo",
    trainer="trl.experimental.orpo:ORPOTrainer",
    arguments="trl.experimental.orpo:ORPOConfig",
    rows=PREFERENCE,
    examples=lambda split, count, seed: preferences(split, count, seed=seed),
    settings=OrpoSettings,
    measures=("rewards/accuracies", "rewards/margins"),
    learning_rate=1e-5,
    sequences=2,
    least_sequences=2,
    masks=("chosen_attention_mask", "rejected_attention_mask"),
)


def put_in(trainer: Any) -> bool:
    """Give this trainer a step that asks for log-probabilities, and say whether; not where its own was replaced, or its
    model is none that the step is for."""
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer
    from trl.trainer.utils import add_fused_lm_head

    its_own = type(trainer).concatenated_forward is not ORPOTrainer.concatenated_forward
    if its_own or _NAME in trainer.__dict__ or trainer.is_encoder_decoder or trainer.aux_loss_enabled:
        return False
    model = base_model(trainer.model)
    trainer.__dict__[_BEFORE] = model.__dict__.get("forward")
    add_fused_lm_head(model, outputs=_STATISTICS)
    trainer.__dict__[_NAME] = WeakMethod(concatenated_forward, trainer, _NAME)
    return True


def take_out(trainer: Any) -> None:
    """Give the trainer TRL's step again, and its model what was there before."""
    if type(trainer.__dict__.get(_NAME)) is not WeakMethod:
        return
    del trainer.__dict__[_NAME]
    take_off(base_model(trainer.model), trainer.__dict__.pop(_BEFORE))


def concatenated_forward(trainer: Any, model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """What `ORPOTrainer.concatenated_forward` returns: mean log-probabilities (B) of the chosen and of the rejected
    answers, logits of both, and the chosen rows' cross-entropy.

    Of the logits TRL takes the mean, so each position has the mean of its own here (B × S−1).
    """
    joined = trainer.concatenated_inputs(
        batch, is_encoder_decoder=False, padding_value=trainer.padding_value, device=trainer.accelerator.device
    )
    ids, mask = joined["concatenated_input_ids"], joined["concatenated_attention_mask"]
    # Every position is scored, padding too: TRL's means of logits are over all of them.
    scored = model(ids, attention_mask=mask, labels=ids, use_cache=False, fused_lm_head=True)
    log_probs, means = scored.log_probs, scored.mean_logits
    chosen = len(batch["chosen_labels"])
    prompt_and_answer = (mask[:chosen, 1:] == 1) & (ids[:chosen, 1:] != IGNORED)
    # The mean over tokens, and NaN where there is none, as PyTorch's cross-entropy.
    nll_loss = -(log_probs[:chosen] * prompt_and_answer).sum() / prompt_and_answer.sum()
    answer = joined["concatenated_labels"][:, 1:] != IGNORED
    logps = (log_probs * answer).sum(-1) / answer.sum(-1)
    return logps[:chosen], logps[chosen:], means[:chosen], means[chosen:], nll_loss
