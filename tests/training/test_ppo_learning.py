"""PPO learns what it is rewarded for, and nothing from rewards that are shuffled."""

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ppo_runs import fused, lora, make

TRAINED = [{"prompt": f"{number} and {number + 3}" + " make" * (number % 3)} for number in range(48)]
HELD_OUT = [{"prompt": f"{number} and {number + 5}" + " make" * (number % 2)} for number in range(50, 90)]


def share_of_digits(completions: list[str], **_: Any) -> list[float]:
    """Of a completion's letters."""
    return [sum(letter.isdigit() for letter in text) / max(len(text), 1) for text in completions]


class Shuffled:
    """The same rewards, each another completion's."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.default_rng(seed)

    def __call__(self, completions: list[str], **_: Any) -> list[float]:
        return list(self._generator.permutation(share_of_digits(completions)))


def measure(reward: Any, seed: int, folder: Path) -> list[float]:
    """The share of digits in answers to prompts that were not trained on, after training for `reward`."""
    with fused(True):
        trainer = make(
            folder, reward_funcs=reward, train_dataset=TRAINED, seed=seed, max_steps=12, peft_config=lora(),
            per_device_train_batch_size=24, response_length=10, learning_rate=4e-3, num_ppo_epochs=3, kl_coef=0.02,
        )  # fmt: skip
        trainer.train()
        torch.manual_seed(seed)
        responses, lengths = trainer.actor._sample(
            trainer.actor._prompt_ids([trainer.processing_class(row["prompt"]) for row in HELD_OUT * 2]), greedy=False
        )
    answers = [ids[:count] for ids, count in zip(responses.tolist(), lengths.tolist(), strict=True)]
    return share_of_digits(trainer.processing_class.batch_decode(answers, skip_special_tokens=True))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_measure_rises_on_held_out_prompts(seed, tmp_path):
    learnt, shuffled = (measure(reward, seed, tmp_path) for reward in (share_of_digits, Shuffled(seed)))
    difference = statistics.mean(learnt) - statistics.mean(shuffled)
    error = (statistics.variance(learnt) / len(learnt) + statistics.variance(shuffled) / len(shuffled)) ** 0.5
    print(f"{statistics.mean(learnt):.3f} against {statistics.mean(shuffled):.3f}, standard error {error:.3f}")
    assert difference > 3 * error
