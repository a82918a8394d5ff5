"""Activation, rotation and residual addition with adapter terms, in plain PyTorch."""

# T tokens, F columns, R rank; low_TR·matrix_RF is a term; H heads, d head size, S rows of the tables, r their width

from typing import Any

import torch
from torch import Tensor

from fastft.kernels.activation import ActivationKind, reference
from fastft.kernels.adapted import Gradients
from fastft.kernels.dropout import reference as dropout
from fastft.kernels.lora_linear import AdapterTerm
from fastft.kernels.rope.reference import rope_


def activate(
    gate_TF: Tensor,
    up_TF: Tensor | None,
    kind: ActivationKind,
    gate_term: AdapterTerm | None = None,
    up_term: AdapterTerm | None = None,
) -> Tensor:
    """`act_TF = round(activation(gate + gate_term)) · (up + up_term)`.

    Args:
        gate_TF: fp32, bf16 or fp16; T may be 0.
        up_TF: gate's dtype; None for an MLP without a gate.
        kind: which activation.
        gate_term: what the adapter adds to gate, in its dtype.
        up_term: the same for up.
    """
    return reference.activate(plus_term(gate_TF, gate_term), None if up_TF is None else plus_term(up_TF, up_term), kind)


def activate_backward(
    dact_TF: Tensor,
    gate_TF: Tensor,
    up_TF: Tensor | None,
    kind: ActivationKind,
    gate_term: AdapterTerm | None = None,
    up_term: AdapterTerm | None = None,
    dact_term: AdapterTerm | None = None,
    out: tuple[Tensor, Tensor] | None = None,
    *,
    overwrite: bool = False,
    dtype: torch.dtype = torch.float32,
    masks: Any = None,
) -> Gradients:
    """The gradients of `activate`, and of the adapters on gate, up and down as far as the sums over tokens go.

    With d = dact + dact_term and the sums g, u of the forward: `dgate = d · u · activation'(g)`,
    `dup = d · activation(g)`, `db = scaling · dgateᵀ·low` (up's alike), and `da_down = lowᵀ·act`, where low is that of
    `dact_term`, the gradient of the down projection's narrow product.

    Args:
        dact_TF: the gradient of act through the frozen weight of the down projection.
        gate_TF: as in the forward.
        up_TF: as in the forward.
        kind: as in the forward.
        gate_term: as in the forward.
        up_term: as in the forward.
        dact_term: what the adapter adds to `dact_TF`; its factor is part of its low side, which `da_down` is made of.
        out: where to write dgate and dup, such as the halves of a packed gradient; new tensors if None.
        overwrite: whether dgate and dup may take the places of `gate_TF` and `up_TF`.
        dtype: of the adapters' gradients.
        masks: of the down projection's dropout, if it has any: `dact_term` is of the elements that are kept, and so is
            `da_down`.
    """
    gate, up = plus_term(gate_TF, gate_term), None if up_TF is None else plus_term(up_TF, up_term)
    if dact_term is None or masks is None:
        dact = plus_term(dact_TF, dact_term)
    else:
        dact = dact_TF + dropout.input_gradient(
            dact_term.low_TR, dact_term.matrix_RO, [len(dact_term.matrix_RO)], masks
        )
    dgate, dup, act = reference.activate_backward(dact, gate, up, kind, out)
    return Gradients(
        dgate,
        dup,
        None if gate_term is None else (gate_term.scaling * (dgate.t() @ gate_term.low_TR)).to(dtype),
        None if up_term is None or dup is None else (up_term.scaling * (dup.t() @ up_term.low_TR)).to(dtype),
        None if dact_term is None else _da_down(dact_term, act, masks).to(dtype),
    )


def _da_down(dact_term: AdapterTerm, act_TF: Tensor, masks: Any) -> Tensor:
    if masks is None:
        return dact_term.low_TR.t() @ act_TF
    return dropout.a_gradients(dact_term.low_TR, act_TF, [len(dact_term.matrix_RO)], masks)


def add(x_TF: Tensor, residual_TF: Tensor, term: AdapterTerm, multiplier: float = 1.0) -> Tensor:
    """`residual + multiplier · (x + term)` (T × F, dtype of `residual_TF`), in x's place if it has that dtype and is
    contiguous."""
    x_TF = x_TF.contiguous()
    out_TF = x_TF if x_TF.dtype == residual_TF.dtype else None
    return torch.add(residual_TF, plus_term(x_TF, term), alpha=multiplier, out=out_TF)


def rotate_(
    q_THd: Tensor,
    k_THd: Tensor,
    cos_Sr: Tensor,
    sin_Sr: Tensor,
    q_term: AdapterTerm | None = None,
    k_term: AdapterTerm | None = None,
    *,
    inverse: bool = False,
) -> None:
    """`rope_` of q + q_term and k + k_term, in the places of q and k; `inverse` of q and k alone is the gradient.

    Args:
        q_THd: as `rope.reference.rope_` takes it; its heads lie side by side in each row.
        k_THd: the same, with as many heads or fewer.
        cos_Sr: as `rope_` takes it.
        sin_Sr: as `rope_` takes it.
        q_term: what the adapter adds to the T × H·d of all heads.
        k_term: the same for k.
        inverse: rotate back.

    Raises:
        ModelError: an odd r, or one over d.
    """
    for x_THd, term in ((q_THd, q_term), (k_THd, k_term)):
        if term is not None:
            x_THd.copy_(plus_term(x_THd.flatten(1), term).view(x_THd.shape))
        rope_(x_THd, cos_Sr, sin_Sr, inverse=inverse)


def plus_term(x_TF: Tensor, term: AdapterTerm | None) -> Tensor:
    """x + term, a new tensor; x itself without one."""
    return x_TF if term is None else torch.addmm(x_TF, term.low_TR, term.matrix_RO, alpha=term.scaling)
