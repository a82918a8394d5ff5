"""Bandwidth of the narrow gradients of LoRA linears that share an input."""

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import pytest
import torch

TOKENS, RANK = 16384, 16

pytestmark = pytest.mark.gpu


class _Adapter(NamedTuple):
    a: torch.Tensor
    b: torch.Tensor
    scaling: float = 2.0


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


@pytest.mark.parametrize("widths", [(1536, 256, 256), (1536,), (4096, 1024, 1024), (4096,)])
@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_narrow_gradients(
    implementation: str, widths: tuple[int, ...], measure_bandwidth: Callable[[str, Callable[[], Any]], None]
) -> None:
    """The outputs' gradients read once; all else is narrow."""
    function = import_module(f"fastft.kernels.lora_linear.{implementation}").narrow_gradients

    def make() -> tuple[Callable[[], Any], int]:
        dy, low = [_random(TOKENS, width) for width in widths], _random(TOKENS, RANK * len(widths))
        group = [_Adapter(_random(RANK, RANK), _random(width, RANK).float()) for width in widths]
        return lambda: function(dy, low, group), sum(d.nbytes for d in dy)

    measure_bandwidth(f"narrow_gradients with rank {RANK} {implementation} O={widths}", make)
