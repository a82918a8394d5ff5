"""Bandwidth of the activation with adapter terms, forward and backward, and of the residual addition with one."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch

from fastft.kernels.lora_linear import AdapterTerm

TOKENS, RANK = 16384, 16

pytestmark = pytest.mark.gpu

Measure = Callable[[str, Callable[[], Any]], None]


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def _term(width: int) -> AdapterTerm:
    return AdapterTerm(_random(TOKENS, RANK), _random(width, RANK).t())


@pytest.mark.parametrize("width", [8960, 14336])
@pytest.mark.parametrize("implementation", ["triton", "reference"])
@pytest.mark.parametrize("operation", ["activate", "activate_backward"])
def test_activation(operation: str, implementation: str, width: int, measure_bandwidth: Measure) -> None:
    """Forward reads two wide tensors and writes one; backward reads three and writes two."""
    function = getattr(import_module(f"fastft.kernels.adapted.{implementation}"), operation)

    def make() -> tuple[Callable[[], Any], int]:
        dact, gate, up = (_random(TOKENS, width) for _ in range(3))
        terms = _term(width), _term(width)
        if operation == "activate":
            return lambda: function(gate, up, "silu", *terms), 3 * gate.nbytes
        return lambda: function(dact, gate, up, "silu", *terms, _term_of_down), 5 * gate.nbytes

    _term_of_down = AdapterTerm(_random(TOKENS, RANK), _random(RANK, width))
    measure_bandwidth(f"{operation} with rank {RANK} {implementation} F={width}", make)


@pytest.mark.parametrize("heads", [(12, 2), (32, 8)])
@pytest.mark.parametrize("implementation", ["triton", "reference"])
@pytest.mark.parametrize("terms", [True, False])
def test_rotation(terms: bool, implementation: str, heads: tuple[int, int], measure_bandwidth: Measure) -> None:
    """Queries and keys read and written; the tables' rows stay in the cache."""
    function = import_module(f"fastft.kernels.adapted.{implementation}").rotate_
    cos, sin = _random(2048, 128), _random(2048, 128)

    def make() -> tuple[Callable[[], Any], int]:
        q, k = (_random(TOKENS, number * 128) for number in heads)
        of = (_term(q.shape[1]), _term(k.shape[1])) if terms else ()
        views = q.view(TOKENS, -1, 128), k.view(TOKENS, -1, 128)
        return lambda: function(*views, cos, sin, *of), 2 * (q.nbytes + k.nbytes)

    rank = f"with rank {RANK}" if terms else "alone"
    measure_bandwidth(f"rotate {rank} {implementation} heads={heads}", make)


@pytest.mark.parametrize("width", [1536, 4096])
@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_addition(implementation: str, width: int, measure_bandwidth: Measure) -> None:
    """Two wide tensors read, one written."""
    function = import_module(f"fastft.kernels.adapted.{implementation}").add

    def make() -> tuple[Callable[[], Any], int]:
        x, residual, term = _random(TOKENS, width), _random(TOKENS, width), _term(width)
        return lambda: function(x, residual, term), 3 * x.nbytes

    measure_bandwidth(f"add with rank {RANK} {implementation} D={width}", make)
