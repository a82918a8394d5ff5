"""Arithmetic word problems with worked steps, in English and Chinese: the data that ships as `embedded`.

A row is `{"instruction", "input", "output"}`.  Its output shows one calculation a line and ends in
`#### <answer>`, so a greedy answer can be checked by comparing one number.

Training and test rows never share a problem.  A problem is its operators with its numbers (sorted where the order
does not matter, whatever the wording, the names or the language); the SHA-256 of that puts it into one of eight
buckets, and bucket 0 is the test set.

    >>> rows = generate("train", 2, seed=7)
    >>> is_correct(rows[0]["output"], rows[0])
    True
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

from fastft.data.wordings import (
    CHINESE_BOXES,
    CHINESE_ITEMS,
    ENGLISH_BOXES,
    ENGLISH_ITEMS,
    INSTRUCTIONS,
    NAMES,
    WORDINGS,
    Language,
)
from fastft.errors import DataError
from fastft.files import canonical_json, write_atomically

Split = Literal["train", "test"]

MARKER = "#### "
"""Stands before the answer, as in GSM8K."""
LARGEST = 99
"""No number of a problem, given or calculated, is above it."""
MAX_ROWS = 100_000
"""The most rows that one call makes; below it, distinct rows are never hard to find."""
_BUCKETS = 8

_ANSWER = re.compile(r"####\s*(-?\d[\d,]*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One word problem: `numbers[0] operators[0] numbers[1] operators[1] …`, calculated from left to right."""

    language: Language
    operators: str
    numbers: tuple[int, ...]
    story: str
    question: str
    conclusion: str
    """States the answer in a sentence."""
    instruction: str
    unit: str
    """What is counted."""

    @property
    def equations(self) -> list[tuple[int, str, int, int]]:
        """Each step as (left, operator, right, result)."""
        return _equations(self.operators, self.numbers)

    @property
    def answer(self) -> int:
        """The last result."""
        return self.equations[-1][-1]

    @property
    def steps(self) -> list[str]:
        """Each step as text: `12 + 7 = 19 apples`, `12 + 7 = 19（个）`."""
        unit = f" {self.unit}" if self.language == "en" else f"（{self.unit}）"
        return [f"{left} {operator} {right} = {result}{unit}" for left, operator, right, result in self.equations]

    def row(self) -> dict[str, str]:
        """The instruction row."""
        space = " " if self.language == "en" else ""
        return {
            "instruction": self.instruction,
            "input": self.story + space + self.question,
            "output": "\n".join([*self.steps, f"{MARKER}{self.answer}"]),
        }


def generate(split: Split, count: int, *, seed: int = 0) -> list[dict[str, str]]:
    """`count` distinct rows, English and Chinese, each with the keys instruction, input and output.

    Equal arguments give equal rows, on every machine; the first rows of a longer list are the shorter list.

    Raises:
        DataError: an unknown split, or a count outside 1..`MAX_ROWS`.
    """
    return [problem.row() for problem in problems(split, count, seed=seed)]


def problems(split: Split, count: int, *, seed: int = 0) -> list[Problem]:
    """What `generate` makes its rows of.

    Raises:
        DataError: an unknown split, or a count outside 1..`MAX_ROWS`.
    """
    if split not in ("train", "test"):
        raise DataError("split is unknown", got=split, allowed=["train", "test"], fix="choose one of them")
    if not 1 <= count <= MAX_ROWS:
        raise DataError("count is out of range", got=count, allowed=f"1 to {MAX_ROWS}", fix="ask for fewer rows")
    # A string seeds `Random` through SHA-512: the same on every platform, and unrelated for neighbouring seeds.
    random = Random(f"fastft arithmetic {split} {seed}")
    found: dict[tuple[str, str], Problem] = {}
    while len(found) < count:
        problem = _problem(random, split)
        found.setdefault((problem.story, problem.question), problem)
    return list(found.values())


