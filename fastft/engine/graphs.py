"""CUDA graphs: a run of layers recorded once, then replayed by one launch each way.

A small step is bound by the host: some 50 launches a layer and direction, each dearer than its work on the GPU.  What
is recorded must find its inputs and weights at the same addresses every time, and its intermediates live in memory
that belongs to the recording.  So a recording serves one shape, one placement and one set of weights; it is made after
the same run came a few times; and while its forward waits for its backward, any other forward runs without.

Legend: B batch, S sequence, D model, N elements of the adapter bank.
"""

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, TypeVar

import torch

from fastft.adapters.adapted import AdaptedLinear
from fastft.engine.bank import AdapterBank
from fastft.engine.offload import HostBuffers
from fastft.engine.parts import LayerCall, LayerParts, StepContext
from fastft.engine.runs import Kept, Run, backward_run, forward_run
from fastft.memory.layer import is_recorded

log = logging.getLogger("fastft")

GraphMode = Literal["auto", "on", "off"]
GRAPH_MODES: tuple[GraphMode, ...] = ("auto", "on", "off")
"""auto records small steps only, on those of any size."""
WARM_RUNS = 2
"""How often a run comes before it is recorded: kernels are compiled and libraries have chosen theirs by then."""
TOKEN_STEP = 64
"""Rows are filled up to a multiple of this: what is bound by its launches does not notice, and few recordings do."""
_FEWEST_PLACES = 64
"""Of packed documents, in powers of four from here: an empty one costs less than another recording."""
MOST_RECORDINGS = 32
"""Shapes that come later than these run without."""

_Result = TypeVar("_Result")


class Recorder(Protocol):
    """Records what a function launches."""

    def record(self, function: Callable[[], _Result]) -> tuple[_Result, Callable[[], None]]:
        """What `function` returned, and how to do its work again into the same tensors."""


class CudaRecorder:
    """Records into CUDA graphs that share one memory pool: no two of them are ever in use at a time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def record(self, function: Callable[[], _Result]) -> tuple[_Result, Callable[[], None]]:
        """Capture `function` without running it; see `Recorder`."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads (data loading, logging) may go on calling CUDA while this one records.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = function()
        return result, graph.replay


