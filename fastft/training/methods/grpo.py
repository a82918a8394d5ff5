"""GRPO: "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
https://huggingface.co/papers/2402.03300.
"""

from typing import Literal

from pydantic import Field

from fastft.data.calculations import questions
from fastft.data.trl_rows import PROMPT
from fastft.training.methods.method import Method, SampledSettings


class GrpoSettings(SampledSettings):
    """As `trl.GRPOConfig` describes them."""

    loss_type: Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"] | None = None
    scale_rewards: Literal["group", "batch", "none"] | bool | None = None
    delta: float | None = Field(None, gt=1)
    importance_sampling_level: Literal["token", "sequence"] | None = None
    top_entropy_quantile: float | None = Field(None, gt=0, le=1)


METHOD = Method(
    name="grpo",
    trainer="trl:GRPOTrainer",
    arguments="trl:GRPOConfig",
    rows=PROMPT,
    examples=lambda split, count, seed: questions(split, count, seed=seed),
    settings=GrpoSettings,
    measures=("reward",),
    learning_rate=1e-5,
    takes_rewards=True,
    example_settings={"max_completion_length": 8},
)
