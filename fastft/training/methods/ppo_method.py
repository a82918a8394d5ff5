"""PPO: "Fine-Tuning Language Models from Human Preferences", https://huggingface.co/papers/1909.08593.  TRL has no
trainer for it any more, so the trainer is fastft's (`fastft.training.methods.ppo`).
"""

from typing import Literal

from pydantic import Field

from fastft.data.calculations import questions
from fastft.data.trl_rows import PROMPT
from fastft.training.methods.method import Method, MethodSettings


class PpoSettings(MethodSettings):
    """As `fastft.PPOConfig` describes them, which has TRL 1.10's."""

    response_length: int | None = Field(None, ge=1)
    """In tokens."""
    temperature: float | None = Field(None, gt=0)
    stop_token: Literal["eos"] | None = None
    num_ppo_epochs: int | None = Field(None, ge=1)
    num_mini_batches: int | None = Field(None, ge=1)
    local_rollout_forward_batch_size: int | None = Field(None, ge=1)
    kl_coef: float | None = Field(None, ge=0)
    kl_estimator: Literal["k1", "k3"] | None = None
    cliprange: float | None = Field(None, gt=0)
    vf_coef: float | None = Field(None, ge=0)
    cliprange_value: float | None = Field(None, gt=0)
    gamma: float | None = Field(None, ge=0, le=1)
    lam: float | None = Field(None, ge=0, le=1)
    missing_eos_penalty: float | None = Field(None, gt=0)
    whiten_rewards: bool | None = None


METHOD = Method(
    name="ppo",
    trainer="fastft.training.methods.ppo:PPOTrainer",
    arguments="fastft.training.methods.ppo:PPOConfig",
    rows=PROMPT,
    examples=lambda split, count, seed: questions(split, count, seed=seed),
    settings=PpoSettings,
    measures=("objective/scores",),
    learning_rate=3e-5,
    takes_rewards=True,
    adapts=False,
    policy="policy",
    example_settings={"response_length": 8},
)
