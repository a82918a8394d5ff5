"""Bandwidth of the statistics that methods ask of rows of logits."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch

ROWS = 4096
"""Labelled rows of a loss chunk."""

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("names", [("entropy", "is_top1"), ("entropy", "mean_logits", "is_top1")], ids=["sft", "dpo"])
@pytest.mark.parametrize("vocabulary", [128256, 151936])
@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_row_statistics(
    implementation: str,
    vocabulary: int,
    names: tuple[str, ...],
    measure_bandwidth: Callable[[str, Callable[[], Any]], None],
) -> None:
    """Counts one read of the logits."""
    row_statistics = import_module(f"fastft.kernels.row_statistics.{implementation}").row_statistics

    def make() -> tuple[Callable[[], Any], int]:
        logits = torch.randn(ROWS, vocabulary, device="cuda", dtype=torch.bfloat16)
        targets = torch.randint(0, vocabulary, (ROWS,), device="cuda")
        return lambda: row_statistics(logits, targets, names), logits.nbytes

    measure_bandwidth(f"row_statistics {implementation} V={vocabulary} {len(names)} of them", make)
