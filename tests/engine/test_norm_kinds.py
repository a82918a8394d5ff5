"""RMSNorms of unknown families are known by what they compute."""

import pytest
import torch
import transformers
from torch import Tensor, nn

from fastft.engine.generic import rms_norm_kind


class _RmsNorm(nn.Module):
    def __init__(self, rounds_first: bool = True, offset: float = 0.0, center: bool = False, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(24), requires_grad=False)
        self.eps, self._rounds_first, self._offset, self._center = eps, rounds_first, offset, center

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() - x.float().mean(-1, keepdim=True) if self._center else x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        weight = self.weight.float() + self._offset if self._offset else self.weight
        return weight * normed.to(x.dtype) if self._rounds_first else (weight * normed).to(x.dtype)


class _OtherEps(_RmsNorm):
    """Epsilon outside of the root, which only small rows show."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x.float() / (x.float().pow(2).mean(-1, keepdim=True).sqrt() + self.eps)).to(x.dtype)


class _Gated(_RmsNorm):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return super().forward(x) * gate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (_RmsNorm, "rms"),
        (lambda: _RmsNorm(rounds_first=False), "rms"),
        (lambda: _RmsNorm(rounds_first=False, offset=1.0), "rms_unit_offset"),
        (lambda: _RmsNorm(offset=0.5), None),
        (lambda: _RmsNorm(center=True), None),
        (_OtherEps, None),
        (_Gated, None),
        (lambda: transformers.models.gemma.modeling_gemma.GemmaRMSNorm(24), "rms_unit_offset"),
        (lambda: transformers.models.olmo2.modeling_olmo2.Olmo2RMSNorm(24), "rms"),
        (lambda: nn.RMSNorm(24, eps=1e-5), "rms"),
        (lambda: nn.RMSNorm(24), None),
    ],
)
def test_a_norm_is_known_by_what_it_computes(make, kind, dtype, device):
    norm = make().to(device, dtype)
    norm.register_forward_hook(lambda *_: pytest.fail("a hook is somebody's who waits for the model to run"))
    random_state = torch.get_rng_state()
    assert rms_norm_kind(norm) == kind
    assert torch.equal(torch.get_rng_state(), random_state)
