"""Bandwidth of RMSNorm, forward and backward."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch

TOKENS, EPS = 16384, 1e-5

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("width", [1536, 4096])
@pytest.mark.parametrize("implementation", ["triton", "reference"])
@pytest.mark.parametrize("operation", ["rms_norm", "add_rms_norm", "rms_norm_backward"])
def test_rms_norm(
    operation: str, implementation: str, width: int, measure_bandwidth: Callable[[str, Callable[[], Any]], None]
) -> None:
    """Forward reads x and writes y; with the addition, one more of each; backward with a residual moves four."""
    function = getattr(import_module(f"fastft.kernels.rms_norm.{implementation}"), operation)
    tensors = {"rms_norm": 2, "add_rms_norm": 4, "rms_norm_backward": 4}[operation]

    def make() -> tuple[Callable[[], Any], int]:
        x, residual, dy = (torch.randn(TOKENS, width, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        weight = torch.ones(width, device="cuda", dtype=torch.bfloat16)
        rstd = torch.ones(TOKENS, device="cuda")
        arguments = {
            "rms_norm": (x, weight, EPS),
            "add_rms_norm": (x, residual, weight, EPS),
            "rms_norm_backward": (dy, x, weight, rstd, residual),
        }[operation]
        return lambda: function(*arguments), tensors * x.nbytes + rstd.nbytes

    measure_bandwidth(f"{operation} {implementation} D={width}", make)
