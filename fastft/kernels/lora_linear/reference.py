"""LoRA linear layers over the library's GEMM.

Layers that share an input (q, k, v; gate, up) form a group.  Their A matrices are stacked, so the input is read
once for all of them, and the wide product adds itself to what the adapter makes (`addmm_`) instead of the other way
round, or the term is left to whoever reads the output next (`kernels.adapted`).

Legend: T tokens, I in, O out, R rank, G layers of the group.
"""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, Protocol

import torch

from fastft.kernels.dropout import Dropout, Dropped
from fastft.kernels.lora_linear import AdapterTerm


class Linear(Protocol):
    """What a layer of the group must offer; `fastft.adapters.lora.AdaptedLinear` does."""

    @property
    def bias(self) -> torch.Tensor | None:
        """(O) or None."""

    @property
    def a(self) -> torch.Tensor | None:
        """(R × I), or None where there is no adapter."""

    @property
    def b(self) -> torch.Tensor | None:
        """(O × R), or None where there is no adapter."""

    @property
    def scaling(self) -> float:
        """The factor of the adapter's output."""

    @property
    def dropout(self) -> float:
        """Probability with which an element of the adapter's input is dropped."""

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """(O × I) in `dtype`."""


class ScaledInput(NamedTuple):
    """diag(rows)·x·diag(columns), not written out: what an RMS norm makes of x, but for its roundings."""

    x_TI: torch.Tensor
    rows_T: torch.Tensor
    """fp32."""
    columns_I: torch.Tensor


class GroupGradients(NamedTuple):
    """Gradients of a group: of its input, and of each layer's A and B (None without an adapter)."""

    dx_TI: torch.Tensor | None
    da: list[torch.Tensor | None]
    db: list[torch.Tensor | None]


NarrowGradients = Callable[
    [Sequence[torch.Tensor], torch.Tensor | None, Sequence[Linear]],
    tuple[torch.Tensor | None, list[torch.Tensor | None]],
]
"""`narrow_gradients` of a backend."""


