"""Bandwidth of cross-entropy with its gradient in place."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch

ROWS = 4096
"""Labelled rows of a loss chunk."""

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("vocabulary", [128256, 151936])
@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_cross_entropy(
    implementation: str, vocabulary: int, measure_bandwidth: Callable[[str, Callable[[], Any]], None]
) -> None:
    """Counts one read and one write of the logits."""
    cross_entropy_ = import_module(f"fastft.kernels.cross_entropy.{implementation}").cross_entropy_

    def make() -> tuple[Callable[[], Any], int]:
        logits = torch.randn(ROWS, vocabulary, device="cuda", dtype=torch.bfloat16)
        targets = torch.randint(0, vocabulary, (ROWS,), device="cuda")
        return lambda: cross_entropy_(logits, targets, 1e-4), 2 * logits.nbytes

    measure_bandwidth(f"cross_entropy_ {implementation} V={vocabulary}", make)
