"""Packing: several documents in one row, so that no token of a batch is padding.

First-fit decreasing: the documents from the longest to the shortest, each into the first row that has room.
It needs at most 11/9·n + 2/3 rows where n would do (Dósa 2007, "The tight bound of first fit decreasing
bin-packing algorithm").
"""

import random
from collections.abc import Sequence

from fastft.data.encoding import Example
from fastft.errors import DataError

Pack = tuple[Example, ...]
"""The documents of one row."""


def pack(examples: Sequence[Example], *, max_tokens: int, seed: int | None = None) -> list[Pack]:
    """Distribute `examples` over rows of at most `max_tokens` tokens; each is in exactly one row, uncut.

    Without a seed the rows are in the order in which they were opened, the longest documents first; with one,
    they are shuffled by it.

    Raises:
        DataError: an example is longer than a row.
    """
    lengths = [len(example.input_ids) for example in examples]
    if lengths and max(lengths) > max_tokens:
        raise DataError(
            f"example {lengths.index(max(lengths))} does not fit into a packed row", got=f"{max(lengths)} tokens",
            allowed=f"at most {max_tokens}", fix="encode with the same max_tokens that you pack with",
        )  # fmt: skip
    rows: list[list[Example]] = [[] for _ in examples]
    room = _Rooms(len(examples), max_tokens)
    for index in sorted(range(len(examples)), key=lambda index: -lengths[index]):
        rows[room.take(lengths[index])].append(examples[index])
    packs = [tuple(row) for row in rows if row]
    if seed is not None:
        random.Random(seed).shuffle(packs)
    return packs


class _Rooms:
    """How much room is left in every row: a binary tree of maxima, so that the first fit is found in log(rows)."""

    def __init__(self, rows: int, capacity: int) -> None:
        self._leaves = 1 << max(0, rows - 1).bit_length()
        self._most = [capacity] * (2 * self._leaves)  # node n covers nodes 2n and 2n + 1

    def take(self, tokens: int) -> int:
        """The first row with room for `tokens`, which it then no longer has."""
        node = 1
        while node < self._leaves:
            node = 2 * node + (self._most[2 * node] < tokens)
        row = node - self._leaves
        self._most[node] -= tokens
        while node > 1:
            node //= 2
            self._most[node] = max(self._most[2 * node], self._most[2 * node + 1])
        return row