def split_of(operators: str, numbers: Sequence[int]) -> Split:
    """The only split that may hold this problem.  `12 + 7` and `7 + 12` are one problem."""
    first = operators[0]
    free = 1 + len(operators) - len(operators.lstrip(first)) if first in "+×" else 0
    canonical = [*sorted(numbers[:free]), *numbers[free:]]
    digest = hashlib.sha256(f"{operators} {canonical}".encode()).digest()
    return "test" if digest[0] % _BUCKETS == 0 else "train"


def final_answer(text: str) -> str | None:
    """The whole number after the first `####` of `text`, without commas and leading zeros; None if there is none.

    >>> final_answer("600 + 634 = 1234\\n#### 1,234")
    '1234'
    """
    match = _ANSWER.search(text)
    return None if match is None else str(int(match[1].replace(",", "")))


def is_correct(generated: str, row: dict[str, str]) -> bool:
    """Whether `generated` ends in the row's answer (exact match of the number after `####`).

    Raises:
        DataError: the row's own output has no final answer.
    """
    expected = final_answer(row["output"])
    if expected is None:
        raise DataError("a row has no final answer", got=row["output"], allowed="an output with `#### <number>`")
    return final_answer(generated) == expected


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    """Write `rows` to `path`, one JSON object a line, all or nothing.

    Raises:
        OutputError: the file cannot be written.
    """
    write_atomically(path, "".join(canonical_json(row) + "\n" for row in rows))


def _equations(operators: str, numbers: Sequence[int]) -> list[tuple[int, str, int, int]]:
    steps, left = [], numbers[0]
    for operator, right in zip(operators, numbers[1:], strict=True):
        result = {"+": left + right, "-": left - right, "×": left * right}[operator]
        steps.append((left, operator, right, result))
        left = result
    return steps


def _numbers(random: Random, operators: str, split: Split) -> tuple[int, ...]:
    """Numbers of `split` for which every calculation stays within the range that the tiny model was taught."""
    while True:
        numbers = [_number(random, small=operators[0] == "×" or operators == "+×")]
        numbers += [_number(random, small=operator == "×" or operators == "+×") for operator in operators]
        steps = _equations(operators, numbers)
        factors_small = all(left <= 9 for left, operator, _, _ in steps if operator == "×")
        results_fit = all(2 <= step[-1] <= LARGEST for step in steps)
        if factors_small and results_fit and split_of(operators, numbers) == split:
            return tuple(numbers)


def _number(random: Random, *, small: bool) -> int:
    return random.randint(2, 9 if small else LARGEST)


def _problem(random: Random, split: Split) -> Problem:
    language: Language = random.choice(("en", "zh"))
    operators = random.choice(tuple(WORDINGS[language]))
    numbers = _numbers(random, operators, split)
    wording = random.choice(WORDINGS[language][operators])
    words = dict(zip("abc", map(str, numbers), strict=False), r=str(_equations(operators, numbers)[-1][-1]))
    words["name"], words["other"] = random.sample(NAMES[language], 2)
    if language == "en":
        words["item"] = random.choice(ENGLISH_ITEMS)
        words["box"], words["boxes"] = random.choice(ENGLISH_BOXES)
        unit = words["item"]
    else:
        words["m"], words["item"] = random.choice(CHINESE_ITEMS)
        words["box"] = random.choice(CHINESE_BOXES)
        unit = words["m"]
    story, question, conclusion = (part.format_map(words) for part in wording)
    return Problem(
        language=language, operators=operators, numbers=numbers, unit=unit,
        story=story, question=question, conclusion=conclusion,
        instruction=random.choice(INSTRUCTIONS[language]),
    )  # fmt: skip


def calculation(random: Random, operators: str = "+++---×", least: int = 0) -> tuple[int, str, int, int]:
    """A random fact (left, operator, right, result): summands between `least` and `LARGEST`, factors above `least`."""
    operator = random.choice(operators)
    if operator == "×":
        left, right = random.randint(1 + least, 9), random.randint(1 + least, 9)
        return left, operator, right, left * right
    larger = random.randint(1 + least, LARGEST)
    part = random.randint(least, larger - least)
    return (part, "+", larger - part, larger) if operator == "+" else (larger, "-", part, larger - part)
