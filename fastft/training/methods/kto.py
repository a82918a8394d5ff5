"""KTO: "KTO: Model Alignment as Prospect Theoretic Optimization", https://huggingface.co/papers/2402.01306.

TRL trains on the rows in their order, whatever the seed: its KL term pairs each with its neighbour in a micro-batch.
"""

from typing import Literal

from pydantic import Field

from fastft.data.calculations import judgements
from fastft.data.trl_rows import JUDGEMENT
from fastft.training.methods.method import Method, OfferedSettings


class KtoSettings(OfferedSettings):
    """As `trl.KTOConfig` describes them."""

    beta: float | None = Field(None, gt=0)
    """How strongly the model is held to the reference."""
    loss_type: Literal["kto", "apo_zero_unpaired"] | None = None
    desirable_weight: float | None = Field(None, gt=0)
    undesirable_weight: float | None = Field(None, gt=0)
    precompute_ref_log_probs: bool | None = None


METHOD = Method(
    name="kto",
    trainer="trl:KTOTrainer",
    arguments="trl:KTOConfig",
    rows=JUDGEMENT,
    examples=lambda split, count, seed: judgements(split, count, seed=seed),
    settings=KtoSettings,
    measures=("rewards/margins",),
    learning_rate=1e-5,
    least_sequences=2,
    masks=("attention_mask",),
)
