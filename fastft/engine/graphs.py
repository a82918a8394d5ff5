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

from fastft.adapters.lora import AdaptedLinear
from fastft.engine.bank import AdapterBank
from fastft.engine.parts import LayerCall, LayerParts, StepContext
from fastft.engine.runs import Kept, Run, backward_run, forward_run
from fastft.plan import OFFLOADED

log = logging.getLogger("fastft")

GraphMode = Literal["auto", "on", "off"]
GRAPH_MODES: tuple[GraphMode, ...] = ("auto", "on", "off")
"""auto records small steps only, on those of any size."""
WARM_RUNS = 2
"""How often a run comes before it is recorded: kernels are compiled and libraries have chosen theirs by then."""
MOST_RECORDINGS = 8
"""Shapes that come more rarely than these run without."""
LAYER_FLOPS = 4e12
"""Above this a layer's forward and backward keep an H200 busy for over 6 ms, longer than any host needs to launch
them (docs/log.md), and a recording would only pin memory."""

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
    """One run, forward and backward, on tensors of its own."""

    def __init__(
        self, x_BSD: torch.Tensor, run: Run, bank: AdapterBank, first: int, needs_dx: bool, recorder: Recorder
    ) -> None:
        self._x_BSD = x_BSD.clone()
        self._contexts = {id(call.context): _own(call.context) for call in run.calls}
        self._originals = [call.context for call in run.calls]  # so that no other context gets one of these ids
        calls = [call._replace(context=self._contexts[id(call.context)]) for call in run.calls]
        kept: Kept = []

        def forward() -> torch.Tensor:
            bank.refresh()
            y_BSD, kept[:] = forward_run(self._x_BSD, calls, first)
            return y_BSD

        def backward() -> tuple[torch.Tensor | None, torch.Tensor]:
            dx_BSD, gradients = backward_run(self._dy_BSD, calls, kept, first, needs_dx=needs_dx)
            return dx_BSD, bank.join(gradients)

        self._y_BSD, self._replay_forward = recorder.record(forward)
        self._dy_BSD = torch.empty_like(self._y_BSD)
        (self._dx_BSD, self._gradient_N), self._replay_backward = recorder.record(backward)

    def forward(self, x_BSD: torch.Tensor, calls: Sequence[LayerCall]) -> torch.Tensor:
        """The output; it holds until the next `forward`."""
        self._x_BSD.copy_(x_BSD)
        given = {id(call.context): call.context for call in calls}
        for own, context in zip(self._contexts.values(), given.values(), strict=True):
            own.cos_Sd.copy_(context.cos_Sd)
            own.sin_Sd.copy_(context.sin_Sd)
        self._replay_forward()
        return self._y_BSD.detach()

    def backward(self, dy_BSD: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The input's gradient, a copy, and those of the adapters (N); they hold until the next `backward`.

        Once a forward: it overwrites what the forward saved.
        """
        self._dy_BSD.copy_(dy_BSD)
        self._replay_backward()
        return None if self._dx_BSD is None else self._dx_BSD.clone(), self._gradient_N


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

    def take(self, x_BSD: torch.Tensor, run: Run, first: int, needs_dx: bool) -> "InUse | None":
        """The recording for this run, which is then in use until released or forgotten; None where there is none."""
        bank = run.bank
        if bank is None or not self._worth_it(x_BSD) or not all(map(_can_be_recorded, run.calls)):
            return None
        earlier = None if self._in_use is None else self._in_use()
        if earlier is not None and earlier.waits:
            return None
        if self._addresses != [tensor.data_ptr() for tensor in self._weights]:
            # The weights moved: what was recorded would read memory that is no longer theirs.
            self._recorded.clear()
            self._times.clear()
            self._addresses = [tensor.data_ptr() for tensor in self._weights]
        key = (x_BSD.shape, x_BSD.dtype, x_BSD.device, first, needs_dx, id(bank), *map(_kind, run.calls))
        if key not in self._recorded:
            self._times[key] = self._times.get(key, 0) + 1
            if self._times[key] <= WARM_RUNS or len(self._recorded) >= MOST_RECORDINGS:
                return None
            self._recorded[key] = self._record(x_BSD, run, bank, first, needs_dx)
        recorded = self._recorded[key]
        if recorded is None:
            return None
        use = InUse(recorded)
        self._in_use = weakref.ref(use)
        return use

    def _record(
        self, x_BSD: torch.Tensor, run: Run, bank: AdapterBank, first: int, needs_dx: bool
    ) -> RecordedRun | None:
        B, S = x_BSD.shape[:2]
        try:
            recorded = RecordedRun(x_BSD, run, bank, first, needs_dx, self._recorder)
        except RuntimeError as error:  # what a kernel may not do while it is recorded, or too little memory
            log.warning("steps of %d×%d tokens run without CUDA graphs: %s", B, S, str(error).partition("\n")[0])
            return None
        log.info("steps of %d×%d tokens replay CUDA graphs", B, S)
        return recorded

    def _worth_it(self, x_BSD: torch.Tensor) -> bool:
        tokens = x_BSD.shape[0] * x_BSD.shape[1]
        return self._always or 4.0 * tokens * self._weight_elements < LAYER_FLOPS


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


def _own(context: StepContext) -> StepContext:
    return context._replace(cos_Sd=context.cos_Sd.clone(), sin_Sd=context.sin_Sd.clone())


def _can_be_recorded(call: LayerCall) -> bool:
    """Whether the call's launches are the same each time: no dropout, nothing that depends on the batch's data,
    and nothing that leaves the device."""
    context = call.context
    tensors = [value for value in context.seen if isinstance(value, torch.Tensor)]
    return not (tensors or context.rows_R is not None or call.parts.has_dropout or call.policy in OFFLOADED)


def _kind(call: LayerCall) -> tuple[Any, ...]:
    context = call.context
    return call.policy, context.attention.name, context.batch, tuple(context.cos_Sd.shape), tuple(context.seen)


def _tensors(parts: tuple[Any, ...]) -> list[torch.Tensor]:
    """The frozen tensors that a recording reads where they are."""
    found: list[torch.Tensor] = []
    for value in parts:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, AdaptedLinear):
            found.extend(value.module.parameters())
        elif isinstance(value, tuple):
            found.extend(_tensors(value))
    return found


def _elements(linear: AdaptedLinear) -> int:
    sizes = (getattr(linear.module, name, None) for name in ("in_features", "out_features"))
    size_in, size_out = sizes
    # A quantized weight packs several elements into one; only a transposed one (Conv1D) does not tell its sizes.
    return size_in * size_out if size_in and size_out else linear.module.weight.numel()  # type: ignore[operator]
