"""Noticing that a model's layers changed, without the device waiting for the answer.

All that a `Watch` compares of some thirty layers takes the host as long as some hundred launches.  So the layers are
watched a few at a time, and a forward looks at each group shortly before it launches the first of its layers, while
the device computes those before.  Nothing runs that was not looked at; if a group has changed, what ran before it has
left no trace and is put away.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from fastft.engine.watch import Watch
from fastft.models.calls import Bound, Calls

_TOGETHER = 4
"""Layers of a group but the first, which is looked at while the device has nothing to do."""
AROUND = -1
"""Where, before the first layer, what runs before it is looked at."""


class LayersWatch:
    """The state of a model's layers, and of what is around them, at one moment."""

    def __init__(
        self,
        layers: Sequence[nn.Module],
        around: Iterable[nn.Module],
        reached: Iterable[Calls],
        bound: Iterable[Bound],
        config: Any,
    ) -> None:
        """What is `reached` and `bound`, and `config`, belong to the first layer; see `Watch`."""
        elsewhere: set[int] = set()
        self._groups = [
            (AROUND, Watch(around, elsewhere=elsewhere)),
            (0, Watch(layers[:1], reached, bound, config, elsewhere)),
        ]
        for start in range(1, len(layers), _TOGETHER):
            self._groups.append((start, Watch(layers[start : start + _TOGETHER], elsewhere=elsewhere)))
        self.quiet = all(watch.quiet for _, watch in self._groups)
        """Whether none of the modules has a hook that anybody hears of."""

    def look(self) -> "Look":
        """A look at the layers, of which nothing was looked at yet."""
        return Look(self._groups)

    def computes_what_it_did(self) -> bool:
        """As `Watch.computes_what_it_did`."""
        return all(watch.computes_what_it_did() for _, watch in self._groups)

    def buffers(self) -> list[list[dict[str, Any]]]:
        """The buffers of each module that has some, by group."""
        return [watch.buffers() for _, watch in self._groups]

    @contextmanager
    def put_back(self, buffers: list[list[dict[str, Any]]]) -> Iterator[None]:
        """As `Watch.put_back`."""
        with ExitStack() as all_groups:
            for (_, watch), of_group in zip(self._groups, buffers, strict=True):
                all_groups.enter_context(watch.put_back(of_group))
            yield


class Look:
    """One forward's look at its layers, from the first to the last."""

    def __init__(self, groups: Iterable[tuple[int, Watch]] = ()) -> None:
        """`groups` come with the first of their layers."""
        self._left = iter(groups)
        self._next = next(self._left, None)
        self.unchanged = True
        """Whether all that was looked at so far is as it was."""

    def at(self, layer: int) -> bool:
        """Whether everything up to this layer's group is as it was."""
        while self.unchanged and self._next is not None and self._next[0] <= layer:
            self.unchanged = self._next[1].unchanged()
            self._next = next(self._left, None)
        return self.unchanged

    def at_all(self) -> bool:
        """Whether everything is as it was."""
        return self.at(sys.maxsize)
