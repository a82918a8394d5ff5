"""What stands between a layer's wide products, with the adapters of those products in the same pass over memory.

A rank-R term added to a T × F output by itself reads and writes the whole of it again.  Here the kernel that reads the
output anyway adds the term, and the kernel that has the gradients at hand sums those of the adapters.  In plain PyTorch
that gains nothing, and an adapter is cheapest added where it is made (`lora_linear`).
"""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Gradients(NamedTuple):
    """Of the MLP's inside; None where there is no such linear layer or adapter."""

    dgate_TF: "Tensor"
    dup_TF: "Tensor | None"
    db_gate_FR: "Tensor | None"
    """Summed in fp32, as are the other adapters' gradients."""
    db_up_FR: "Tensor | None"
    da_down_RF: "Tensor | None"
