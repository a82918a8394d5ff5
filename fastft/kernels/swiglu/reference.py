"""SwiGLU in plain PyTorch.

Source of the formula and of the rounding: `LlamaMLP` in transformers' `modeling_llama.py`,
`act_fn(gate_proj(x)) * up_proj(x)`: silu is rounded to the dtype, then × up.
"""

# T tokens, F feed-forward width

import torch
from torch import Tensor
from torch.nn import functional


def swiglu(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """`act = round(silu(gate)) · up`.

    Args:
        gate_TF: fp32, bf16 or fp16; T may be 0.
        up_TF: gate's dtype.

    Returns:
        `act_TF` in the same dtype.
    """
    return functional.silu(gate_TF).mul_(up_TF)


def swiglu_backward(dact_TF: Tensor, gate_TF: Tensor, up_TF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `swiglu`, and act again.

    With `σ = sigmoid(gate)`: `dgate = dact · up · σ · (1 + gate · (1 − σ))`, `dup = dact · silu(gate)`.

    Args:
        dact_TF: the gradient of act.
        gate_TF: as in the forward; not modified.
        up_TF: as in the forward; not modified.

    Returns:
        `(dgate_TF, dup_TF, act_TF)`; act has the forward's bits, for the gradient of the adapter on the
        down projection.
    """
    silu_TF = functional.silu(gate_TF)
    dup_TF = dact_TF * silu_TF
    dgate_TF = dact_TF * up_TF
    torch.ops.aten.silu_backward.grad_input(dgate_TF, gate_TF, grad_input=dgate_TF)
    return dgate_TF, dup_TF, silu_TF.mul_(up_TF)
