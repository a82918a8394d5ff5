"""Weights whose form in the dtype of the products stays on the device beside them, where there is memory for both.

A layer dequantizes each weight, or rounds an fp32 one to what autocast computes in, once forward and once or twice
backward.  Where memory allows it is done once, and the model trains as fast as one of such weights.

A weight that is changed in place is noticed by PyTorch's count of that, which a change through `.data` passes by.
"""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import nn

from fastft.adapters.adapted import AdaptedLinear
from fastft.engine.parts import LayerParts
from fastft.models.quantized import is_quantized

_Dense = WeakKeyDictionary[nn.Module, tuple[tuple[int, int], torch.Tensor]]
"""By linear layer: the identity of the weight, and its dense form."""


class ResidentWeights:
    """The dense weights of the first layers."""

    def __init__(self) -> None:
        self._dense: _Dense = WeakKeyDictionary()

    def of(self, layers: Sequence[LayerParts | None], count: int, dtype: torch.dtype | None) -> list[LayerParts | None]:
        """`layers`, the first `count` of them with dense weights in `dtype`; those of all others are freed."""
        before, self._dense = self._dense, WeakKeyDictionary()
        return [
            parts if parts is None or index >= count or dtype is None else self._with_dense(parts, before, dtype)
            for index, parts in enumerate(layers)
        ]

    def hold(self) -> bool:
        """Whether every weight is still the one that its dense form was made of."""
        return all(_identity(module) == made_of for module, (made_of, _) in self._dense.items())

    def _with_dense(self, parts: LayerParts, before: "_Dense", dtype: torch.dtype) -> LayerParts:
        def hold(linear: AdaptedLinear) -> AdaptedLinear:
            module = linear.module
            quantized = is_quantized(module)
            if not quantized and module.weight.dtype == dtype:
                return linear
            made_of, known = _identity(module), before.get(module)
            # PEFT merges into a dense weight through `.data`, which leaves no trace: that is made again.
            if not quantized or known is None or known[0] != made_of or known[1].dtype != dtype:
                known = made_of, linear._replace(dense=None).weight(dtype)
            self._dense[module] = known
            return linear._replace(dense=known[1])

        return parts.map_linears(hold)


def _identity(module: nn.Module) -> tuple[int, int]:
    """Changes with the storage of the module's weight, and with what is written to it in place."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.data_ptr(), weight._version
