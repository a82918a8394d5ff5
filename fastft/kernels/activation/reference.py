"""The MLP's activation in plain PyTorch.

Source of the formula and of the rounding: `LlamaMLP` in transformers' `modeling_llama.py`,
`act_fn(gate_proj(x)) * up_proj(x)`: the activation is rounded to the dtype, then × up.  Where the MLP has no gate,
`gate` is all there is and `up` is None.
"""

# T tokens, F feed-forward width

import torch
from torch import Tensor
from torch.nn import functional

from fastft.kernels.activation import ActivationKind

_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}


def activate(gate_TF: Tensor, up_TF: Tensor | None, kind: ActivationKind) -> Tensor:
    """`act = round(activation(gate)) · up`.

    Args:
        gate_TF: fp32, bf16 or fp16; T may be 0.
        up_TF: gate's dtype; None for an MLP without a gate.
        kind: which activation.

    Returns:
        `act_TF` in the same dtype.
    """
    act_TF = functional.silu(gate_TF) if kind == "silu" else functional.gelu(gate_TF, approximate=_APPROXIMATE[kind])
    return act_TF if up_TF is None else act_TF.mul_(up_TF)


def activate_backward(
    dact_TF: Tensor,
    gate_TF: Tensor,
    up_TF: Tensor | None,
    kind: ActivationKind,
    out: tuple[Tensor, Tensor] | None = None,
    *,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The gradients of `activate`, and act again.

    `dgate = dact · up · activation'(gate)`, `dup = dact · activation(gate)`.  With `σ = sigmoid(gate)`, silu' is
    `σ · (1 + gate · (1 − σ))`; gelu' is `Φ(gate) + gate · φ(gate)`.

    Args:
        dact_TF: the gradient of act.
        gate_TF: as in the forward.
        up_TF: as in the forward.
        kind: as in the forward.
        out: where to write dgate and dup, such as the halves of a packed gradient; new tensors if None.
        overwrite: whether the results may take the place of `dact_TF`, `gate_TF` and `up_TF`, which nobody needs any
            more; else these are not modified.

    Returns:
        `(dgate_TF, dup_TF, act_TF)`, dup None where up is; act has the forward's bits, for the gradient of the
        adapter on the down projection.
    """
    act_TF = activate(gate_TF, None, kind)
    if up_TF is None:
        return _through(dact_TF if overwrite else dact_TF.clone(), gate_TF, kind), None, act_TF
    dgate_TF, dup_TF = out if out is not None else (torch.empty_like(act_TF), None)
    torch.mul(dact_TF, up_TF, out=dgate_TF)
    if dup_TF is None:
        dup_TF = dact_TF if overwrite else torch.empty_like(act_TF)
    torch.mul(dact_TF, act_TF, out=dup_TF)
    return _through(dgate_TF, gate_TF, kind), dup_TF, act_TF.mul_(up_TF)


def _through(d_TF: Tensor, gate_TF: Tensor, kind: ActivationKind) -> Tensor:
    """d · activation'(gate), in place."""
    if kind == "silu":
        return torch.ops.aten.silu_backward.grad_input(d_TF, gate_TF, grad_input=d_TF)
    return torch.ops.aten.gelu_backward.grad_input(d_TF, gate_TF, approximate=_APPROXIMATE[kind], grad_input=d_TF)
