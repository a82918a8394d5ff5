"""A linear layer with its adapter, as tensors, and what a variant of LoRA says of itself.

A variant trains a vector beside A and B.  Before a layer is computed the variant is resolved: it becomes a plain LoRA
that gives the same, with another A or B and, perhaps, a frozen matrix whose rows are scaled.  Whatever computes plain
LoRA then computes the variant, and the gradients of the plain one tell those of the variant.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fastft.models.calls import Bound
from fastft.models.quantized import dense_weight, is_quantized


class AdaptedLinear(NamedTuple):
    """y = x·Wᵀ + bias + scaling · (dropout(x)·Aᵀ·Bᵀ + b_bias), with W (out × in), A (rank × in), B (out × rank).

    With a `variant` it is that of the plain LoRA which `variant.resolved` makes of it.
    """

    module: nn.Module
    """The base layer; `weight` makes its matrix dense."""
    bias: torch.Tensor | None
    a: torch.Tensor | None
    b: torch.Tensor | None
    scaling: float
    dropout: float
    b_bias: torch.Tensor | None = None
    """(out); PEFT's `lora_bias`."""
    dense: torch.Tensor | None = None
    """The matrix of a quantized layer, where that stays on the device."""
    vector: torch.Tensor | None = None
    """What `variant` trains beside A and B."""
    number: torch.Tensor | None = None
    """One element that it has beside them, which may be trained too."""
    variant: "Variant | None" = None
    row_factors: torch.Tensor | None = None
    """(out), fp32 at least: W is the module's matrix with its rows scaled by these; None for the matrix itself."""
    reads_output: bool = False
    """Whether the backward of what was resolved to this asks for Σ_t dy · (y − bias)."""

    @property
    def trained(self) -> tuple[torch.Tensor | None, ...]:
        """A, B, vector and number; None where there is no such one, or the number is a constant."""
        number = self.number
        return self.a, self.b, self.vector, number if number is not None and number.requires_grad else None

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The frozen matrix (out × in) in `dtype`; a quantized one that does not stay dense is dequantized anew."""
        weight = self._unscaled(dtype)
        if self.row_factors is None:
            return weight
        own = self.dense is None and is_quantized(self.module)
        return torch.mul(weight, self.row_factors[:, None], out=weight if own else torch.empty_like(weight))

    def _unscaled(self, dtype: torch.dtype) -> torch.Tensor:
        if self.dense is not None and self.dense.dtype == dtype:
            return self.dense
        weight = dense_weight(self.module, dtype)
        return weight.t() if isinstance(self.module, Conv1D) else weight

    def resolved(
        self, dtype: torch.dtype, kept: torch.Tensor | None = None
    ) -> tuple["AdaptedLinear", torch.Tensor | None]:
        """A plain LoRA that gives the same in `dtype`, and what makes it quickly once more: `kept`, for the same
        values."""
        return (self, None) if self.variant is None else self.variant.resolved(self, dtype, kept)


Gradients = Sequence[torch.Tensor | None]
"""As `AdaptedLinear.trained`; or, of a resolved layer, of A and B, what `reads_output` asks for, and None."""


class Variant:
    """A kind of LoRA with a vector; one instance a kind, in `fastft.adapters.variants`."""

    name: str
    """As people call it."""
    remakes: Literal["a", "b"]
    """Which of the two matrices a resolved layer has another one of; the other is read in the products' dtype."""

    def has(self, module: Any, adapter: str) -> bool:
        """Whether this `LoraLayer`'s adapter of this name is of this kind."""
        raise NotImplementedError

    def why_not(self, module: Any, adapter: str) -> str | None:
        """Why the adapter's tensors cannot be taken for what it computes, or None."""
        raise NotImplementedError

    def called(self, module: Any, adapter: str) -> list[nn.Module]:
        """The modules that the layer calls for this adapter."""
        raise NotImplementedError

    def bound(self) -> list[Bound]:
        """What must stay as it is, beside the modules, for what was read of such adapters to hold."""
        return []

    def read(self, module: Any, adapter: str, plain: AdaptedLinear) -> AdaptedLinear:
        """`plain`, which has the base layer, scaling and dropout, with the adapter's tensors."""
        raise NotImplementedError

    def resolved(
        self, linear: AdaptedLinear, dtype: torch.dtype, kept: torch.Tensor | None
    ) -> tuple[AdaptedLinear, torch.Tensor | None]:
        """See `AdaptedLinear.resolved`."""
        raise NotImplementedError

    def gradients(self, linear: AdaptedLinear, resolved: AdaptedLinear, of_resolved: Gradients) -> Gradients:
        """From the gradients of what `linear` was resolved to, to those of `linear.trained`.

        The third of `of_resolved` is Σ_t dy · (y − bias) (out), where `resolved` reads its output.
        """
        raise NotImplementedError
