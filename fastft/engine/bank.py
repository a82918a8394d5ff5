"""All adapters of a model in one buffer.

PEFT keeps some 400 small matrices.  Touching each by itself, to cast it, to collect its gradient, to update it, costs
hundreds of launches a step.  Here the parameters stay PEFT's own objects, and their storage becomes one: one kernel
casts all of them, one hands out all gradients, and an optimizer may update all at once (`engine.optimizer_step`).

The A matrices of layers that share an input lie one after the other, so their stacked form is a view.

A storage may become another one only where nobody can tell.  Somebody who holds an alias of it (a state dict, an array
of NumPy, the flat buffer of another library, a second model) expects it to follow the training, and what they write to
it to be what is trained.  So `AdapterBank.fits` asks whether each parameter has its storage alone; where one has not,
all of them stay where they are, and the layers read them there.

Legend: N elements of the buffer, padding between the matrices included.
"""

import sys
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.utils.dlpack
from torch.multiprocessing.reductions import StorageWeakRef

from fastft.adapters.adapted import AdaptedLinear
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
        for address in [address for address, buffer in _PLACES.items() if buffer.expired()]:
            del _PLACES[address]
        for parameter, view in zip(self.parameters, self.views(self.values_N), strict=True):
            view.copy_(parameter.data)
            parameter.data = with_own_storage(view)
            _BANKS[id(parameter)] = self
            _PLACES[parameter.data_ptr()] = StorageWeakRef(self.values_N.untyped_storage())
        self._addresses = list(map(torch.Tensor.data_ptr, self.parameters))
        self._sizes = list(map(torch.Tensor.numel, self.parameters))
        self._work: torch.Tensor | None = None
        self._zeros: torch.Tensor | None = None

    @staticmethod
    def fits(layers: Sequence[LayerParts]) -> bool:
        """Whether the adapters are parameters of one dtype on one device, and each belongs to one layer only, and
        nobody else sees where they lie."""
        matrices = _in_order(layers)
        kinds = {(type(m), m.dtype, m.device) for m in matrices}
        distinct = len({id(m) for m in matrices}) == len(matrices)
        same = len(kinds) == 1 and distinct and type(matrices[0]) is torch.nn.Parameter
        return same and all(map(_has_its_storage_alone, matrices))

    def is_of(self, layers: Sequence[LayerParts]) -> bool:
        """Whether this has the adapters of `layers`, and no others."""
        return list(map(id, self.parameters)) == list(map(id, _in_order(layers)))

    def holds(self) -> bool:
        """Whether the parameters still have their storage here, and all of it; `model.to`, for one, gives them another,
        and a rank that is pruned in place takes less."""
        return self._addresses == list(map(torch.Tensor.data_ptr, self.parameters)) and self._sizes == list(
            map(torch.Tensor.numel, self.parameters)
        )

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
            # What is made anew for each forward is made of the parameter itself, and rounded once.
            remade = None if linear.variant is None else linear.variant.remakes
            a, b = linear.a, linear.b
            return linear._replace(a=a if remade == "a" else of[id(a)], b=b if remade == "b" else of[id(b)])

        return [parts.map_linears(replace) for parts in layers]

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


def _has_its_storage_alone(parameter: torch.Tensor) -> bool:
    """Whether nobody else can see that a parameter's values lie where they do, or change them there.

    Memory that PyTorch did not allocate (an array's that it was made of, a file's, another library's) may be seen by
    its owner, and another process sees memory that is shared; both without PyTorch's knowing who.
    """
    if _holders(parameter) != _holders(torch.empty(1, device="cpu")):
        return False
    storage = parameter.untyped_storage()
    buffer = _PLACES.get(parameter.data_ptr())
    of_a_bank = buffer is not None and not buffer.expired()  # an earlier one, perhaps; PyTorch cannot resize it either
    return (
        storage.nbytes() == parameter.nbytes  # a view of something larger has a storage that is not its own
        and parameter.is_contiguous()
        and (of_a_bank or storage.resizable())
        and not (parameter.device.type == "cpu" and storage.is_shared())  # all of a GPU's count as shared
    )


def _holders(tensor: torch.Tensor) -> tuple[int, int]:
    """How many hold a tensor's storage, in PyTorch and in Python; compared with that of a new tensor, since how a
    tensor itself counts differs between releases."""
    storage = tensor.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata), sys.getrefcount(storage)


_BANKS: "weakref.WeakValueDictionary[int, AdapterBank]" = weakref.WeakValueDictionary()
"""By the parameter's id, which is nobody else's while the bank lives, for it holds its parameters.  A weak reference to
a parameter would be in the way of `torch.utils.swap_tensors`."""
_PLACES: dict[int, StorageWeakRef] = {}
"""The buffer of each parameter's place, by the place's address; parameters may outlive the bank that put them there."""


def bank_of(parameter: torch.Tensor) -> AdapterBank | None:
    """The bank that a parameter was last given to, if it still lives."""
    return _BANKS.get(id(parameter))


def in_bank_order(of_adapters: Sequence[Any]) -> list[Any]:
    """What stands for `LayerParts.adapters` (A, B, vector and number by turns), in a bank's order: all A, all B and so
    on."""
    return [*of_adapters[0::4], *of_adapters[1::4], *of_adapters[2::4], *of_adapters[3::4]]


def _in_order(layers: Sequence[LayerParts]) -> list[Any]:
    return [matrix for parts in layers for matrix in in_bank_order(parts.adapters) if matrix is not None]