class RecordedRun:
    """One run, forward and backward, on tensors of its own.

    These may have more tokens a row than the run: what stands behind a row's end is never seen by what stands before
    it, its output is cut off, and a gradient of zero comes in for it.
    """

    def __init__(
        self, x_BSD: torch.Tensor, run: Run, bank: AdapterBank, first: int, needs_dx: bool, tokens: int,
        recorder: Recorder, buffers: HostBuffers,
    ) -> None:  # fmt: skip
        """Record `run`, whose rows have up to `tokens` tokens; what layers move to the host goes to `buffers`."""
        B, _, D = x_BSD.shape
        self._x_BTD, self._dy_BTD = x_BSD.new_zeros(B, tokens, D), x_BSD.new_zeros(B, tokens, D)
        self._originals = [call.context for call in run.calls]  # kept, so that no other context gets one of their ids
        self._contexts = {id(context): _own(context, x_BSD.shape[1], tokens) for context in self._originals}
        calls = [call._replace(context=self._contexts[id(call.context)]) for call in run.calls]
        kept: Kept = []

        def forward() -> torch.Tensor:
            bank.refresh()
            buffers.rewind()
            y_BTD, kept[:] = forward_run(self._x_BTD, calls, first, buffers)
            return y_BTD

        def backward() -> tuple[torch.Tensor | None, torch.Tensor]:
            dx_BTD, gradients = backward_run(self._dy_BTD, calls, kept, first, needs_dx=needs_dx)
            return dx_BTD, bank.join(gradients)

        # Once without: kernels are compiled, and libraries choose theirs, for these sizes.
        forward()
        backward()
        self._y_BTD, self._replay_forward = recorder.record(forward)
        (self._dx_BTD, self._gradient_N), self._replay_backward = recorder.record(backward)
        self._tokens = tokens

    def forward(self, x_BSD: torch.Tensor, calls: Sequence[LayerCall]) -> torch.Tensor:
        """The output (B × S × D); it holds until the next `forward`."""
        self._tokens = x_BSD.shape[1]
        _fill(self._x_BTD, x_BSD)
        given = {id(call.context): call.context for call in calls}
        for own, context in zip(self._contexts.values(), given.values(), strict=True):
            _fill_context(own, context, self._tokens)
        self._replay_forward()
        return self._y_BTD.detach()[:, : self._tokens]

    def backward(self, dy_BSD: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The input's gradient, a copy, and those of the adapters (N); they hold until the next `backward`.

        Once a forward: it overwrites what the forward saved.
        """
        _fill(self._dy_BTD, dy_BSD)
        self._replay_backward()
        return None if self._dx_BTD is None else self._dx_BTD[:, : self._tokens].clone(), self._gradient_N


class Graphs:
    """The recordings of one segment of layers."""

    def __init__(self, parts: Sequence[LayerParts], recorder: Recorder | None = None, *, always: bool = False) -> None:
        """`always` records runs of any size; else only small ones."""
        self._recorder = recorder or CudaRecorder()
        self._always = always
        self._weights = [tensor for of_layer in parts for tensor in _tensors(of_layer)]
        self._addresses = [tensor.data_ptr() for tensor in self._weights]
        self._weight_elements = max(sum(map(_elements, of_layer.linears)) for of_layer in parts)
        self._times: dict[Any, int] = {}
        self._recorded: dict[Any, RecordedRun | None] = {}
        self._in_use: weakref.ref[InUse] | None = None
        self._buffers = HostBuffers()

    def take(self, x_BSD: torch.Tensor, run: Run, first: int, needs_dx: bool) -> "InUse | None":
        """The recording for this run, which is then in use until released or forgotten; None where there is none."""
        bank = run.bank
        B, S, _ = x_BSD.shape
        if bank is None or not self.worth_it(B * S) or not all(map(_can_be_recorded, run.calls)):
            return None
        earlier = None if self._in_use is None else self._in_use()
        if earlier is not None and earlier.waits:
            return None
        if self._addresses != [tensor.data_ptr() for tensor in self._weights]:
            # The weights moved: what was recorded would read memory that is no longer theirs.
            self._recorded.clear()
            self._times.clear()
            self._addresses = [tensor.data_ptr() for tensor in self._weights]
        tokens = -(-S // TOKEN_STEP) * TOKEN_STEP  # rows of nearly one length share a recording
        key = (B, tokens, x_BSD.dtype, x_BSD.device, first, needs_dx, id(bank), *map(_kind, run.calls))
        if key not in self._recorded:
            if not run.look.at_all():
                return None
            self._times[key] = self._times.get(key, 0) + 1
            if self._times[key] <= WARM_RUNS or len(self._recorded) >= MOST_RECORDINGS:
                return None
            self._recorded[key] = self._record(x_BSD, run, bank, first, needs_dx, tokens)
        recorded = self._recorded[key]
        if recorded is None:
            return None
        use = InUse(recorded)
        self._in_use = weakref.ref(use)
        return use

    def worth_it(self, tokens: int) -> bool:
        """Whether a step of so many tokens is small enough."""
        return is_recorded("on" if self._always else "auto", tokens, self._weight_elements)

    def _record(
        self, x_BSD: torch.Tensor, run: Run, bank: AdapterBank, first: int, needs_dx: bool, tokens: int
    ) -> RecordedRun | None:
        size = f"{len(x_BSD)}×{tokens}"
        try:
            recorded = RecordedRun(x_BSD, run, bank, first, needs_dx, tokens, self._recorder, self._buffers)
        except RuntimeError as error:  # what a kernel may not do while it is recorded, or too little memory
            log.warning("steps of %s tokens run without CUDA graphs: %s", size, str(error).partition("\n")[0])
            return None
        log.info("steps of %s tokens replay CUDA graphs", size)
        return recorded


class InUse:
    """A recording between its forward and its backward."""

    def __init__(self, recorded: RecordedRun) -> None:
        self._recorded: RecordedRun | None = recorded

    @property
    def waits(self) -> bool:
        """Whether the backward is still to come."""
        return self._recorded is not None

    def forward(self, x_BSD: torch.Tensor, run: Run) -> torch.Tensor:
        """See `RecordedRun.forward`."""
        assert self._recorded is not None
        return self._recorded.forward(x_BSD, run.calls)

    def backward(self, dy_BSD: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """See `RecordedRun.backward`.

        Raises:
            RuntimeError: it ran already.
        """
        if self._recorded is None:
            raise RuntimeError(
                "Trying to backward through the graph a second time, but a CUDA graph runs once: "
                "patch_model(..., graphs='off') keeps what a second backward needs"
            )
        recorded, self._recorded = self._recorded, None
        return recorded.backward(dy_BSD)


def _own(context: StepContext, tokens: int, most: int) -> StepContext:
    """The context with tables of its own, for rows of up to `most` tokens instead of `tokens`."""
    tables = (context.cos_Sd, context.sin_Sd)
    cos_Sd, sin_Sd = (table.new_zeros(len(table) // tokens * most, table.shape[1]) for table in tables)
    own = context._replace(tokens=context.batch * most, cos_Sd=cos_Sd, sin_Sd=sin_Sd)
    documents = context.seen.documents
    if documents is not None:
        # The longest is a number that is recorded too: that of the longest that may come.
        own = own._replace(seen=own.seen._replace(documents=documents.new_empty(_places(documents)), longest=most))
    _fill_context(own, context, tokens)
    return own


def _places(documents: torch.Tensor) -> int:
    """How many entries a recording for `documents` has."""
    places = _FEWEST_PLACES
    while places < len(documents):
        places *= 4
    return places


def _fill_context(own: StepContext, context: StepContext, tokens: int) -> None:
    """Put what `context` tells rows of `tokens` into a recording's own."""
    most = own.tokens // own.batch
    for whole, part in ((own.cos_Sd, context.cos_Sd), (own.sin_Sd, context.sin_Sd)):
        # One table for all rows, or one a row.
        whole.unflatten(0, (-1, most))[:, :tokens].copy_(part.unflatten(0, (-1, tokens)))
    documents, places = context.seen.documents, own.seen.documents
    if documents is not None and places is not None:
        # What fills a row up belongs to its last document; those behind all rows are empty.
        starts = documents if tokens == most else documents // tokens * most + documents % tokens
        places[: len(documents)].copy_(starts)
        places[len(documents) :].fill_(own.tokens)


def _fill(whole_BTD: torch.Tensor, part_BSD: torch.Tensor) -> None:
    """The part first in every row, zeros behind it."""
    tokens = part_BSD.shape[1]
    whole_BTD[:, :tokens].copy_(part_BSD)
    if tokens < whole_BTD.shape[1]:
        whole_BTD[:, tokens:].zero_()


def _can_be_recorded(call: LayerCall) -> bool:
    """Whether the call's launches are the same each time: no dropout, nothing that depends on the batch's data."""
    context = call.context
    return context.seen.mask is None and context.rows_R is None and not call.parts.has_dropout


def _kind(call: LayerCall) -> tuple[Any, ...]:
    context = call.context
    per_row = len(context.cos_Sd) * context.batch == context.tokens
    seen = context.seen
    told = (seen.window, seen.softcap, None if seen.documents is None else _places(seen.documents))
    what = call.policy, call.mlp_chunk_tokens, call.backward_chunk_tokens, context.attention.name
    return *what, context.cos_Sd.shape[1], per_row, told


def _tensors(parts: tuple[Any, ...]) -> list[torch.Tensor]:
    """The frozen tensors that a recording reads where they are."""
    found: list[torch.Tensor] = []
    for value in parts:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, AdaptedLinear):
            found.extend(value.module.parameters() if value.dense is None else [value.dense])
        elif isinstance(value, tuple):
            found.extend(_tensors(value))
    return found


def _elements(linear: AdaptedLinear) -> int:
    sizes = (getattr(linear.module, name, None) for name in ("in_features", "out_features"))
    size_in, size_out = sizes
    # A quantized weight packs several elements into one; only a transposed one (Conv1D) does not tell its sizes.
    return size_in * size_out if size_in and size_out else linear.module.weight.numel()  # type: ignore[operator]
