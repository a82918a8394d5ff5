"""Reward functions of GRPO's signature, from a user's file: `FILE.py:function`.

Such a function gets `prompts`, `completions`, `completion_ids` and each further column of the rows as a list by its
name, and returns a number for each completion, or None where it has nothing to say.  TRL's documentation describes it:
https://huggingface.co/docs/trl/grpo_trainer#using-a-custom-reward-function
"""

import functools
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

from fastft.errors import ConfigError, DataError

Reward = Callable[..., Any]

_GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""What TRL gives every reward function, beside the rows' columns."""


def load_reward(place: str, columns: Iterable[str] = ()) -> Reward:
    """The function that `FILE.py:function` names, checking what it returns from now on.

    Args:
        place: the file's path, a colon and the function's name.
        columns: further columns of the rows, which it is given too.

    Raises:
        ConfigError: no such file or function, a file that cannot be run, or a function that cannot be called so.
    """
    path, colon, name = place.rpartition(":")
    if not colon or not path or not name:
        raise ConfigError(
            "a reward is not FILE.py:function", got=place, fix="write it like --reward rewards.py:right_answer"
        )
    module = _run(Path(path), place)
    function = getattr(module, name, None)
    if function is None:
        functions = [each for each, value in vars(module).items() if inspect.isfunction(value)]
        raise ConfigError(f"{path} has no '{name}'", got=place, allowed=functions or None, fix="correct the name")
    if not callable(function):
        raise ConfigError(
            f"'{name}' of {path} cannot be called", got=type(function).__name__, allowed="a function",
            fix="name a function",
        )  # fmt: skip
    given = dict.fromkeys([*_GIVEN, *columns])
    try:
        inspect.signature(function).bind(**given)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"reward '{name}' does not take what it is given", got=str(error), allowed=", ".join(given),
            fix="let it take **kwargs for what it does not use",
        ) from error  # fmt: skip
    return checked(function, place)


def checked(function: Reward, place: str) -> Reward:
    """`function`, with an error for rewards that are not one finite number, or None, for each completion."""
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def wait_and_check(*, completions: list[Any], **given: Any) -> list[Any]:
            return _check(await function(completions=completions, **given), len(completions), place)

        return wait_and_check

    @functools.wraps(function)
    def call_and_check(*, completions: list[Any], **given: Any) -> list[Any]:
        return _check(function(completions=completions, **given), len(completions), place)

    return call_and_check


class _LeavesNoBytecode(SourceFileLoader):
    """Runs a user's file without a `__pycache__` beside it."""

    def set_data(self, path: str, data: Any, *, _mode: int = 0o666) -> None:
        """Where the import system would write bytecode: nothing."""


def _run(path: Path, place: str) -> Any:
    if not path.is_file():
        raise ConfigError(f"there is no reward file {path}", got=place, fix="check the path")
    if path.suffix != ".py":
        raise ConfigError(f"{path} is no Python file", got=place, allowed="FILE.py:function", fix="rename it to .py")
    name = f"fastft_reward_{path.stem}"
    loader = _LeavesNoBytecode(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    # Registered as an import would, or a dataclass of the file would not find its module.
    sys.modules[name] = module
    try:
        loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(
            f"the reward file {path} cannot be run", got=f"{type(error).__name__}: {error}", fix="correct the file"
        ) from error
    return module


def _check(rewards: Any, count: int, place: str) -> list[Any]:
    try:
        values = list(rewards)
    except TypeError:
        raise DataError(
            f"reward {place} returned no list", got=type(rewards).__name__, allowed=f"a list of {count} numbers",
            fix="return one reward for each completion",
        ) from None  # fmt: skip
    if len(values) != count:
        raise DataError(
            f"reward {place} returned {len(values)} rewards for {count} completions", allowed=count,
            fix="return one reward for each completion",
        )  # fmt: skip
    for value in values:
        try:
            fits = value is None or math.isfinite(float(value))
        except (TypeError, ValueError):
            fits = False
        if not fits:
            raise DataError(
                f"reward {place} returned what is no number", got=value, allowed="a finite number, or None",
                fix="return one number for each completion",
            )  # fmt: skip
    return values
