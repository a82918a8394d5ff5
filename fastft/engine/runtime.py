"""What the engine remembers of a model between forwards, and how its layers gather into runs.

Hugging Face's own loop calls the decoder layers one by one.  In training, a layer that can run fused only puts its
call down and hands its input on; the next one that cannot, or the final norm, makes all calls that were put down run at
once.  So the loop stays Hugging Face's, and the layers are one autograd function.
"""

from collections.abc import Callable, Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import nn

from fastft.backends import Backend
from fastft.engine import optimizer_step
from fastft.engine.bank import AdapterBank
from fastft.engine.graphs import GraphMode, Graphs
from fastft.engine.parts import LayerCall, LayerParts, StepContext, read_parts
from fastft.engine.resident import ResidentWeights
from fastft.engine.runs import Run
from fastft.engine.stack import run_layers
from fastft.engine.support import why_no_layer
from fastft.engine.watch import Watch
from fastft.models.spec import LayerSpec
from fastft.plan import Policy


class WrongAssumptionError(Exception):
    """Something is not as this forward took it to be: it has to run again, from `Runtime.begin` without `trust`."""


class _PutDown(NamedTuple):
    """A call that waits to be run."""

    layer: int
    context: StepContext
    policy: Policy
    seed: int


class _Launched(NamedTuple):
    """A run that was launched when its first call was put down."""

    calls: list[_PutDown]
    """What was expected to be put down."""
    x_BSD: torch.Tensor
    y_BSD: torch.Tensor


class Segment:
    """Neighbouring layers that can all run fused, with their adapters in one bank where that is possible."""

    def __init__(self, indices: Sequence[int], parts: Sequence[LayerParts], bank: AdapterBank | None = None) -> None:
        """`bank` is taken over if it is these layers'."""
        self.indices, self.parts = list(indices), list(parts)
        self.bank = bank if bank is not None and bank.is_of(parts) else None
        self._graphs: Graphs | None = None
        self._work: list[LayerParts] = []
        self._work_dtype: torch.dtype | None = None

    def graphs(self, mode: GraphMode, device: torch.device) -> Graphs | None:
        """The recordings of these layers, if `mode` and the device allow any."""
        if mode == "off" or device.type != "cuda":
            return None
        if self._graphs is None:
            self._graphs = Graphs(self.parts, always=mode == "on")
        return self._graphs

    def prepare(self, dtype: torch.dtype) -> tuple[list[LayerParts], AdapterBank | None]:
        """The layers' parts for a forward in `dtype`, and the bank whose working copy they read."""
        if self.bank is None or not self.bank.holds():
            if not AdapterBank.fits(self.parts):
                return self.parts, None
            self.bank, self._work_dtype = AdapterBank(self.parts), None
            optimizer_step.install()
        if self._work_dtype != dtype:
            self._work, self._work_dtype = self.bank.work_layers(self.parts, dtype), dtype
        return self._work, self.bank


