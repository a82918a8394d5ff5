"""Intermediates that wait for their backward in host memory.

Copies run on a stream of their own beside the layers' compute: what a layer saves leaves while the next one runs, and
comes back while the backward of the one above it runs.  So the device holds what two layers save, however many there
are.  On a CPU there is nowhere to go, and nothing moves.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from fastft.engine.saved import Saved
from fastft.engine.streams import side_stream
from fastft.kernels.launch import next_power_of_2
from fastft.memory.layer import WORTH_MOVING_BYTES, host_pieces

_WORTH_MOVING = WORTH_MOVING_BYTES


class HostBuffers:
    """Page-locked host memory for the transfers of a recorded run, which must find it in one place every time.

    Recordings share it, as no two of them are in use at a time.  For one that needs more than there is, a larger buffer
    is made; the smaller one stays, as recordings that know its address may still be replayed.
    """

    def __init__(self, allocate: Callable[[int], torch.Tensor] | None = None) -> None:
        """`allocate` makes a buffer of so many bytes (uint8), page-locked where it is None."""
        self._allocate = allocate or _page_locked
        self._buffers: list[torch.Tensor] = []
        self._outgrown: list[torch.Tensor] = []
        self._next = 0

    def rewind(self) -> None:
        """Start over: what is taken from here on takes the place of what was taken before."""
        self._next = 0

    def take(self, like: torch.Tensor) -> torch.Tensor:
        """The next buffer, as a contiguous tensor of the shape and dtype of `like`."""
        size = next_power_of_2(like.nbytes)  # PyTorch rounds page-locked memory up to such sizes anyhow
        if self._next == len(self._buffers):
            self._buffers.append(self._allocate(size))
        elif self._buffers[self._next].nbytes < like.nbytes:
            self._outgrown.append(self._buffers[self._next])
            self._buffers[self._next] = self._allocate(size)
        buffer = self._buffers[self._next]
        self._next += 1
        return buffer[: like.nbytes].view(like.dtype).view(like.shape)


def goes_to_host(t: torch.Tensor) -> bool:
    """Whether a tensor that is to be parked is worth the way."""
    return t.is_cuda and t.nbytes >= _WORTH_MOVING


class ParkedLayer:
    """What one layer saved, on its way to the host, there, or on its way back.

    All calls come on the stream that computes: the constructor when the layer's forward was launched; `leave` when
    enough other work was launched to hide the copy; `fetch` as long before `take`.
    """

    def __init__(self, saved: Saved, buffers: HostBuffers | None = None) -> None:
        """Start copying, to `buffers` or new memory; the tensors must not be changed any more."""
        self._made, self._of_variants = type(saved.made), saved.of_variants
        self._transfer = Transfer([*saved.made, *saved.attention], buffers)

    def leave(self) -> None:
        """Give the device's memory back to work that is launched from here on."""
        self._transfer.leave()

    def fetch(self) -> None:
        """Start copying back."""
        self._transfer.fetch()

    def take(self) -> Saved:
        """What the layer saved, on the device."""
        tensors = self._transfer.take()
        fields = len(self._made._fields)
        attention: tuple[torch.Tensor, ...] = tuple(tensors[fields:])  # type: ignore[arg-type]
        return Saved(self._made(*tensors[:fields]), attention, self._of_variants)  # type: ignore[arg-type]


class Transfer:
    """Some tensors that go to the host and come back; see `ParkedLayer` for the order of calls."""

    def __init__(self, tensors: Sequence[torch.Tensor | None], buffers: HostBuffers | None = None) -> None:
        self._here: list[torch.Tensor | None] = list(tensors)
        self._host: dict[int, _Parked] = {}
        self._left = False
        large = [i for i, t in enumerate(tensors) if t is not None and goes_to_host(t)]
        if not large:
            return
        device = tensors[large[0]].device  # type: ignore[union-attr]
        self._stream, self._device = side_stream(device, "copies"), device
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            for i in large:
                t = tensors[i]
                assert t is not None
                # PyTorch keeps page-locked memory for later: only the first step waits for the operating system.
                take = _page_locked_like if buffers is None else buffers.take
                pieces = [take(piece).copy_(piece, non_blocking=True) for piece in in_pieces(t)]
                self._host[i] = _Parked(t.shape, t.dtype, pieces)
            self._copied = self._stream.record_event()

    def leave(self) -> None:
        """Drop the device's tensors; the computing stream waits for the copies before it goes on."""
        if self._host and not self._left:
            torch.cuda.current_stream(self._device).wait_event(self._copied)
            for i in self._host:
                self._here[i] = None
            self._left = True

    def fetch(self) -> None:
        """Start copying back, if the tensors left."""
        if not self._left:
            return
        for i, parked in self._host.items():
            # On the computing stream, whose earlier work may still use this memory: so the copies wait for it.
            self._here[i] = torch.empty(parked.shape, dtype=parked.dtype, device=self._device)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for i, parked in self._host.items():
                here = self._here[i]
                assert here is not None
                parts = [here] if len(parked.pieces) == 1 else in_pieces(here)
                for part, piece in zip(parts, parked.pieces, strict=True):
                    part.copy_(piece, non_blocking=True)
            self._copied = self._stream.record_event()
        self._left = False

    def take(self) -> list[torch.Tensor | None]:
        """The tensors on the device."""
        self.fetch()
        if self._host:
            torch.cuda.current_stream(self._device).wait_event(self._copied)
        return list(self._here)


class _Parked(NamedTuple):
    shape: torch.Size
    dtype: torch.dtype
    pieces: list[torch.Tensor]
    """In host memory: the whole, or the tensor's elements one after the other."""


def in_pieces(t: torch.Tensor) -> list[torch.Tensor]:
    """A contiguous tensor's elements in the pieces of `host_pieces`; any other tensor as it is."""
    sizes = host_pieces(t.nbytes)
    if len(sizes) == 1 or not t.is_contiguous():
        return [t]
    return list(t.view(-1).split([size // t.element_size() for size in sizes]))


def _page_locked_like(t: torch.Tensor) -> torch.Tensor:
    return torch.empty(t.shape, dtype=t.dtype, pin_memory=True)


def _page_locked(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)