def lora_linear(
    x_TI: torch.Tensor,
    group: Sequence[Linear],
    *,
    dropped: Dropped | None = None,
    low_TR: torch.Tensor | None = None,
    left_out: Collection[int] = (),
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """The outputs (T × O) of every layer of the group, and x·Aᵀ of all adapters side by side (T × ΣR) or None.

    Args:
        x_TI: the group's input.
        group: the layers.
        dropped: what `drop` made for this input; not read where `low_TR` is known.
        low_TR: x·Aᵀ, where it is known from an earlier call.
        left_out: layers whose outputs lack what their adapters add; whoever reads them adds `adapter_terms`.
    """
    if low_TR is None:
        low_TR = low_rank(x_TI, group, dropped)
    terms = [None if g in left_out else term for g, term in enumerate(adapter_terms(low_TR, group))]
    return [_output(x_TI, layer, term) for layer, term in zip(group, terms, strict=True)], low_TR


def adapter_terms(low_TR: torch.Tensor | None, group: Sequence[Linear]) -> list[AdapterTerm | None]:
    """What each layer's adapter adds to its output; None without an adapter."""
    terms: list[AdapterTerm | None] = [None] * len(group)
    if low_TR is not None:
        for g, low, _ in _slices(low_TR, group):
            b = group[g].b
            assert b is not None
            terms[g] = AdapterTerm(low, b.to(low.dtype).t(), group[g].scaling)
    return terms


def _output(x_TI: torch.Tensor, layer: Linear, term: AdapterTerm | None) -> torch.Tensor:
    """x·Wᵀ + bias + term.  The wide product comes last, on top of the others: it reads what it adds to while it
    computes, which costs less than a pass of its own over the output (`bench.kernels.lora_strategies`)."""
    weight_IO = layer.weight(x_TI.dtype).t()
    bias = None if layer.bias is None else layer.bias.to(x_TI.dtype)
    if term is None:
        return torch.mm(x_TI, weight_IO) if bias is None else torch.addmm(bias, x_TI, weight_IO)
    if bias is None:
        y_TO = _scaled_product(term.low_TR, term.matrix_RO, term.scaling)
    else:
        y_TO = torch.addmm(bias, term.low_TR, term.matrix_RO, alpha=term.scaling)
    return y_TO.addmm_(x_TI, weight_IO)


def narrow_gradients(
    dy: Sequence[torch.Tensor], low_TR: torch.Tensor | None, group: Sequence[Linear]
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """`low_rank_gradient` and `b_gradients`, all that reads dy but for the wide product.

    Args:
        dy: the gradients of the outputs (each T × O); T may be 0.
        low_TR: x·Aᵀ of all adapters side by side, in dy's dtype; None where nobody asks for dB.
        group: the layers.
    """
    return low_rank_gradient(dy, group), b_gradients(dy, low_TR, group)


def lora_linear_backward(
    dy: Sequence[torch.Tensor],
    x_TI: "torch.Tensor | ScaledInput | None",
    low_TR: torch.Tensor | None,
    group: Sequence[Linear],
    *,
    dropped: Dropped | None = None,
    needs_dx: bool = True,
    narrow: NarrowGradients = narrow_gradients,
) -> GroupGradients:
    """Gradients of the group from its outputs' gradients `dy` (each T × O).

    dA = Σ_t dlowᵀ·dropout(x), dB = scaling · dyᵀ·low, dx = Σ_g dy·W + dlow·A, with dlow = scaling · dy·B.  The
    frozen W has no gradient.

    Args:
        dy: the gradients of the outputs.
        x_TI: the group's input; None where nobody asks for dA.
        low_TR: x·Aᵀ of all adapters side by side; None where nobody asks for dB.
        group: the layers.
        dropped: that of the forward.
        needs_dx: whether the input's gradient is asked for.
        narrow: the backend's `narrow_gradients`.
    """
    dlow_TR, db = narrow(dy, low_TR, group)
    da = a_gradients(dlow_TR, x_TI, group, dropped)
    dx_TI = input_gradient(dy, dlow_TR, group, dropped) if needs_dx else None
    return GroupGradients(dx_TI, da, db)


def a_gradients(
    dlow_TR: torch.Tensor | None,
    x_TI: "torch.Tensor | ScaledInput | None",
    group: Sequence[Linear],
    dropped: Dropped | None = None,
) -> list[torch.Tensor | None]:
    """dA (R × I) of every layer in its adapter's dtype; None without an adapter, or where nobody kept the input."""
    da: list[torch.Tensor | None] = [None] * len(group)
    if dlow_TR is None or x_TI is None:
        return da

    def product(dlow_TR: torch.Tensor, x_TI: torch.Tensor) -> torch.Tensor:
        """Over the whole input for all adapters of the group."""
        if dropped is None:
            return torch.mm(dlow_TR.t(), x_TI)
        return dropped.ops.a_gradients(dlow_TR, x_TI, _ranks(group), dropped.masks)

    if isinstance(x_TI, ScaledInput):
        scaled_TR = torch.mul(dlow_TR, x_TI.rows_T[:, None], out=torch.empty_like(dlow_TR))
        stacked_RI = product(scaled_TR, x_TI.x_TI).mul_(x_TI.columns_I)
    else:
        stacked_RI = product(dlow_TR, x_TI)
    for g, rows, a in _slices(stacked_RI.t(), group):
        da[g] = rows.t().to(a.dtype)
    return da


def b_gradients(
    dy: Sequence[torch.Tensor], low_TR: torch.Tensor | None, group: Sequence[Linear]
) -> list[torch.Tensor | None]:
    """dB (O × R) of every layer in its adapter's dtype; None without an adapter."""
    db: list[torch.Tensor | None] = [None] * len(group)
    if low_TR is not None:
        for g, low, _ in _slices(low_TR, group):
            b = group[g].b
            assert b is not None
            db[g] = _scaled_product(dy[g].t(), low, group[g].scaling).to(b.dtype)
    return db


def input_gradient(
    dy: Sequence[torch.Tensor],
    dlow_TR: torch.Tensor | None,
    group: Sequence[Linear],
    dropped: Dropped | None = None,
) -> torch.Tensor:
    """dx (T × I) alone: Σ_g dy·W + dlow·A; without the latter where `dlow_TR` is None."""
    dtype = dy[0].dtype
    dx_TI = None
    if dlow_TR is not None and dropped is None:
        dx_TI = torch.mm(dlow_TR, _stacked_a(group, dtype))
    elif dlow_TR is not None and dropped is not None:
        dx_TI = dropped.ops.input_gradient(dlow_TR, _stacked_a(group, dtype), _ranks(group), dropped.masks)
    for d, layer in zip(dy, group, strict=True):
        weight_OI = layer.weight(dtype)
        dx_TI = torch.mm(d, weight_OI) if dx_TI is None else dx_TI.addmm_(d, weight_OI)
    assert dx_TI is not None
    return dx_TI


def drop(
    group: Sequence[Linear], tokens: int, dtype: torch.dtype, device: torch.device, seed: int, ops: Dropout
) -> Dropped | None:
    """Which elements of an input of so many tokens the group's adapters drop: a function of `seed`, so that a
    recomputation repeats it; None where none does."""
    adapted = [(layer.dropout, layer.a.shape[1]) for layer in group if layer.a is not None]
    if not any(p > 0 for p, _ in adapted):
        return None
    return Dropped(ops, ops.masks([p for p, _ in adapted], (tokens, adapted[0][1]), dtype, device, seed))


def low_rank_gradient(dy: Sequence[torch.Tensor], group: Sequence[Linear]) -> torch.Tensor | None:
    """dlow = scaling · dy·B of all adapters side by side (T × ΣR), or None where the group has none."""
    adapted = [(d, layer) for d, layer in zip(dy, group, strict=True) if layer.b is not None]
    if not adapted:
        return None
    if len(adapted) == 1:
        d, layer = adapted[0]
        assert layer.b is not None
        return _scaled_product(d, layer.b.to(d.dtype), layer.scaling)
    ranks = [layer.b.shape[1] for _, layer in adapted if layer.b is not None]
    dlow_TR = dy[0].new_empty(dy[0].shape[0], sum(ranks))
    for (d, layer), out in zip(adapted, dlow_TR.split(ranks, dim=1), strict=True):
        assert layer.b is not None
        _scaled_product(d, layer.b.to(d.dtype), layer.scaling, out)
    return dlow_TR


def low_rank(x_TI: torch.Tensor, group: Sequence[Linear], dropped: Dropped | None = None) -> torch.Tensor | None:
    """dropout(x)·Aᵀ of all adapters side by side (T × ΣR), or None where the group has none."""
    if all(layer.a is None for layer in group):
        return None
    a_RI = _stacked_a(group, x_TI.dtype)
    if dropped is None:
        return torch.mm(x_TI, a_RI.t())
    return dropped.ops.low_rank(x_TI, a_RI, _ranks(group), dropped.masks)


def _scaled_product(
    x_MK: torch.Tensor, y_KN: torch.Tensor, scaling: float, out_MN: torch.Tensor | None = None
) -> torch.Tensor:
    """scaling · x·y in one launch, into `out_MN` or a new tensor."""
    if out_MN is None:
        out_MN = x_MK.new_empty(x_MK.shape[0], y_KN.shape[1])
    return torch.addmm(out_MN, x_MK, y_KN, beta=0.0, alpha=scaling, out=out_MN)


def _slices(dlow_TR: torch.Tensor, group: Sequence[Linear]) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    found = []
    offset = 0
    for g, layer in enumerate(group):
        if layer.a is not None:
            rank = layer.a.shape[0]
            found.append((g, dlow_TR[:, offset : offset + rank], layer.a))
            offset += rank
    return found


def _stacked_a(group: Sequence[Linear], dtype: torch.dtype) -> torch.Tensor:
    matrices = [layer.a for layer in group if layer.a is not None]
    if len(matrices) == 1:
        return matrices[0].to(dtype)
    first, inputs = matrices[0], matrices[0].shape[1]
    storage = first.untyped_storage().data_ptr()
    rows, address = 0, first.data_ptr()
    for a in matrices:
        here = a.data_ptr() == address and a.untyped_storage().data_ptr() == storage
        if not here or a.dtype != first.dtype or not a.is_contiguous():
            return torch.cat(matrices).to(dtype)
        rows, address = rows + a.shape[0], address + a.numel() * a.element_size()
    # One after the other in memory, as in an adapter bank: nothing to copy.
    return first.as_strided((rows, inputs), (inputs, 1)).to(dtype)


def _ranks(group: Sequence[Linear]) -> list[int]:
    return [layer.a.shape[0] for layer in group if layer.a is not None]
