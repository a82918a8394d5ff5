"""Reward models: a head that scores a sequence, trained on pairs by the loss of Bradley and Terry, as in "Training
language models to follow instructions with human feedback", https://huggingface.co/papers/2203.02155.

The head is saved with the adapter, by PEFT's `modules_to_save`.
"""

from pydantic import Field

from fastft.data.calculations import preferences
from fastft.data.trl_rows import SCORED_PAIR
from fastft.training.methods.method import Method, OfferedSettings


class RewardSettings(OfferedSettings):
    """As `trl.RewardConfig` describes them."""

    center_rewards_coefficient: float | None = Field(None, ge=0)


METHOD = Method(
    name="reward",
    trainer="trl:RewardTrainer",
    arguments="trl:RewardConfig",
    rows=SCORED_PAIR,
    examples=lambda split, count, seed: preferences(split, count, seed=seed),
    settings=RewardSettings,
    measures=("accuracy", "margin"),
    learning_rate=1e-4,
    sequences=2,
    least_sequences=2,
    masks=("attention_mask",),
    task="SEQ_CLS",
)
