"""DPO: "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
https://huggingface.co/papers/2305.18290.  The reference is the model without its adapter.
"""

from typing import Literal

from pydantic import Field

from fastft.data.calculations import preferences
from fastft.data.trl_rows import PREFERENCE
from fastft.training.methods.method import Method, OfferedSettings

Loss = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip


class DpoSettings(OfferedSettings):
    """As `trl.DPOConfig` describes them."""

    beta: float | None = Field(None, gt=0)
    """How strongly the model is held to the reference."""
    loss_type: Loss | list[Loss] | None = None
    loss_weights: list[float] | None = None
    label_smoothing: float | None = Field(None, ge=0, lt=0.5)
    ld_alpha: float | None = Field(None, ge=0, le=1)
    f_divergence_type: str | None = None
    f_alpha_divergence_coef: float | None = None
    use_weighting: bool | None = None
    truncation_mode: Literal["keep_start", "keep_end"] | None = None
    precompute_ref_log_probs: bool | None = None


METHOD = Method(
    name="dpo",
    trainer="trl:DPOTrainer",
    arguments="trl:DPOConfig",
    rows=PREFERENCE,
    examples=lambda split, count, seed: preferences(split, count, seed=seed),
    settings=DpoSettings,
    measures=("rewards/accuracies", "rewards/margins"),
    learning_rate=1e-5,
    sequences=2,
    least_sequences=2,
    masks=("attention_mask",),
)
