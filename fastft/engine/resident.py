"""Quantized weights whose dense form stays on the device, where there is memory for both.

A layer dequantizes each weight once forward and once or twice backward.  Where memory allows it is done once, and
the quantized model trains as fast as a dense one.
"""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import nn

from fastft.adapters.lora import AdaptedLinear
from fastft.engine.bank import map_linears
from fastft.engine.parts import LayerParts
from fastft.models.quantized import is_quantized


class ResidentWeights:
    """The dense weights of the first layers."""

    def __init__(self) -> None:
        self._dense: WeakKeyDictionary[nn.Module, tuple[tuple[int, int], torch.Tensor]] = WeakKeyDictionary()

    def of(self, layers: Sequence[LayerParts | None], count: int) -> list[LayerParts | None]:
        """`layers`, the first `count` of them with dense weights; those of all others are freed."""
        before, self._dense = self._dense, WeakKeyDictionary()
        return [
            parts if parts is None or index >= count else self._with_dense(parts, before)
            for index, parts in enumerate(layers)
        ]

    def _with_dense(
        self, parts: LayerParts, before: "WeakKeyDictionary[nn.Module, tuple[tuple[int, int], torch.Tensor]]"
    ) -> LayerParts:
        dtype = parts.input_norm.weight_D.dtype

        def hold(linear: AdaptedLinear) -> AdaptedLinear:
            module = linear.module
            if not is_quantized(module):
                return linear
            packed = module.weight
            assert isinstance(packed, torch.Tensor)
            made_of = packed.data_ptr(), packed._version
            known = before.get(module)
            if known is None or known[0] != made_of or known[1].dtype != dtype:
                known = made_of, linear.weight(dtype)
            self._dense[module] = known
            return linear._replace(dense=known[1])

        return map_linears(parts, hold)
