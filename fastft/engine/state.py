"""What patched modules know: the settings that one model shares, and each module's own state."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn

from fastft.backends import Backend
from fastft.engine import optimizer_step
from fastft.engine.attach import STATE
from fastft.engine.graphs import GraphMode
from fastft.engine.ledger import Ledger
from fastft.engine.reading import ModelReading
from fastft.engine.watch import CHECKPOINT
from fastft.models.identity import why_mode
from fastft.models.spec import LayerSpec
from fastft.plan import Choices, Policy

_C: Any = torch._C
_TRACING_MODES = tuple(getattr(_C._TorchDispatchModeKey, name) for name in ("FAKE", "PROXY", "FUNCTIONAL"))
REPLACED = "its forward was replaced"
READ = "_fastft_read"
"""The attribute under which a patched model with head keeps its `Read`."""
_SIZE_STEP = 64
BACKWARD_CHUNK = 2048
"""Tokens of an MLP's backward at a time, where gradient checkpointing asks for little memory."""


_Made = TypeVar("_Made")


class Read:
    """What was read of the modules of one model.  A copy of it starts empty: it is read again from the copied modules.

    It refers to them, so the model with head keeps it: in what the modules below have, it would be a circle, and a
    model that nobody needs any more would keep its memory until Python's collector comes by.
    """

    def __init__(self) -> None:
        self.layers = ModelReading()
        self.parts: dict[str, Any] = {}
        """By a part's name, whatever it keeps."""
        self.by_adapters: dict[tuple[Any, ...], ModelReading] = {}
        """By what adapters are active, for who changes them from call to call; `layers` is one of these."""

    def __reduce__(self) -> tuple[type["Read"], tuple[()]]:
        return Read, ()


class Placed(NamedTuple):
    """What is chosen when the size of a batch is known."""

    placement: list[Policy]
    loss_chunk_tokens: int
    mlp_chunk_tokens: int | None = None
    resident_layers: int = 0
    host_embedding: bool = False
    graphs: GraphMode = "auto"

    @classmethod
    def of(cls, choices: Choices) -> "Placed":
        """The part of a plan's choices that is about memory."""
        return cls(**{name: getattr(choices, name) for name in cls._fields})


