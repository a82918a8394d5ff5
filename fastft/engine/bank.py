"""All adapters of a model in one buffer.

PEFT keeps some 400 small matrices.  Touching each by itself, to cast it, to collect its gradient, to update it, costs
hundreds of launches a step.  Here the parameters stay PEFT's own objects, and their storage becomes one: one kernel
casts all of them, one hands out all gradients, and an optimizer may update all at once (`engine.optimizer_step`).

The A matrices of layers that share an input lie one after the other, so their stacked form is a view.

Legend: N elements of the buffer, padding between the matrices included.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils.dlpack
from torch.utils.weak import WeakIdKeyDictionary

from fastft.adapters.lora import AdaptedLinear
from fastft.engine.parts import LayerParts

ALIGNMENT = 256
"""Elements.  Every matrix starts at a multiple: blocks of bitsandbytes' 8-bit optimizers, which are as long, then never
span two matrices, and every view is aligned for any kernel."""


class AdapterBank:
    """The trained adapter matrices of some layers, in one buffer on one device in one dtype."""

    def __init__(self, layers: Sequence[LayerParts]) -> None:
        """Move the storage of the adapters of `layers`, which `fits` says can be in one."""
        self.parameters = _in_order(layers)
        self.offsets: list[int] = []
        end = 0
        for parameter in self.parameters:
            self.offsets.append(end)
            end += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
        first = self.parameters[0]
        self.values_N = torch.zeros(end, dtype=first.dtype, device=first.device)
        for parameter, view in zip(self.parameters, self.views(self.values_N), strict=True):
            view.copy_(parameter.data)
            parameter.data = with_own_storage(view)
            _BANKS[parameter] = weakref.ref(self)
        self._addresses = [parameter.data_ptr() for parameter in self.parameters]
        self._work: torch.Tensor | None = None
        self._zeros: torch.Tensor | None = None

    @staticmethod
    def fits(layers: Sequence[LayerParts]) -> bool:
        """Whether the adapters are parameters of one dtype on one device, and each belongs to one layer only."""
        matrices = _in_order(layers)
        kinds = {(type(m), m.dtype, m.device) for m in matrices}
        distinct = len({id(m) for m in matrices}) == len(matrices)
        return len(kinds) == 1 and distinct and type(matrices[0]) is torch.nn.Parameter

    def is_of(self, layers: Sequence[LayerParts]) -> bool:
        """Whether this has the adapters of `layers`, and no others."""
        return list(map(id, self.parameters)) == list(map(id, _in_order(layers)))

    def holds(self) -> bool:
        """Whether the parameters still have their storage here; `model.to`, for one, gives them another."""
        return self._addresses == [parameter.data_ptr() for parameter in self.parameters]

    def views(self, buffer_N: torch.Tensor) -> list[torch.Tensor]:
        """Every parameter's part of a buffer of this layout, in the parameter's shape."""
        return [
            buffer_N.narrow(0, offset, parameter.numel()).view(parameter.shape)
            for parameter, offset in zip(self.parameters, self.offsets, strict=True)
        ]

    def work_layers(self, layers: Sequence[LayerParts], dtype: torch.dtype) -> list[LayerParts]:
        """`layers` with their adapters as views of a copy in `dtype`, which `refresh` brings up to date.

        In the parameters' own dtype there is no copy: the views are of the parameters themselves.
        """
        if dtype == self.values_N.dtype:
            self._work = self.values_N
        elif self._work is None or self._work.dtype != dtype or self._work is self.values_N:
            self._work = torch.empty_like(self.values_N, dtype=dtype)
        of = {id(p): view for p, view in zip(self.parameters, self.views(self._work), strict=True)}

        def replace(linear: AdaptedLinear) -> AdaptedLinear:
            if linear.a is None or linear.b is None:
                return linear
            return linear._replace(a=of[id(linear.a)], b=of[id(linear.b)])

        return [map_linears(parts, replace) for parts in layers]

    def refresh(self) -> None:
        """Copy the parameters' values into the copy that the layers read: one kernel."""
        if self._work is not None and self._work is not self.values_N:
            self._work.copy_(self.values_N)

    def join(self, gradients: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """Gradients in the order of the parameters as one new buffer of this layout, in their own dtype.

        Where one is missing, and between the matrices, it is zero.
        """
        pieces: list[torch.Tensor] = []
        dtype = next((g.dtype for g in gradients if g is not None), self.values_N.dtype)
        ends = [*self.offsets[1:], self.values_N.numel()]
        for parameter, gradient, start, end in zip(self.parameters, gradients, self.offsets, ends, strict=True):
            used = 0
            if gradient is not None:
                pieces.append(gradient.reshape(-1))
                used = parameter.numel()
            if end - start > used:
                pieces.append(self._no_gradient(end - start - used, dtype))
        return torch.cat(pieces)

    def hand_out(self, gradient_N: torch.Tensor, *, copy: bool = False) -> list[torch.Tensor]:
        """A buffer that `join` made as one gradient a parameter, in the parameters' dtype; views of one tensor.

        With `copy` that tensor is always a new one.
        """
        return self.views(gradient_N.to(self.values_N.dtype, copy=copy))

    def gradients_in_one(self) -> torch.Tensor | None:
        """The buffer in which all gradients lie as the parameters do, zero between them, or None where they do not.

        The engine's backward makes them so; accumulation and clipping leave them there.
        """
        first = self.parameters[0].grad
        if first is None or first.storage_offset() != 0 or first.dtype != self.values_N.dtype:
            return None
        storage, size = first.untyped_storage(), first.element_size()
        if storage.nbytes() != self.values_N.numel() * size:
            return None
        start = first.data_ptr()
        for parameter, offset in zip(self.parameters, self.offsets, strict=True):
            gradient = parameter.grad
            if gradient is None or not gradient.is_contiguous() or gradient.data_ptr() != start + offset * size:
                return None
        return torch.empty(0, dtype=first.dtype, device=first.device).set_(storage)

    def _no_gradient(self, elements: int, dtype: torch.dtype) -> torch.Tensor:
        if self._zeros is None or self._zeros.numel() < elements or self._zeros.dtype != dtype:
            self._zeros = torch.zeros(elements, dtype=dtype, device=self.values_N.device)
        return self._zeros[:elements]


def with_own_storage(view: torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor of its own: what pickles a tensor writes all of the storage that it is in."""
    return torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(view))


_BANKS: Any = WeakIdKeyDictionary()


def bank_of(parameter: torch.Tensor) -> AdapterBank | None:
    """The bank that a parameter was last given to, if it still lives."""
    reference = _BANKS.get(parameter)
    return None if reference is None else reference()


def map_linears(parts: LayerParts, change: Callable[[AdaptedLinear], AdaptedLinear]) -> LayerParts:
    """`parts` with every linear layer replaced by what `change` makes of it."""
    changed: dict[str, Any] = {}
    for name, value in parts._asdict().items():
        if isinstance(value, AdaptedLinear):
            changed[name] = change(value)
        elif isinstance(value, tuple) and value and all(isinstance(each, AdaptedLinear) for each in value):
            changed[name] = tuple(map(change, value))
    return parts._replace(**changed)


def in_bank_order(of_adapters: Sequence[Any]) -> list[Any]:
    """What stands for `LayerParts.adapters` (A and B by turns), in a bank's order: all A, then all B."""
    return [*of_adapters[0::2], *of_adapters[1::2]]


def _in_order(layers: Sequence[LayerParts]) -> list[Any]:
    return [matrix for parts in layers for matrix in in_bank_order(parts.adapters) if matrix is not None]
