"""AdaLoRA: y = x·Wᵀ + scaling / (ranknum + 1e-5) · dropout(x)·(A ∘ E)ᵀ·Bᵀ, with a singular value E a rank.

Which ranks live is PEFT's own affair: its allocator writes zeros into E, and the penalty on A and B that are not
orthogonal is added to the loss by `AdaLoraModel.forward`.

Source of the formula: `peft.tuners.adalora.layer.SVDLinear`.
"""

# I in, O out, R rank

from typing import Any, cast

import torch
from torch import nn

from fastft.adapters.adapted import AdaptedLinear, Gradients, Variant

_LAYERS = ("SVDLinear", "SVDLinear4bit", "SVDLinear8bitLt")
_EPSILON = 1e-5


class AdaLora(Variant):
    """The vector is E (R × 1), the number that of the ranks.

    PEFT means it to be a constant, but where it moves an adapter to another device or dtype it makes a new parameter of
    it, which is trained.  So its value stays on the device, and it has a gradient where it asks for one.
    """

    name = "AdaLoRA"
    remakes = "a"

    def has(self, module: Any, adapter: str) -> bool:
        """See `Variant.has`."""
        kind = type(module)
        return kind.__module__.rpartition(".")[0] == "peft.tuners.adalora" and kind.__name__ in _LAYERS

    def why_not(self, module: Any, adapter: str) -> str | None:
        """See `Variant.why_not`."""
        if module.merged and type(module).__name__ != "SVDLinear":
            return "it is merged, which PEFT passes over in a quantized layer"
        held = [of.get(adapter) for of in (module.lora_A, module.lora_B, module.lora_E, module.ranknum)]
        if any(type(each) is not nn.Parameter for each in held):
            return "its tensors are no parameters"
        a, _, _, number = cast("list[nn.Parameter]", held)
        if a.shape[0] == 0:
            return "its rank is zero"
        return "its number of ranks are several" if number.numel() != 1 else None

    def called(self, module: Any, adapter: str) -> list[nn.Module]:
        """See `Variant.called`."""
        return [module.lora_dropout[adapter]]

    def read(self, module: Any, adapter: str, plain: AdaptedLinear) -> AdaptedLinear:
        """See `Variant.read`."""
        held = {"a": module.lora_A, "b": module.lora_B, "vector": module.lora_E, "number": module.ranknum}
        return plain._replace(**{name: of[adapter] for name, of in held.items()}, variant=self)

    def resolved(
        self, linear: AdaptedLinear, dtype: torch.dtype, kept: torch.Tensor | None
    ) -> tuple[AdaptedLinear, torch.Tensor | None]:
        """With A ∘ E / (ranknum + 1e-5) for A, rounded once; E / (ranknum + 1e-5) is kept."""
        a_RI, e_R1, number = _values(linear)
        factor_R1 = e_R1 / (number + _EPSILON) if kept is None else kept
        scaled_RI = torch.mul(a_RI, factor_R1, out=torch.empty_like(a_RI, dtype=dtype))
        return linear._replace(a=scaled_RI, variant=None), factor_R1

    def gradients(self, linear: AdaptedLinear, resolved: AdaptedLinear, of_resolved: Gradients) -> Gradients:
        """With n = ranknum + 1e-5 and D = d(A ∘ E / n): dA = E / n ∘ D, dE = Σ_i A ∘ D / n, dn = −Σ_r E ∘ dE / n."""
        d_RI, db, *_ = of_resolved
        if d_RI is None:
            return None, db, None, None
        a_RI, e_R1, number = _values(linear)
        number = number + _EPSILON
        de_R1 = torch.mul(a_RI, d_RI).sum(dim=1, keepdim=True, dtype=e_R1.dtype).div_(number)
        is_trained = linear.number is not None and linear.number.requires_grad
        d_number = (e_R1 * de_R1).sum().neg().div(number).view_as(number) if is_trained else None
        return (e_R1 / number) * d_RI, db, de_R1, d_number


def _values(linear: AdaptedLinear) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A, and E and the number of ranks in fp32 at least."""
    a_RI, e_R1, number = linear.a, linear.vector, linear.number
    assert a_RI is not None
    assert e_R1 is not None
    assert number is not None
    wide = torch.promote_types(e_R1.dtype, torch.float32)
    return a_RI.detach(), e_R1.detach().to(wide), number.detach().to(wide)
