# B rows, S tokens of a row

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft.kernels.attention.seen import Seen, additive, documents_of, mask_of

CPU = torch.device("cpu")


@st.composite
def packed_rows(draw: st.DrawFn) -> list[list[int]]:
    """Lengths of the documents of each row; all rows are as long."""
    tokens = draw(st.integers(1, 12))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        cuts = sorted({0, tokens, *draw(st.lists(st.integers(1, tokens), max_size=4))})
        rows.append([last - first for first, last in pairwise(cuts)])
    return rows


@settings(max_examples=60)
@given(packed_rows())
def test_documents_of_finds_what_was_packed(rows):
    positions_BS = torch.tensor([[p for length in row for p in range(length)] for row in rows])
    found = documents_of(positions_BS)
    if all(len(row) == 1 for row in rows):
        assert found is None
        return
    documents, longest = found
    lengths = [length for row in rows for length in row]
    assert documents.diff().tolist() == lengths
    assert documents[0] == 0
    assert longest == max(lengths)


@settings(max_examples=60)
@given(st.lists(st.lists(st.integers(0, 4), min_size=5, max_size=5), min_size=1, max_size=3))
def test_documents_are_those_of_transformers(positions):
    """Whatever the positions are, a query must see what it sees without the engine."""
    from transformers.masking_utils import find_packed_sequence_indices

    positions_BS = torch.tensor(positions)
    theirs, found = find_packed_sequence_indices(positions_BS), documents_of(positions_BS)
    assert (theirs is None) == (found is None)
    if found is not None:
        B, S = positions_BS.shape
        causal = torch.ones(S, S, dtype=torch.bool).tril()
        wanted = (theirs[:, :, None] == theirs[:, None, :]) & causal
        assert torch.equal(mask_of(Seen(None, None, None, *found), B, S, CPU)[:, 0], wanted)


@pytest.mark.parametrize("window", [1, 3, 7, 20])
def test_the_window_is_that_of_transformers(window):
    from transformers.masking_utils import and_masks, causal_mask_function, sliding_window_overlay

    theirs = and_masks(sliding_window_overlay(window), causal_mask_function)
    wanted = torch.tensor([[bool(theirs(0, 0, torch.tensor(q), torch.tensor(k))) for k in range(7)] for q in range(7)])
    assert torch.equal(mask_of(Seen(window=window), 2, 7, CPU)[0, 0], wanted)


@settings(max_examples=40)
@given(rows=packed_rows(), window=st.none() | st.integers(1, 12), data=st.data())
def test_a_chunk_of_the_mask_is_cut_from_the_whole(rows, window, data):
    B, S = len(rows), sum(rows[0])
    lengths = torch.tensor([0, *(length for row in rows for length in row)])
    seen = Seen(window=window, documents=lengths.cumsum(0).int(), longest=int(lengths.max()))
    first, last = sorted(data.draw(st.tuples(st.integers(0, S - 1), st.integers(0, S - 1))))
    whole = mask_of(seen, B, S, CPU)
    assert whole.shape == (B, 1, S, S)
    part = mask_of(seen, B, S, CPU, range(first, last + 1), range(0, last + 1))
    assert torch.equal(part, whole[:, :, first : last + 1, : last + 1])
    assert not whole[:, :, first : last + 1, last + 1 :].any()


def test_a_mask_is_handed_through():
    mask = torch.rand(2, 1, 5, 5) > 0.5
    seen = Seen(mask, window=1)
    assert torch.equal(mask_of(seen, 2, 5, CPU), mask)
    assert torch.equal(mask_of(seen, 2, 5, CPU, range(1, 3), range(4)), mask[:, :, 1:3, :4])
    assert not seen.is_causal_only(5)


def test_additive_masks_stay_and_boolean_ones_become_infinite():
    given_mask = torch.randn(1, 1, 3, 3)
    assert additive(given_mask, torch.bfloat16) is given_mask
    made = additive(torch.tensor([[True, False]]), torch.bfloat16)
    assert made.dtype == torch.bfloat16
    assert made.tolist() == [[0.0, float("-inf")]]


def test_a_window_counts_only_where_a_sequence_is_longer():
    documents = torch.tensor([0, 3, 8], dtype=torch.int32)
    assert Seen(window=8).window_in(8) is None
    assert Seen(window=8).is_causal_only(8)
    assert Seen(window=7).window_in(8) == 7
    assert not Seen(window=7).is_causal_only(8)
    assert Seen(window=5, documents=documents, longest=5).window_in(8) is None
    assert Seen(window=4, documents=documents, longest=5).window_in(8) == 4
