"""Linear layers that share an input, each with its LoRA, in forward and backward."""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class AdapterTerm(NamedTuple):
    """scaling · low·M: what an adapter adds to its layer's output (M = Bᵀ) or to its input's gradient (M = A).

    Left out of the product with the frozen weight, it can be added by whoever reads the result next.
    """

    low_TR: "Tensor"
    """x·Aᵀ, or the gradient of it."""
    matrix_RO: "Tensor"
    """In the dtype of `low_TR`."""
    scaling: float = 1.0
