"""RLOO: "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs",
https://huggingface.co/papers/2402.14740.
"""

from fastft.data.calculations import questions
from fastft.data.trl_rows import PROMPT
from fastft.training.methods.method import Method, SampledSettings


class RlooSettings(SampledSettings):
    """As `trl.RLOOConfig` describes them."""

    normalize_advantages: bool | None = None
    reward_clip_range: tuple[float, float] | None = None


METHOD = Method(
    name="rloo",
    trainer="trl:RLOOTrainer",
    arguments="trl:RLOOConfig",
    rows=PROMPT,
    examples=lambda split, count, seed: questions(split, count, seed=seed),
    settings=RlooSettings,
    measures=("reward",),
    learning_rate=1e-5,
    takes_rewards=True,
    example_settings={"max_completion_length": 8},
)
