"""What the engine read of a model's decoder layers, for as long as nothing about them changes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from operator import attrgetter, is_
from typing import Any

import torch
from torch import nn

from fastft.engine import optimizer_step
from fastft.engine.bank import AdapterBank
from fastft.engine.graphs import GraphMode, Graphs
from fastft.engine.layers_watch import AROUND, LayersWatch, Look
from fastft.engine.parts import LayerParts, read_parts
from fastft.engine.precision import compute_dtype
from fastft.engine.resident import ResidentWeights
from fastft.engine.support import why_no_layer, why_no_stack
from fastft.engine.watch import has_global_hooks
from fastft.models.identity import attention_function, called_by, called_by_name, mask_function
from fastft.models.spec import LayerSpec


class Stack:
    """All layers of a model that can all run fused, with their adapters in one bank where that is possible."""

    def __init__(self, parts: Sequence[LayerParts], bank: AdapterBank | None = None) -> None:
        """`bank` is taken over if it is these layers'."""
        self.parts = list(parts)
        self.frozen = [of_layer.frozen for of_layer in parts]
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

    def prepare(self, dtype: torch.dtype, look: Look) -> tuple[list[LayerParts], AdapterBank | None]:
        """The layers' parts for a forward in `dtype`, and the bank whose working copy they read."""
        if self.bank is None or not self.bank.holds():
            # Of what changed, nothing is moved into a bank.
            if not look.at_all() or not AdapterBank.fits(self.parts):
                return [parts.computing_in(dtype) for parts in self.parts], None
            self.bank, self._work_dtype = AdapterBank(self.parts), None
            optimizer_step.install()
        if self._work_dtype != dtype:
            work = self.bank.work_layers(self.parts, dtype)
            self._work, self._work_dtype = [parts.computing_in(dtype) for parts in work], dtype
        return self._work, self.bank

    def may_record(self, tokens: int, mode: GraphMode, device: torch.device) -> bool:
        """Whether a forward of so many tokens may replay CUDA graphs, which padding does not slow down."""
        graphs = self.graphs(mode, device)
        return graphs is not None and graphs.worth_it(tokens) and not any(parts.has_dropout for parts in self.parts)


