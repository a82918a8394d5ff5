"""Masks and products of LoRA's dropout, at the sizes of an 8B model."""

from typing import Any

import pytest
import torch

from fastft.kernels.dropout import triton


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [(16, 16, 16), (64,)], ids=str)
@pytest.mark.parametrize("operation", ["masks", "low_rank", "a_gradients", "input_gradient"])
def test_dropout(benchmark: Any, operation: str, ranks: tuple[int, ...]) -> None:
    """One operation, to its end on the GPU."""
    T, K, device = 8192, 4096, torch.device("cuda")
    x_TK, a_RK, dlow_TR = (
        torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in ((T, K), (sum(ranks), K), (T, sum(ranks)))
    )
    masks = triton.masks([0.05] * len(ranks), (T, K), torch.bfloat16, device, 1)
    calls = {
        "masks": lambda: triton.masks([0.05] * len(ranks), (T, K), torch.bfloat16, device, 1),
        "low_rank": lambda: triton.low_rank(x_TK, a_RK, ranks, masks),
        "a_gradients": lambda: triton.a_gradients(dlow_TR, x_TK, ranks, masks),
        "input_gradient": lambda: triton.input_gradient(dlow_TR, a_RK, ranks, masks),
    }

    def call() -> None:
        calls[operation]()
        torch.cuda.synchronize()

    benchmark(call)
