"""Each method's measure on held-out rows, trained as it should be and on shuffled preferences, answers or rewards.

The difference must be more than three standard errors of it, over three seeds:
(mean − mean of shuffled) / √(s²/3 + s'²/3), with s and s' the sample deviations.  What was found is in docs/methods.md.
"""

import json
import math
import random
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fastft.config import RunConfig
from fastft.data import arithmetic, calculations
from fastft.training.trainer import train

SEEDS = (1, 2, 3)
REWARDS = """
import random
from fastft.data.calculations import right_answer

def right(completions, answer, **_):
    return right_answer(completions, answer)

def shuffled(completions, answer, **_):
    rewards = right_answer(completions, answer)
    random.shuffle(rewards)
    return rewards
"""


@dataclass(frozen=True)
class Case:
    """How a method is trained here; as fast as shows it surely on the embedded model."""

    measure: str
    steps: int
    learning_rate: float
    batch: int = 16
    settings: dict[str, Any] = field(default_factory=dict)


GROUPS = {"num_generations": 8, "num_generations_eval": 4}
CASES = {
    "sft": Case("loss", steps=40, learning_rate=2e-3, batch=8),
    "dpo": Case("rewards/margins", steps=20, learning_rate=5e-4),
    "orpo": Case("rewards/margins", steps=20, learning_rate=1e-3),
    "kto": Case("rewards/margins", steps=20, learning_rate=5e-4, batch=32),
    "reward": Case("margin", steps=60, learning_rate=1e-3, batch=32),
    "grpo": Case("reward", steps=20, learning_rate=1e-3, batch=64, settings=GROUPS),
    "rloo": Case("reward", steps=16, learning_rate=1e-3, batch=64, settings=GROUPS),
    "ppo": Case("objective/scores", steps=12, learning_rate=2e-3, batch=32),
}


def rows_of(method: str, count: int, seed: int, *, shuffled: bool) -> list[dict[str, Any]]:
    drawn = random.Random(seed)
    if method == "sft":
        rows = arithmetic.generate("train", count, seed=seed)
        answers = [row["output"] for row in rows]
        if shuffled:
            drawn.shuffle(answers)
        return [{**row, "output": answer} for row, answer in zip(rows, answers, strict=True)]
    if method == "kto":
        made = calculations.judgements("train", count, seed=seed)
        labels = [row["label"] for row in made]
        if shuffled:
            drawn.shuffle(labels)
        return [{**row, "label": label} for row, label in zip(made, labels, strict=True)]
    if method in ("grpo", "rloo", "ppo"):
        return calculations.questions("train", count, seed=seed)
    pairs = calculations.preferences("train", count, seed=seed)
    if shuffled:
        for row in pairs:
            if drawn.random() < 0.5:
                row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    return pairs


def measured(method: str, seed: int, folder: Path, *, shuffled: bool) -> float:
    """The method's measure after training; more is better."""
    case = CASES[method]
    folder.mkdir()
    groups = case.settings.get("num_generations", 1)
    rows = rows_of(method, case.batch // groups * case.steps, seed, shuffled=shuffled)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    flags: dict[str, Any] = {"settings": dict(case.settings)}
    if method in ("grpo", "rloo", "ppo"):
        (folder / "rewards.py").write_text(REWARDS, encoding="utf-8")
        flags["reward"] = (f"{folder / 'rewards.py'}:{'shuffled' if shuffled else 'right'}",)
        flags["settings"]["response_length" if method == "ppo" else "max_completion_length"] = 6
    config = RunConfig.load(
        method=method, data=str(folder / "rows.jsonl"), eval_data="embedded", output=str(folder / "run"), seed=seed,
        device="cpu", plan="none", batch_size=case.batch, micro_batch=case.batch, steps=case.steps,
        learning_rate=case.learning_rate, sequence_tokens=128, log_steps=1000, **flags,
    )  # fmt: skip
    result = train(config)
    assert result.measure is not None
    return -result.measure["loss"] if case.measure == "loss" else result.measure[case.measure]


@pytest.mark.slow
@pytest.mark.timeout(900)  # a machine that is busy with something else takes four times as long
@pytest.mark.parametrize(
    "method",
    CASES,
)
def test_the_measure_rises_over_what_shuffled_gives(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTFT_CACHE_DIR", str(tmp_path / "cache"))
    right, other = (
        [measured(method, seed, tmp_path / f"{seed}-{shuffled}", shuffled=shuffled) for seed in SEEDS]
        for shuffled in (False, True)
    )
    error = math.sqrt((statistics.variance(right) + statistics.variance(other)) / len(SEEDS))
    rise = statistics.mean(right) - statistics.mean(other)
    print(f"\n{method}: {right} against {other}: {rise:.4f} ± {error:.4f}")
    assert rise > 3 * error
