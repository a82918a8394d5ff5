"""The calculations that ship as `embedded` for preferences and rewards."""

import re

import pytest

from fastft.data.arithmetic import split_of
from fastft.data.calculations import (
    MAX_CALCULATIONS,
    calculations,
    judgements,
    preferences,
    questions,
    right_answer,
)
from fastft.errors import DataError


@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_are_right_and_wrong_and_of_their_split(split) -> None:
    made = calculations(split, MAX_CALCULATIONS[split], seed=3)
    assert len({prompt for prompt, _, _ in made}) == len(made)
    for prompt, right, wrong in made:
        left, operator, other = re.fullmatch(r"(\d+) ([+×-]) (\d+) =", prompt).groups()
        left, other = int(left), int(other)
        assert right == {"+": left + other, "-": left - other, "×": left * other}[operator]
        assert wrong != right
        assert wrong >= 0
        assert split_of(operator, (left, other)) == split


def test_equal_arguments_give_equal_rows_and_other_seeds_others() -> None:
    assert preferences("train", 20, seed=1) == preferences("train", 30, seed=1)[:20]
    assert preferences("train", 20, seed=1) != preferences("train", 20, seed=2)


def test_judgements_are_true_of_right_answers_alone() -> None:
    rows, made = judgements("test", 40, seed=1), calculations("test", 40, seed=1)
    assert sum(row["label"] for row in rows) == 20
    assert all(
        (row["completion"] == f" {right}") == row["label"] for row, (_, right, _) in zip(rows, made, strict=True)
    )


def test_the_reward_is_for_the_right_number_alone() -> None:
    completions = [" 12", "12\n3 +", " 123", " 1", "the 12", "", " 12 apples", "-12"]
    assert right_answer(completions=completions, answer=[12] * 8, prompts=[""] * 8) == [1, 1, 0, 0, 0, 0, 1, 0]
    assert questions("train", 3) == [
        {"prompt": prompt, "answer": right} for prompt, right, _ in calculations("train", 3)
    ]


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(DataError, match="split is unknown"):
        calculations("dev", 1)
    for count in (0, MAX_CALCULATIONS["test"] + 1):
        with pytest.raises(DataError, match="count is out of range"):
            calculations("test", count)
