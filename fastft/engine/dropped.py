"""What the adapters of a layer drop of their input."""

from collections.abc import Sequence

import torch

from fastft.adapters.adapted import AdaptedLinear
from fastft.engine.parts import LayerCall
from fastft.kernels.dropout import Dropped
from fastft.kernels.lora_linear.reference import drop


def dropped_of(
    x_TI: torch.Tensor | None,
    group: Sequence[AdaptedLinear],
    place: int,
    call: LayerCall,
    low_TR: torch.Tensor | None = None,
) -> Dropped | None:
    """What the group's adapters drop of their input, which has the rows of `x_TI`; None where `low_TR` is known."""
    if low_TR is not None or not call.parts.has_dropout:
        return None
    assert x_TI is not None
    dtype = call.parts.dtype or x_TI.dtype
    return drop(group, len(x_TI), dtype, x_TI.device, call.seed + place, call.ops.dropout)