class ModelReading:
    """What was read of one model's layers.  A copy of it starts empty."""

    def __init__(self, resident: ResidentWeights | None = None) -> None:
        """`resident` is shared with another reading of the same layers."""
        self._watch: LayersWatch | None = None
        self._around: tuple[Any, ...] = ()
        """What counts beside the modules."""
        self._modules: list[Any] = []
        """Those that were read, from the top."""
        self._index: dict[nn.Module, int] = {}
        self.resident = ResidentWeights() if resident is None else resident
        self.parts: list[LayerParts | None] = []
        """Of each layer; None where it cannot run fused."""
        self.reasons: list[str | None] = []
        """Why not."""
        self.why_no_stack: str | None = None
        """Why the layers cannot run as one, though each of them may."""
        self.stack: Stack | None = None
        """All of them, where they can."""
        self.needed_no_mask = False
        """Whether the last attention mask that was looked at could be left out."""
        self.may_drop = False
        """Whether an adapter in them drops elements of its input in training."""
        self.shares_layers = False
        """Whether not each of them has a place of its own in a key/value cache: a second one sees what the first put
        there."""
        self.quiet = False
        """Whether no module in them has a hook."""
        self.count = 0
        """How often the layers were read."""
        self.is_fresh = False
        """Whether they were looked at in the forward that is under way."""
        self.look = Look()
        """That forward's, which may have groups of layers before it."""
        self.ran_whole = False
        """Whether, since they were read, all of them ran as one."""

    def __reduce__(self) -> tuple[type["ModelReading"], tuple[()]]:
        """Nothing of this is worth copying: it is read again from the copied modules."""
        return ModelReading, ()

    def refresh(
        self, backbone: nn.Module, spec: LayerSpec, resident_layers: int = 0, *, while_running: bool = False
    ) -> None:
        """Read the layers again if anything about them changed.

        With `while_running`, layers that ran as one are not all looked at: whoever runs them asks `look` before each.
        """
        config: Any = backbone.config
        layers, norm = layers_and_norm(backbone, spec)
        stream = norm._parameters.get("weight")
        # Of dense forms, where there are any.
        dtype = None if stream is None or not resident_layers else compute_dtype(stream)
        around = (
            attention_function(spec, config), mask_function(config), config, has_global_hooks(), resident_layers,
            type(backbone), type(getattr(backbone, spec.layers)), len(backbone.__dict__), dtype,
        )  # fmt: skip
        modules = [*layers, norm, getattr(backbone, spec.rotary_embedding, None)]
        replaced = len(modules) != len(self._modules) or not all(map(is_, modules, self._modules))
        unchanged = False
        if self._watch is not None and not replaced and around == self._around:
            self.look = self._watch.look()
            unchanged = self.look.at(AROUND) if while_running and self.ran_whole else self.look.at_all()
        if not unchanged or (resident_layers and not self.resident.hold()):
            self._modules, self._index = modules, {layer: index for index, layer in enumerate(layers)}
            self._around = around
            self._read(backbone, spec, resident_layers, dtype)
            self.look, self.ran_whole = Look(), False
        self.is_fresh = True

    def as_it_is(self) -> Callable[[], AbstractContextManager[bool]]:
        """What puts switches and constants of the layers back to what they are now, and says whether all is so then."""
        watch, count = self._watch, self.count
        buffers = [] if watch is None else watch.buffers()

        @contextmanager
        def put_back() -> Iterator[bool]:
            if watch is None:
                yield self.count == count
                return
            with watch.put_back(buffers):
                yield watch.computes_what_it_did()

        return put_back

    def of(self, layer: nn.Module) -> tuple[LayerParts | None, str | None] | None:
        """A layer's parts, or why it cannot run fused, as looked at in this forward; None if it was not."""
        index = self._index.get(layer) if self.is_fresh else None
        return None if index is None else (self.parts[index], self.reasons[index])

    def _read(self, backbone: nn.Module, spec: LayerSpec, resident_layers: int, dtype: torch.dtype | None) -> None:
        config: Any = backbone.config
        layers, norm = layers_and_norm(backbone, spec)
        rotary = getattr(backbone, spec.rotary_embedding, None)
        around = [norm] if rotary is None else [norm, rotary]
        bound = [*called_by_name(spec), (type(backbone), "forward", type(backbone).forward)]
        self._watch = LayersWatch(layers, around, called_by(spec, backbone, config), bound, config)
        self.quiet = self._watch.quiet
        most = getattr(config, "num_hidden_layers", len(layers))
        places = [getattr(attrgetter(spec.attention)(x), "layer_idx", None) if _has(x, spec) else None for x in layers]
        self.shares_layers = len(set(places)) < len(places) or len(layers) > most
        self.may_drop = any(isinstance(m, nn.Dropout) and m.p > 0 for layer in layers for m in layer.modules())
        self.why_no_stack = why_no_stack(backbone, layers, spec)
        self.reasons = [why_no_layer(layer, spec, index) for index, layer in enumerate(layers)]
        self.parts = [
            read_parts(layer, spec, index) if reason is None else None
            for index, (layer, reason) in enumerate(zip(layers, self.reasons, strict=True))
        ]
        self.parts = self.resident.of(self.parts, 0 if dtype is None else resident_layers, dtype)
        whole = [parts for parts in self.parts if parts is not None]
        bank = None if self.stack is None else self.stack.bank
        # A second bank would hold every adapter twice.
        self.stack = Stack(whole, bank) if whole and len(whole) == len(layers) else None
        self.count += 1


def _has(layer: nn.Module, spec: LayerSpec) -> bool:
    return isinstance(getattr(layer, spec.attention, None), nn.Module)


def layers_and_norm(backbone: nn.Module, spec: LayerSpec) -> tuple[list[nn.Module], nn.Module]:
    """The decoder layers that stock's loop would visit, and the norm behind them."""
    layers, norm = attrgetter(spec.layers, spec.final_norm)(backbone)
    most = getattr(backbone.config, "num_hidden_layers", None) if spec.counts_layers else None
    return list(layers)[:most], norm
