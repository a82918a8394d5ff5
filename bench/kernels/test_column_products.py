"""Bandwidth of the sums that the gradients of DoRA's magnitudes ask for."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch

TOKENS = 8192

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("columns", [256, 1536, 8960, 18944])
@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_column_products(
    implementation: str, columns: int, measure_bandwidth: Callable[[str, Callable[[], Any]], None]
) -> None:
    """Counts one read of both matrices."""
    column_products = import_module(f"fastft.kernels.column_products.{implementation}").column_products

    def make() -> tuple[Callable[[], Any], int]:
        x, y = (torch.randn(TOKENS, columns, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        return lambda: column_products(x, y), 2 * x.nbytes

    measure_bandwidth(f"column_products {implementation} O={columns}", make)
