"""Bandwidth of the rotary embedding, in place on a view of a packed qkv projection."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch

TOKENS, SEQUENCE, HEAD_SIZE = 16384, 4096, 128

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("heads", "packed_heads"), [(12, 16), (32, 48), (8, 48)], ids=["1.5B q", "8B q", "8B k"])
@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_rope(
    implementation: str, heads: int, packed_heads: int, measure_bandwidth: Callable[[str, Callable[[], Any]], None]
) -> None:
    """Every rotated element is read and written; the tables count once."""
    rope_ = import_module(f"fastft.kernels.rope.{implementation}").rope_

    def make() -> tuple[Callable[[], Any], int]:
        packed = torch.randn(TOKENS, packed_heads, HEAD_SIZE, device="cuda", dtype=torch.bfloat16)
        angles = torch.randn(SEQUENCE, HEAD_SIZE // 2, device="cuda").repeat(1, 2)
        cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
        x = packed[:, :heads]
        return lambda: rope_(x, cos, sin), 2 * x.numel() * x.element_size() + cos.nbytes

    measure_bandwidth(f"rope {implementation} H={heads} of {packed_heads}", make)
