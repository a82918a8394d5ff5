"""Bandwidth of the gated activations, forward and backward."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch

TOKENS = 16384

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("width", [8960, 14336])
@pytest.mark.parametrize("implementation", ["triton", "reference"])
@pytest.mark.parametrize("operation", ["activate", "activate_backward"])
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
def test_activation(
    kind: str,
    operation: str,
    implementation: str,
    width: int,
    measure_bandwidth: Callable[[str, Callable[[], Any]], None],
) -> None:
    """Forward reads two tensors and writes one; backward reads three and writes three."""
    function = getattr(import_module(f"fastft.kernels.activation.{implementation}"), operation)

    def make() -> tuple[Callable[[], Any], int]:
        dact, gate, up = (torch.randn(TOKENS, width, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        if operation == "activate":
            return lambda: function(gate, up, kind), 3 * gate.nbytes
        return lambda: function(dact, gate, up, kind), 6 * gate.nbytes

    measure_bandwidth(f"{operation} {kind} {implementation} F={width}", make)
