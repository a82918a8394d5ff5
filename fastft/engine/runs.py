"""Layers one after the other, forward and backward, without autograd.

Legend: B batch, S sequence, T = B·S tokens, D model.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fastft.engine.bank import AdapterBank, in_bank_order
from fastft.engine.layer import backward_layer, forward_layer, pick_rows, spread_rows
from fastft.engine.layers_watch import Look
from fastft.engine.offload import HostBuffers, ParkedLayer
from fastft.engine.parts import LayerCall
from fastft.engine.saved import Saved
from fastft.plan import OFFLOADED

if TYPE_CHECKING:
    from fastft.engine.graphs import Graphs


Kept = list[Saved | ParkedLayer | None]
"""What each layer keeps; None where nothing below it is trained."""


class Run(NamedTuple):
    """Layers that follow each other in one forward."""

    calls: tuple[LayerCall, ...]
    """They share their `StepContext`s' rows."""
    bank: AdapterBank | None = None
    """Holds exactly these layers' adapters; the calls then read its working copy."""
    graphs: "Graphs | None" = None
    """Recordings of these layers, where launches are worth saving."""
    frozen: Sequence[Sequence[torch.Tensor]] = ()
    """`LayerParts.frozen` of each layer."""
    look: Look = Look()
    """Whether the layers are still what was read; if one is not, whoever asked for the run puts its output away."""

    @property
    def adapters(self) -> list[torch.Tensor]:
        """What autograd sees: the parameters, all A of each layer, then all B, vectors and numbers."""
        if self.bank is not None:
            return list(self.bank.parameters)
        return [matrix for call in self.calls for matrix in _matrices(call)]


def forward_run(
    x_BSD: torch.Tensor,
    calls: Sequence[LayerCall],
    first: int,
    buffers: HostBuffers | None = None,
    look: Look | None = None,
) -> tuple[torch.Tensor, Kept]:
    """The output of the last layer (B × S × D), and what every layer from `first` on saves for `backward_run`.

    What goes to the host goes to `buffers`, or new memory.  Ends before the first layer that changed, by `look`.
    """
    context = calls[0].context
    kept: Kept = []
    y_TD = pick_rows(x_BSD.reshape(-1, x_BSD.shape[-1]), context.rows_R)
    for index, call in enumerate(calls):
        if look is not None and not look.at(index):
            break
        y_TD, saved = forward_layer(y_TD, call)
        if kept and isinstance(kept[-1], ParkedLayer):
            kept[-1].leave()
        if index < first:
            kept.append(None)
        elif call.policy in OFFLOADED and index + 1 < len(calls):
            kept.append(ParkedLayer(saved, buffers))
        else:
            # What the last layer saves is needed again at once.
            kept.append(saved)
        del saved
    return spread_rows(y_TD, context.rows_R, context.tokens).view(x_BSD.shape), kept


def backward_run(
    dy_BSD: torch.Tensor, calls: Sequence[LayerCall], kept: Kept, first: int, *, needs_dx: bool, last: bool = True
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """The input's gradient (B × S × D; None unless `needs_dx`), and those of the adapters, in the order
    of `Run.adapters`.

    `kept` is emptied from its end, so that a layer's tensors are freed when its backward is done; if this is the `last`
    backward of its forward, they are overwritten, too.
    """
    context, shape = calls[0].context, dy_BSD.shape
    d_TD: list[Any] = [pick_rows(dy_BSD.reshape(-1, shape[-1]), context.rows_R)]
    gradients: list[list[torch.Tensor | None]] = []
    for index in reversed(range(first, len(calls))):
        if index > first and isinstance(kept[-2], ParkedLayer):
            kept[-2].fetch()
        # Popped into the call: nobody else holds them, so the layer can free what it has used.
        dx_TD, of_layer = backward_layer(
            d_TD.pop(), _take(kept), calls[index], needs_dx=needs_dx or index > first, overwrite=last
        )
        d_TD.append(dx_TD)
        del dx_TD
        slots = zip(in_bank_order(of_layer), in_bank_order(calls[index].parts.adapters), strict=True)
        gradients.append([gradient for gradient, matrix in slots if matrix is not None])
    gradients.extend([None] * len(_matrices(call)) for call in reversed(calls[:first]))
    dx_BSD = None
    if needs_dx:
        dx_BSD = spread_rows(d_TD.pop(), context.rows_R, context.tokens).view(shape)
    return dx_BSD, [gradient for of_layer in reversed(gradients) for gradient in of_layer]


def first_trained(run: Run, needs: Sequence[bool]) -> int:
    """The first layer with an adapter that wants a gradient: nothing is saved below it, and backward stops there.

    `needs` says of each of `run.adapters` whether it does.
    """
    offset = 0
    for index, call in enumerate(run.calls):
        count = len(_matrices(call))
        if any(needs[offset : offset + count]):
            return index
        offset += count
    return len(run.calls)


def _take(kept: Kept) -> Saved:
    last = kept.pop()
    assert last is not None
    return last.take() if isinstance(last, ParkedLayer) else last


def _matrices(call: LayerCall) -> list[torch.Tensor]:
    return [matrix for matrix in in_bank_order(call.parts.adapters) if matrix is not None]
