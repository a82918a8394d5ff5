import re

import pytest

from fastft import errors
from fastft.errors import BackendError, ConfigError, FastftError, unknown_choice

CLASSES = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, FastftError)]


def test_the_tree_at_the_top_of_the_module_is_the_tree():
    drawn = dict(re.findall(r"(\w+Error)\s+(?:exit code )?(\d+)", errors.__doc__))
    assert drawn == {cls.__name__: str(cls.exit_code) for cls in CLASSES}
    assert all(cls is FastftError or cls.__bases__ == (FastftError,) for cls in CLASSES)


def test_every_kind_has_its_own_exit_code():
    codes = [cls.exit_code for cls in CLASSES]
    assert len(set(codes)) == len(codes)
    assert 0 not in codes


@pytest.mark.parametrize("cls", CLASSES)
def test_a_message_says_what_got_allowed_and_fix(cls):
    error = cls("it is wrong", got=3, allowed=["a", "b"], fix="do this")
    assert str(error) == "it is wrong; got 3; allowed: a, b; fix: do this"
    assert (error.what, error.got, error.allowed, error.fix) == ("it is wrong", 3, ["a", "b"], "do this")


def test_parts_that_are_missing_are_left_out():
    assert str(FastftError("it is wrong")) == "it is wrong"
    assert str(FastftError("it is wrong", got="text", allowed="one word")) == "it is wrong; got text; allowed: one word"
    assert str(FastftError("it is wrong", got=0, allowed=(1, 2))) == "it is wrong; got 0; allowed: 1, 2"
    assert str(FastftError("it is wrong", got="")) == "it is wrong; got "


def test_an_unknown_name_is_answered_with_the_closest():
    error = unknown_choice("backend", "tritn", ["triton", "eager"])
    assert isinstance(error, ConfigError)
    assert str(error) == "backend is unknown; got tritn; allowed: eager, triton; fix: did you mean 'triton'?"
    assert isinstance(unknown_choice("backend", "x", ["eager"], BackendError), BackendError)
    assert unknown_choice("backend", "zzz", ["eager", "peft"]).fix == "choose one of eager, peft"
