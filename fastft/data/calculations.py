"""Calculations with a right and a wrong answer: the data that ships as `embedded` for methods other than SFT.

The embedded model was pretrained on lists of calculations, so it continues `68 - 63 =` with the right number about half
of the time: enough for a reward to be seen, and little enough for training to have something to teach.

    preferences    {"prompt": "68 - 63 =", "chosen": " 5", "rejected": " 41"}
    judgements     {"prompt": "68 - 63 =", "completion": " 41", "label": False}
    questions      {"prompt": "68 - 63 =", "answer": 5}, for the reward `right_answer`

Training and test rows never share a calculation (`fastft.data.arithmetic.split_of`).
"""

import re
from collections.abc import Sequence
from random import Random
from typing import Any

from fastft.data.arithmetic import LARGEST, Split, calculation, split_of
from fastft.errors import DataError

MAX_CALCULATIONS = {"train": 4096, "test": 512}
"""The most rows that one call makes: somewhat fewer than there are."""

_NUMBER = re.compile(r"\s*(\d+)")


def calculations(split: Split, count: int, *, seed: int = 0) -> list[tuple[str, int, int]]:
    """`count` distinct calculations as (prompt, right answer, wrong answer); equal arguments give equal ones.

    Raises:
        DataError: an unknown split, or a count outside 1..`MAX_CALCULATIONS`.
    """
    if split not in MAX_CALCULATIONS:
        raise DataError("split is unknown", got=split, allowed=list(MAX_CALCULATIONS), fix="choose one of them")
    if not 1 <= count <= MAX_CALCULATIONS[split]:
        raise DataError(
            "count is out of range", got=count, allowed=f"1 to {MAX_CALCULATIONS[split]}", fix="ask for fewer rows"
        )
    random = Random(f"fastft calculations {split} {seed}")
    found: dict[str, tuple[str, int, int]] = {}
    while len(found) < count:
        left, operator, right, result = calculation(random, "+-×", least=1)
        if split_of(operator, (left, right)) == split:
            wrong = random.choice([number for number in range(LARGEST + 1) if number != result])
            prompt = f"{left} {operator} {right} ="
            found.setdefault(prompt, (prompt, result, wrong))
    return list(found.values())


def preferences(split: Split, count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with prompt, chosen and rejected: the right answer is chosen.

    Raises:
        DataError: as `calculations`.
    """
    made = calculations(split, count, seed=seed)
    return [{"prompt": prompt, "chosen": f" {right}", "rejected": f" {wrong}"} for prompt, right, wrong in made]


def judgements(split: Split, count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with prompt, completion and label, true and false in turns.

    Raises:
        DataError: as `calculations`.
    """
    made = calculations(split, count, seed=seed)
    return [
        {"prompt": prompt, "completion": f" {wrong if row % 2 else right}", "label": row % 2 == 0}
        for row, (prompt, right, wrong) in enumerate(made)
    ]


def questions(split: Split, count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with prompt and answer, which `right_answer` rewards.

    Raises:
        DataError: as `calculations`.
    """
    return [{"prompt": prompt, "answer": right} for prompt, right, _ in calculations(split, count, seed=seed)]


def right_answer(completions: Sequence[str], answer: Sequence[int], **_: Any) -> list[float]:
    """A reward of GRPO's signature: 1 for a completion that begins with the right number, else 0."""
    rewards = []
    for completion, right in zip(completions, answer, strict=True):
        number = _NUMBER.match(completion)
        rewards.append(float(number is not None and int(number[1]) == right))
    return rewards
