"""fastft.data.packing: nothing lost, nothing twice, nothing too long."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastft.data.encoding import Example
from fastft.data.packing import pack
from fastft.errors import DataError

LENGTHS = st.lists(st.integers(1, 32), max_size=40)


def examples_of(lengths: list[int]) -> list[Example]:
    """Each example's tokens are its own index, so that it can be told apart from every other."""
    return [Example([index] * length, [-100, *[index] * (length - 1)]) for index, length in enumerate(lengths)]


@given(LENGTHS, st.one_of(st.none(), st.integers()))
def test_every_example_is_in_exactly_one_row_and_no_row_is_too_long(lengths: list[int], seed: int | None) -> None:
    examples = examples_of(lengths)
    packs = pack(examples, max_tokens=32, seed=seed)
    assert sorted(example.input_ids[0] for documents in packs for example in documents) == list(range(len(lengths)))
    assert all(example is examples[example.input_ids[0]] for documents in packs for example in documents)
    assert all(0 < sum(len(example.input_ids) for example in documents) <= 32 for documents in packs)
    assert packs == pack(examples, max_tokens=32, seed=seed)


@given(LENGTHS)
def test_it_is_first_fit_decreasing(lengths: list[int]) -> None:
    """Against the definition, done the slow way."""
    rows: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        fitting = (row for row in rows if sum(lengths[each] for each in row) + lengths[index] <= 32)
        row = next(fitting, None)
        if row is None:
            rows.append([index])
        else:
            row.append(index)
    packs = pack(examples_of(lengths), max_tokens=32)
    assert [[example.input_ids[0] for example in documents] for documents in packs] == rows


def test_a_seed_shuffles_the_rows_and_nothing_else() -> None:
    examples = examples_of([20] * 30)
    plain, shuffled = pack(examples, max_tokens=32), pack(examples, max_tokens=32, seed=1)
    assert plain != shuffled
    assert sorted(map(repr, plain)) == sorted(map(repr, shuffled))
    assert shuffled != pack(examples, max_tokens=32, seed=2)


def test_an_example_longer_than_a_row_is_refused() -> None:
    with pytest.raises(DataError, match=r"example 1 does not fit.*got 33 tokens"):
        pack(examples_of([3, 33]), max_tokens=32)