class Runtime:
    """The state of one patched model between and during forwards.  A copy of the model starts with an empty one."""

    def __init__(self) -> None:
        self._watch: Watch | None = None
        self._parts: list[LayerParts | None] = []
        self._reasons: list[str | None] = []
        self._segments: list[Segment] = []
        self._resident, self._resident_layers = ResidentWeights(), 0
        self._gathering = False
        self._assumed: list[Callable[[], bool]] = []
        self.mask_hid_padding = False
        """Whether the last mask that was looked at only hid right padding."""
        self._put_down: list[_PutDown] = []
        self._launched: _Launched | None = None
        self._usual: tuple[torch.Size, list[tuple[int, Policy]]] | None = None
        self._contexts: list[tuple[tuple[Any, ...], StepContext]] = []
        self._kinds: list[Any] = []
        self._told: dict[Any, tuple[tuple[Any, ...], StepContext]] = {}
        self._ops: Backend | None = None
        self._graph_mode: GraphMode = "auto"
        self._mlp_chunk_tokens: int | None = None
        self._stand_in: torch.Tensor | None = None
        self._documents: tuple[torch.Tensor, int] | None = None

    def __reduce__(self) -> tuple[type["Runtime"], tuple[()]]:
        """Nothing of this is worth copying: it is read again from the copied modules."""
        return Runtime, ()

    def begin(
        self,
        layers: Sequence[nn.Module],
        norm: nn.Module,
        spec: LayerSpec,
        ops: Backend,
        *,
        gather: bool,
        graphs: GraphMode = "off",
        mlp_chunk_tokens: int | None = None,
        resident_layers: int = 0,
        trust: bool = False,
    ) -> None:
        """Start a training forward: look at the layers again if anything about them changed.

        With `gather`, layers may put their calls down; `norm`, the module after the last one, must then `flush`.  With
        `trust` as well, whether anything changed may be asked as late as then, when the device has work; see `assume`.
        """
        self._assumed = []
        watch = self._watch if resident_layers == self._resident_layers else None
        if trust and gather and watch is not None and self._may_run_twice(watch):
            self._assumed.append(watch.unchanged)
        elif watch is None or not watch.unchanged():
            # Hooks on the norm would see what waits; its own `forward` is the engine's where `gather` is given.
            self._watch = Watch([*layers, norm])
            self._reasons = [why_no_layer(layer, spec) for layer in layers]
            self._parts = [
                read_parts(layer, spec) if reason is None else None
                for layer, reason in zip(layers, self._reasons, strict=True)
            ]
            self._parts = self._resident.of(self._parts, resident_layers)
            self._resident_layers = resident_layers
            self._segments = _segments(self._parts, self._segments)
            self._kinds = [None if parts is None else _kind(parts) for parts in self._parts]
        assert self._watch is not None
        self._gathering = gather and not self._watch.has_hooks
        self._put_down, self._contexts, self._ops, self._graph_mode = [], [], ops, graphs
        self._mlp_chunk_tokens = mlp_chunk_tokens
        self._told, self._launched = {}, None
        self._stand_in, self._documents = None, None

    def expect_others(self) -> None:
        """What comes next will not be what came last: nothing is launched before it was asked for."""
        self._usual = None

    def end(self) -> None:
        """The forward is over, or failed."""
        self._gathering, self._put_down, self._contexts, self._ops = False, [], [], None
        self._told, self._launched = {}, None
        self._stand_in, self._documents = None, None

    def shared_context(self, told: tuple[Any, ...]) -> StepContext | None:
        """The context made earlier in this forward for a layer that was told the same, object by object."""
        for earlier, context in self._contexts:
            if len(earlier) == len(told) and all(a is b or _equal(a, b) for a, b in zip(earlier, told, strict=True)):
                return context
        return None

    def share_context(self, told: tuple[Any, ...], context: StepContext) -> None:
        """Keep a context for the layers to come; only within a forward of the whole model."""
        if self.begun:
            self._contexts.append((told, context))

    def told_before(self, index: int, told: tuple[Any, ...]) -> StepContext | None:
        """The context of an earlier layer of the same kind, if that was told the same, object by object.

        Then there is nothing to ask again: the layer's call may be put down.
        """
        kind = self._kinds[index] if self._gathering else None
        earlier = self._told.get(kind) if kind is not None else None
        if earlier is None or len(earlier[0]) != len(told) or not all(map(is_, earlier[0], told)):
            return None
        return earlier[1]

    def remember(self, index: int, told: tuple[Any, ...], context: StepContext) -> None:
        """Note what a layer was told whose call was put down."""
        kind = self._kinds[index]
        if kind is not None:
            self._told[kind] = told, context

    @property
    def begun(self) -> bool:
        """Whether a training forward is under way."""
        return self._ops is not None

    def layer(self, index: int) -> tuple[LayerParts | None, str | None]:
        """The parts of a layer, or why it cannot run fused."""
        return self._parts[index], self._reasons[index]

    @property
    def all_fused(self) -> bool:
        """Whether every layer could run fused when it was last looked at."""
        return all(parts is not None for parts in self._parts)

    def may_record(self, tokens: int, device: torch.device) -> bool:
        """Whether a forward of so many tokens may replay CUDA graphs, which padding does not slow down."""
        if not self._gathering or any(parts is None or parts.has_dropout for parts in self._parts):
            return False
        recorders = [segment.graphs(self._graph_mode, device) for segment in self._segments]
        return any(graphs is not None and graphs.worth_it(tokens) for graphs in recorders)

    @property
    def gathers(self) -> bool:
        """Whether layers may put their calls down in this forward."""
        return self._gathering

    def stand_in(self, mask: torch.Tensor, documents: tuple[torch.Tensor, int] | None) -> None:
        """In this forward `mask` means no mask but causal attention within `documents` (all rows, where None)."""
        self._stand_in, self._documents = mask, documents

    def behind(self, mask: torch.Tensor | None) -> tuple[torch.Tensor | None, int] | None:
        """What the stand-in stands for: where documents start, and the longest; None for any other mask."""
        if mask is None or mask is not self._stand_in:
            return None
        return self._documents or (None, 0)

    def put_down(self, x_BSD: torch.Tensor, index: int, context: StepContext, policy: Policy, seed: int) -> bool:
        """Let a layer's call on `x_BSD` wait for the others; False where it has to run by itself.

        With the first call of a forward that may run twice, all that came last time is launched at once, so that the
        device works while the other layers are asked; `flush` raises `WrongAssumptionError` if others came.
        """
        if not self._gathering:
            return False
        self._put_down.append(_PutDown(index, context, policy, seed))
        if len(self._put_down) == 1 and self._assumed and self._usual is not None:
            shape, usual = self._usual
            if shape == x_BSD.shape and usual[0] == (index, policy):
                expected = [_PutDown(layer, context, its_policy, 0) for layer, its_policy in usual]
                self._launched = _Launched(expected, x_BSD, self._run(expected, x_BSD))
        return True

    def flush(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """Run what waits, on the input that the waiting layers handed on.

        Raises:
            WrongAssumptionError: something that was assumed is not so.
        """
        waiting, self._put_down = self._put_down, []
        launched, self._launched = self._launched, None
        if launched is None:
            y_BSD = self._run(waiting, x_BSD) if waiting else x_BSD
        elif launched.x_BSD is x_BSD and _same_calls(launched.calls, waiting):
            y_BSD = launched.y_BSD
        else:
            self._usual = None
            raise WrongAssumptionError
        assumed, self._assumed = self._assumed, []
        if not all(holds() for holds in assumed):
            raise WrongAssumptionError
        if waiting:
            self._usual = x_BSD.shape, [(call.layer, call.policy) for call in waiting]
        return y_BSD

    @property
    def assumes(self) -> bool:
        """Whether this forward may `assume` something."""
        return bool(self._assumed)

    def assume(self, holds: Callable[[], bool]) -> None:
        """Go on as if `holds()`, and ask when the layers are launched: `flush` raises `WrongAssumptionError` if not."""
        self._assumed.append(holds)

    def _may_run_twice(self, watch: Watch) -> bool:
        """Whether nobody would notice if a forward were thrown away: no hook, no random number, no layer that runs
        before all are launched."""
        return watch.quiet() and all(parts is not None and not parts.has_dropout for parts in self._parts)

    def _run(self, waiting: Sequence[_PutDown], x_BSD: torch.Tensor) -> torch.Tensor:
        """Run these calls one after the other.

        Raises:
            WrongAssumptionError: they failed, and something that was assumed is not so.
        """
        try:
            return self._run_calls(waiting, x_BSD)
        except Exception as error:
            if not all(holds() for holds in self._assumed):
                raise WrongAssumptionError from error
            raise

    def _run_calls(self, waiting: Sequence[_PutDown], x_BSD: torch.Tensor) -> torch.Tensor:
        assert self._ops is not None
        indices = [call.layer for call in waiting]
        segment = next((segment for segment in self._segments if segment.indices == indices), None)
        if segment is not None:
            parts, bank = segment.prepare(x_BSD.dtype)
        else:
            parts, bank = [each for index in indices if (each := self._parts[index]) is not None], None
        calls = tuple(
            LayerCall(self._ops, of_layer, call.context, call.policy, call.seed, self._mlp_chunk_tokens)
            for of_layer, call in zip(parts, waiting, strict=True)
        )
        graphs = segment.graphs(self._graph_mode, x_BSD.device) if segment is not None else None
        return run_layers(x_BSD, Run(calls, bank, graphs))


def _same_calls(expected: Sequence[_PutDown], came: Sequence[_PutDown]) -> bool:
    return len(expected) == len(came) and all(
        a.layer == b.layer and a.context is b.context and a.policy == b.policy and a.seed == b.seed
        for a, b in zip(expected, came, strict=True)
    )


def _equal(a: Any, b: Any) -> bool:
    return not isinstance(a, torch.Tensor) and not isinstance(b, torch.Tensor) and bool(a == b)


def _kind(parts: LayerParts) -> tuple[Any, ...] | None:
    """What a layer's context, and whether it may run now, depends on; None where each call differs."""
    if parts.has_dropout:
        return None
    return parts.window, parts.softcap, parts.head_dim, parts.input_norm.weight_D.dtype


def _segments(parts: Sequence[LayerParts | None], earlier: Sequence[Segment]) -> list[Segment]:
    """The segments of these layers, with the banks of `earlier` ones: a second bank would hold every adapter twice."""
    banks = {tuple(segment.indices): segment.bank for segment in earlier}
    segments: list[Segment] = []
    run: list[int] = []
    for index, of_layer in enumerate([*parts, None]):
        if of_layer is not None:
            run.append(index)
        elif run:
            segments.append(Segment(run, [each for i in run if (each := parts[i]) is not None], banks.get(tuple(run))))
            run = []
    return segments
