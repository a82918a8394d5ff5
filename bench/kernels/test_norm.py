"""Bandwidth of the norms, forward and backward."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch

from fastft.kernels.norm import Norm, NormKind

TOKENS, EPS = 16384, 1e-5

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("width", [1536, 4096])
@pytest.mark.parametrize("implementation", ["triton", "reference"])
@pytest.mark.parametrize("operation", ["normalise", "add_and_normalise", "normalise_backward"])
@pytest.mark.parametrize("kind", ["rms", "rms_unit_offset", "layer"])
def test_norm(
    kind: NormKind,
    operation: str,
    implementation: str,
    width: int,
    measure_bandwidth: Callable[[str, Callable[[], Any]], None],
) -> None:
    """Forward reads x and writes y; with the addition, one more of each; backward with a residual moves four."""
    function = getattr(import_module(f"fastft.kernels.norm.{implementation}"), operation)
    tensors = {"normalise": 2, "add_and_normalise": 4, "normalise_backward": 4}[operation]

    def make() -> tuple[Callable[[], Any], int]:
        x, residual, dy = (torch.randn(TOKENS, width, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        weight = torch.ones(width, device="cuda", dtype=torch.bfloat16)
        norm = Norm(kind, weight, weight if kind == "layer" else None, EPS)
        rstd = torch.ones(TOKENS, device="cuda")
        arguments = {
            "normalise": (x, norm),
            "add_and_normalise": (x, residual, norm),
            "normalise_backward": (dy, x, norm, rstd, residual),
        }[operation]
        return lambda: function(*arguments), tensors * x.nbytes + rstd.nbytes

    measure_bandwidth(f"{operation} {kind} {implementation} D={width}", make)
