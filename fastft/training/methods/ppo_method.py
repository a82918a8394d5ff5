"""PPO: "Fine-Tuning Language Models from Human Preferences", https://huggingface.co/papers/1909.08593.  TRL has no
trainer for it any more, so the trainer is fastft's (`fastft.training.methods.ppo`).
"""

from pydantic import Field

from fastft.data.calculations import questions
from fastft.data.trl_rows import PROMPT
from fastft.training.methods.method import Method, MethodSettings


class PpoSettings(MethodSettings):
    """As TRL 1.10's `PPOConfig` described them."""

    num_ppo_epochs: int | None = Field(None, ge=1)
    num_mini_batches: int | None = Field(None, ge=1)
    response_length: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, gt=0)
    kl_coef: float | None = Field(None, ge=0)
    cliprange: float | None = Field(None, gt=0)
    vf_coef: float | None = Field(None, ge=0)
    cliprange_value: float | None = Field(None, gt=0)
    gamma: float | None = Field(None, ge=0, le=1)
    lam: float | None = Field(None, ge=0, le=1)
    missing_eos_penalty: float | None = None
    whiten_rewards: bool | None = None


METHOD = Method(
    name="ppo",
    trainer="fastft.training.methods.ppo:PPOTrainer",
    arguments="fastft.training.methods.ppo:PPOConfig",
    rows=PROMPT,
    examples=lambda split, count, seed: questions(split, count, seed=seed),
    settings=PpoSettings,
    measures=("reward",),
    learning_rate=1e-5,
    takes_rewards=True,
    example_settings={"response_length": 8},
)