@dataclass
class EngineSettings:
    """What every patched module of one model shares."""

    ops: Backend
    spec: LayerSpec
    ledger: Ledger
    placement: list[Policy]
    attention: str
    loss_chunk_tokens: int
    placement_is_fixed: bool
    """Whether the placement was chosen (a plan, the user), so that gradient checkpointing does not replace it."""
    choose_placement: Callable[[int, int], Placed] | None = None
    """From (B, S) to the placement, asked when a batch of a new size comes (S is rounded up to a multiple of 64); None
    where the placement is given."""
    chosen: dict[tuple[int, int, bool], Placed] = field(default_factory=dict)
    steps_before: int = field(default_factory=optimizer_step.steps)
    """Optimizer steps before this model was patched."""
    graphs: GraphMode = "auto"
    mlp_chunk_tokens: int | None = None
    resident_layers: int = 0
    """So many layers, the first ones, keep their quantized weights dense as well."""
    host_embedding: bool = False
    """Whether the input embedding stays in host memory."""
    why_stock: str | None = None
    """Why nothing of the model may run fused at the moment: every replaced `forward` goes to the original."""
    without_gradients: bool = False
    """Whether what is called without gradients runs fused, too, at the moment."""
    inputs_differ: bool | None = None
    """Whether stock's loop hands other inputs to its layers than the engine gathers; None until it was asked."""
    captured: Any = None
    """While the inputs of the layers are looked at, what the layers were given; they compute nothing then."""

    def place(self, batch: int, tokens: int) -> None:
        """Set the placement and the chunks for a micro-batch of `batch` rows of `tokens` tokens."""
        if self.choose_placement is None:
            return
        # Rounded up, so that ragged batches share an answer.  Asked again once an optimizer has its states: what stands
        # is then known.
        size = (batch, -(-tokens // _SIZE_STEP) * _SIZE_STEP)
        asked = (*size, optimizer_step.steps() > self.steps_before)
        if asked not in self.chosen:
            self.chosen[asked] = self.choose_placement(*size)
        for name, value in self.chosen[asked]._asdict().items():
            setattr(self, name, value)

    depth: int = 0
    """How many of the model's forwards are under way, one inside the other."""
    knows_head: bool = False
    """Whether the forward that is under way has said what head and loss run on."""
    model: Callable[[], nn.Module | None] = lambda: None
    """The model with head, while it lives."""
    read_without_model: Read = field(default_factory=Read)
    """Where somebody goes on with a part of a model that is gone."""

    @property
    def reading(self) -> ModelReading:
        """What was read of the decoder layers."""
        return self._read().layers

    def read_of(self, name: str, make: Callable[[], _Made]) -> _Made:
        """What was read of the part of this name; new if nothing was yet."""
        parts = self._read().parts
        if name not in parts:
            parts[name] = make()
        read: _Made = parts[name]
        return read

    def _read(self) -> Read:
        model = self.model()
        read: Read = self.read_without_model if model is None else model.__dict__.get(READ, self.read_without_model)
        return read

    @contextmanager
    def reading_for(self, adapters: tuple[Any, ...]) -> Iterator[None]:
        """Within it, the layers are read for themselves under these active adapters, so that a policy and its reference
        do not make each other be read anew; and what runs fused does so without gradients as well."""
        read = self._read()
        before, without = read.layers, self.without_gradients
        if adapters not in read.by_adapters:
            taken = before in read.by_adapters.values() or not adapters
            read.by_adapters[adapters] = ModelReading(before.resident) if taken else before
        read.layers, self.without_gradients = read.by_adapters[adapters], True
        try:
            yield
        finally:
            read.layers, self.without_gradients = before, without

    @contextmanager
    def forward(self) -> Iterator[None]:
        """While the model, or its decoder, computes."""
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
            if self.depth == 0:
                self.reading.is_fresh = False
                self.ledger.tell()

    @property
    def is_off(self) -> bool:
        """Whether everything goes to the original now."""
        return self.why_stock is not None or not (self.without_gradients or torch.is_grad_enabled())

    @contextmanager
    def head_decided(self) -> Iterator[None]:
        """While stock's code around the decoder runs, and the ledger has head and loss already."""
        before, self.knows_head = self.knows_head, True
        try:
            yield
        finally:
            self.knows_head = before

    @contextmanager
    def stock_only(self, reason: str) -> Iterator[None]:
        """Within it, nothing of the model runs fused, nor what gradient checkpointing runs again in the backward."""
        before, self.why_stock = self.why_stock, reason
        model = self.model() if torch.is_grad_enabled() else None
        checkpointed = [] if model is None else [m.__dict__ for m in model.modules() if CHECKPOINT in m.__dict__]
        own = [attributes[CHECKPOINT] for attributes in checkpointed]
        for attributes, checkpoint in zip(checkpointed, own, strict=True):
            attributes[CHECKPOINT] = partial(self._checkpoint_stock, reason, checkpoint)
        try:
            yield
        finally:
            self.why_stock = before
            for attributes, checkpoint in zip(checkpointed, own, strict=True):
                attributes[CHECKPOINT] = checkpoint

    def _checkpoint_stock(
        self, reason: str, checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """What `checkpoint` makes of `function`, whose second run has to be the first's."""

        def stock(*args: Any, **kwargs: Any) -> Any:
            with self.stock_only(reason):
                return function(*args, **kwargs)

        return checkpoint(stock, *args, **kwargs)


@dataclass
class ModuleState:
    """What one patched module knows."""

    settings: EngineSettings
    name: str
    index: int = 0
    original: Callable[..., Any] | None = None
    """An instance's own `forward` from before the patch; None means the class's."""
    inside: bool = False
    """Whether `original` is running: if it calls the patched `forward` that it once found here, that is the module."""

    @property
    def replaced(self) -> str | None:
        """The reason not to run fused what somebody else had already given another `forward`."""
        return None if self.original is None or self.inside else REPLACED


def why_replaced(module: nn.Module) -> str | None:
    """The reason in the ledger where somebody else gave this module, as an instance, another `forward` before."""
    return REPLACED if "forward" in module.__dict__ and STATE not in module.__dict__ else None


def state_of(module: nn.Module) -> ModuleState:
    """The state of a patched module."""
    state: ModuleState = module.__dict__[STATE]
    return state


def policy_of(layer: nn.Module) -> Policy:
    """What a patched layer saves: as placed; where that is left open, `full` if gradient checkpointing is on."""
    state = state_of(layer)
    if layer.gradient_checkpointing and not state.settings.placement_is_fixed:
        return "full"
    return state.settings.placement[state.index]


def backward_chunk_of(layer: nn.Module) -> int | None:
    """How many tokens the MLP's backward takes at a time, where nobody chose: fewer if gradient checkpointing is on."""
    settings = state_of(layer).settings
    asked = layer.gradient_checkpointing and not settings.placement_is_fixed and settings.mlp_chunk_tokens is None
    return BACKWARD_CHUNK if asked else None


def call_original(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the module would have returned without the patch."""
    state: ModuleState | None = module.__dict__.get(STATE)
    if state is None or state.original is None or state.inside:
        return type(module).forward(module, *args, **kwargs)
    state.inside = True
    try:
        return state.original(*args, **kwargs)
    finally:
        state.inside = False


def why_not_differentiated() -> str | None:
    """Why a forward has to be stock's own here, whatever the modules are, or None.

    The engine's functions have a backward for reverse-mode automatic differentiation, and nothing else.
    """
    if torch._C._are_functorch_transforms_active():
        return "torch.func transforms it"
    if forward_ad._current_level >= 0:
        return "forward-mode automatic differentiation is on"
    if torch.jit.is_tracing() or torch.compiler.is_exporting() or any(map(_C._get_dispatch_mode, _TRACING_MODES)):
        return "the model is being traced"
    return why_mode()
