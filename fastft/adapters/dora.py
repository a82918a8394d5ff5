"""DoRA: y = c ∘ (x·Wᵀ + scaling · x·Aᵀ·Bᵀ) + bias, with c = m / ‖W + scaling·B·A‖ by rows, and a magnitude m a row.

The norm counts as a constant in the backward, as section 4.3 of the paper has it.  So it is a plain LoRA with c ∘ W for
W and c ∘ B for B, and m's gradient is the sum of dy ∘ (y − bias) over the tokens, by m.

B·A is never written out: ‖W + s·B·A‖² = ‖W‖² + B ∘ (2s·W·Aᵀ + s²·B·A·Aᵀ), summed by rows in fp32.

Sources: `peft.tuners.lora.dora.DoraLinearLayer`; "DoRA: Weight-Decomposed Low-Rank Adaptation",
https://huggingface.co/papers/2402.09353.
"""

# I in, O out, R rank

from typing import Any

import peft.tuners.lora.dora as of_peft
import torch
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn
from transformers.pytorch_utils import Conv1D

from fastft.adapters.adapted import AdaptedLinear, Gradients, Variant
from fastft.models.calls import Bound
from fastft.models.identity import is_own

_SMALLEST = 1e-12
"""Stands for a magnitude of zero, whose row's output would say nothing of its gradient."""


class Dora(Variant):
    """The vector is m (O)."""

    name = "DoRA"
    remakes = "b"

    def has(self, module: Any, adapter: str) -> bool:
        """See `Variant.has`."""
        return type(module.lora_variant.get(adapter)) is DoraLinearVariant

    def why_not(self, module: Any, adapter: str) -> str | None:
        """See `Variant.why_not`."""
        magnitude, dropout = module.lora_magnitude_vector[adapter], module.lora_dropout[adapter]
        if not is_own(DoraLinearVariant.forward) or type(magnitude) is not of_peft.DoraLinearLayer:
            return "its DoRA has another forward than PEFT's"
        if not is_own(type(magnitude).forward):
            return f"{type(magnitude).__name__} has another forward"
        if of_peft.ENABLE_DORA_CACHING:
            return "PEFT keeps DoRA's norms (DoraCaching)"
        for linear in (module.lora_A[adapter], module.lora_B[adapter]):
            if type(linear) is not nn.Linear or linear._parameters.get("weight") is None:
                return "its A or B is no plain linear layer"
            if linear.bias is not None:
                return "its DoRA has a bias in A or B"
        if module.training and dropout.training and getattr(dropout, "p", 0.0):
            return "its DoRA has dropout"
        base = module.get_base_layer()
        if isinstance(base, Conv1D) and not (module.fan_in_fan_out and magnitude.fan_in_fan_out):
            return "its weight is stored transposed"
        held = magnitude._parameters.get("weight")
        if held is None:
            return "its magnitudes are no parameter"
        devices = {held.device, base.weight.device, module.lora_A[adapter].weight.device}
        return "its magnitudes are on another device" if len(devices) > 1 else None

    def called(self, module: Any, adapter: str) -> list[nn.Module]:
        """See `Variant.called`."""
        of_adapter = (module.lora_A, module.lora_B, module.lora_dropout, module.lora_magnitude_vector)
        return [modules[adapter] for modules in of_adapter]

    def bound(self) -> list[Bound]:
        """See `Variant.bound`."""
        return [
            (DoraLinearVariant, "forward", DoraLinearVariant.forward),
            (of_peft, "ENABLE_DORA_CACHING", of_peft.ENABLE_DORA_CACHING),
        ]

    def read(self, module: Any, adapter: str, plain: AdaptedLinear) -> AdaptedLinear:
        """See `Variant.read`."""
        return plain._replace(
            a=module.lora_A[adapter].weight,
            b=module.lora_B[adapter].weight,
            vector=module.lora_magnitude_vector[adapter].weight,
            dropout=0.0,
            variant=self,
        )

    def resolved(
        self, linear: AdaptedLinear, dtype: torch.dtype, kept: torch.Tensor | None
    ) -> tuple[AdaptedLinear, torch.Tensor | None]:
        """With c ∘ W for W and c ∘ B for B, the latter rounded once; c is kept."""
        a_RI, b_OR = linear.a, linear.b
        assert a_RI is not None
        assert b_OR is not None
        assert linear.vector is not None
        factor_O = kept
        if factor_O is None:
            norm_O = _row_norms(linear.weight(dtype), a_RI.detach(), b_OR.detach(), linear.scaling)
            factor_O = _magnitudes(linear, norm_O.dtype) / norm_O
        scaled_OR = torch.mul(b_OR.detach(), factor_O[:, None], out=torch.empty_like(b_OR, dtype=dtype))
        reads = linear.vector.requires_grad
        return linear._replace(b=scaled_OR, row_factors=factor_O, reads_output=reads, variant=None), factor_O

    def gradients(self, linear: AdaptedLinear, resolved: AdaptedLinear, of_resolved: Gradients) -> Gradients:
        """dB = c ∘ d(c ∘ B) and dm = Σ_t dy ∘ (y − bias) / m; dA is the plain one's."""
        da, db_OR, products_O, _ = of_resolved
        assert resolved.row_factors is not None
        db_OR = None if db_OR is None else resolved.row_factors[:, None] * db_OR
        dm_O = None if products_O is None else products_O / _magnitudes(linear, products_O.dtype)
        return da, db_OR, dm_O, None


def _row_norms(weight_OI: torch.Tensor, a_RI: torch.Tensor, b_OR: torch.Tensor, scaling: float) -> torch.Tensor:
    """‖W + scaling·B·A‖ of each row (O), in fp32 at least."""
    wide = torch.promote_types(weight_OI.dtype, torch.float32)
    a_RI = a_RI.to(weight_OI.dtype)
    across_OR = torch.mm(weight_OI, a_RI.t()).to(wide)
    a_RI, b_OR = a_RI.to(wide), b_OR.to(wide)
    inner_OR = torch.addmm(across_OR, b_OR, torch.mm(a_RI, a_RI.t()), beta=2 * scaling, alpha=scaling * scaling)
    squares_O = torch.linalg.vector_norm(weight_OI, dim=1, dtype=wide).square_()
    return squares_O.add_(inner_OR.mul_(b_OR).sum(dim=1)).clamp_(min=0.0).sqrt_()


def _magnitudes(linear: AdaptedLinear, dtype: torch.dtype) -> torch.Tensor:
    assert linear.vector is not None
    m_O = linear.vector.detach().to(dtype)
    return torch.where(m_O == 0.0, _SMALLEST, m_O)
