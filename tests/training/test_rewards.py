"""Reward functions from a user's file."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from fastft.errors import ConfigError, DataError, FastftError
from fastft.training.rewards import load_reward

FILE = """
import math
length = 3

def digits(completions, **_):
    return [sum(letter.isdigit() for letter in text) for text in completions]

async def later(completions, **_):
    return [1.0 for _ in completions]

def strict(prompts, completions):
    return [0.0 for _ in completions]

def by_answer(completions, answer, **_):
    return [float(a) for a in answer]

def one(completions, **_):
    return [1.0]

def scalar(completions, **_):
    return 1.0

def words(completions, **_):
    return ["good" for _ in completions]

def nan(completions, **_):
    return [math.nan for _ in completions]

def some(completions, **_):
    return [None, 0.5]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rewards.py"
    path.write_text(FILE)
    return path


def call(reward: Any, **more: Any) -> Any:
    return reward(prompts=["a", "b"], completions=["1", "22"], completion_ids=[[1], [2, 3]], **more)


def test_a_function_is_called_as_it_is_and_keeps_its_name(file: Path) -> None:
    reward = load_reward(f"{file}:digits")
    assert reward.__name__ == "digits"
    assert call(reward, trainer_state=None, log_extra=None, log_metric=None, answer=[1, 2]) == [1, 2]
    assert call(load_reward(f"{file}:some")) == [None, 0.5]
    assert call(load_reward(f"{file}:by_answer", ["answer"]), answer=[4, 5]) == [4.0, 5.0]


def test_a_coroutine_stays_one(file: Path) -> None:
    reward = load_reward(f"{file}:later")
    assert asyncio.iscoroutinefunction(reward)
    assert asyncio.run(call(reward)) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("digits", "a reward is not FILE.py:function; got digits"),
        ("FILE:", "a reward is not FILE.py:function"),
        ("none.py:digits", "there is no reward file none.py"),
        ("FILE:digit", "has no 'digit'; .*allowed: digits, later"),
        ("FILE:length", "'length' of .* cannot be called; got int"),
        ("FILE:strict", r"reward 'strict' does not take what it is given; .*fix: let it take \*\*kwargs"),
        ("FILE:by_answer", "does not take what it is given; got missing a required argument: 'answer'"),
        ("BROKEN:digits", "cannot be run; got ZeroDivisionError: division by zero"),
        ("TEXT:digits", "is no Python file"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_reward_is_refused(file: Path, tmp_path: Path, place: str, message: str) -> None:
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "text.txt").write_text("digits")
    for name, path in {"FILE": file, "BROKEN": tmp_path / "broken.py", "TEXT": tmp_path / "text.txt"}.items():
        place = place.replace(name, str(path))
    with pytest.raises(ConfigError, match=message):
        load_reward(place)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("one", "returned 1 rewards for 2 completions; allowed: 2"),
        ("scalar", "returned no list; got float; allowed: a list of 2 numbers"),
        ("words", "returned what is no number; got good"),
        ("nan", "returned what is no number; got nan"),
    ],
)
def test_wrong_rewards_are_refused_when_they_come(file: Path, name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        call(load_reward(f"{file}:{name}"))
    assert issubclass(DataError, FastftError)
