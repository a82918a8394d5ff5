"""Masks of LoRA's dropout, written out and as bits, and the products of what they leave."""

# T tokens, I in, R rank, G adapters

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastft.kernels.dropout import reference, triton

OPERATION = "dropout"
SHAPES = {
    "one": (33, 40, (3,)),
    "three": (70, 100, (16, 5, 1)),
    "a token": (1, 64, (4, 4)),
    "beyond a program": (65, 90, (70, 3)),
    "in parts": (40, 1100, (5,)),
}


def kept_by(masks: triton.Masks) -> Tensor:
    """G × T × K of 0 and 1."""
    places = torch.arange(len(masks.scales), device=masks.bits_TK.device)
    return ((masks.bits_TK >> places[:, None, None]) & 1).float()


def made(module, p, shape, seed, device, count=1) -> Tensor:
    masks = module.masks([p] * count, shape, torch.float32, torch.device(device), seed)
    if module is triton:
        return kept_by(masks)
    return torch.stack([(mask > 0).float() if mask is not None else torch.ones(shape) for mask in masks])


@pytest.mark.parametrize("module", [reference, triton], ids=["reference", "triton"])
@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_so_many_are_dropped_and_independently(module, p, device):
    """Of each adapter, row and column, and of pairs: of two adapters, of neighbours, of words that share places."""
    shape = 256, 1024
    kept_GTI = made(module, p, shape, 12345, device, count=3).double().cpu()
    spread = (p * (1 - p)) ** 0.5
    deviation = (kept_GTI - (1 - p)) / spread
    count = shape[0] * shape[1]
    assert (deviation.mean((1, 2)).abs() < 5 / count**0.5).all()
    assert (deviation.mean(2).abs() < 6 / shape[1] ** 0.5).all()
    assert (deviation.mean(1).abs() < 6 / shape[0] ** 0.5).all()
    pairs = [deviation[0] * deviation[1], deviation[0] * deviation[2]]
    # Beside each other in memory: a program's 256 words of four bytes are a row, eight of these come of one word each.
    flat = deviation[0].flatten()
    for step in (1, 2, 3, 4, 1023, 1024, 1025, 2048, 7168, 8192, 16384, 24576, 32768):
        pairs.append(flat[step:] * flat[:-step])
    kurtosis = max(1.0, (1 - p) / p, p / (1 - p))
    for pair in pairs:
        assert pair.mean().abs() < 6 * kurtosis**0.5 / pair.numel() ** 0.5 + 1e-4


@pytest.mark.parametrize("module", [reference, triton], ids=["reference", "triton"])
def test_none_and_all(module, device):
    assert made(module, 0.0, (5, 40), 1, device).all()
    assert not made(module, 1.0, (5, 40), 1, device).any()


@settings(max_examples=20, deadline=None)
@given(st.floats(0.05, 0.95), st.integers(0, 2**62))
@pytest.mark.parametrize("module", [reference, triton], ids=["reference", "triton"])
def test_masks_are_a_function_of_their_seed(module, p, seed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    first = made(module, p, (64, 64), seed, device)
    assert torch.equal(first, made(module, p, (64, 64), seed, device))
    assert not torch.equal(first, made(module, p, (64, 64), seed + 1, device))


def test_probabilities_may_differ(device):
    masks = triton.masks([0.0, 0.5, 1.0], (64, 96), torch.float32, device, 3)
    kept = kept_by(masks).mean((1, 2)).tolist()
    assert kept[0] == 1
    assert kept[1] == pytest.approx(0.5, abs=0.05)
    assert kept[2] == 0
    assert masks.scales == [1.0, 2.0, 1.0]


@pytest.mark.parametrize("module", [reference, triton], ids=["reference", "triton"])
def test_the_global_generator_is_left_alone(module, device):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    made(module, 0.5, (4, 4), 1, device)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_equal_the_reference(shape, dtype, device):
    T, I, ranks = SHAPES[shape]  # noqa: E741
    p = [0.3 + 0.1 * index for index in range(len(ranks))]
    bits = triton.masks(p, (T, I), dtype, device, 7)
    masks = [kept / (1 - each) for kept, each in zip(kept_by(bits), p, strict=True)]
    # Views with rows further apart, as those of a packed product are.
    x_TI = torch.randn(T, 2 * I, device=device).to(dtype)[:, :I]
    dlow_TR = torch.randn(T, sum(ranks) + 3, device=device).to(dtype)[:, 1 : sum(ranks) + 1]
    a_RI = torch.randn(sum(ranks), I, device=device).to(dtype)
    wide = x_TI.float(), dlow_TR.float(), a_RI.float()
    results = {
        "low": (triton.low_rank(x_TI, a_RI, ranks, bits), reference.low_rank(wide[0], wide[2], ranks, masks)),
        "da": (triton.a_gradients(dlow_TR, x_TI, ranks, bits), reference.a_gradients(wide[1], wide[0], ranks, masks)),
        "dx": (
            triton.input_gradient(dlow_TR, a_RI, ranks, bits),
            reference.input_gradient(wide[1], wide[2], ranks, masks),
        ),
    }
    # A rank beyond a program's is a sum of two that are rounded.
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3
    for name, (got, wanted) in results.items():
        assert got.dtype == dtype
        assert (got.float() - wanted).norm() / wanted.norm() < tolerance, name


def test_no_tokens(device):
    bits = triton.masks([0.5], (0, 32), torch.float32, device, 7)
    x_TI, dlow_TR, a_RI = (torch.ones(shape, device=device) for shape in ((0, 32), (0, 2), (2, 32)))
    assert triton.low_rank(x_TI, a_RI, [2], bits).shape == (0, 2)
    assert not triton.a_gradients(dlow_TR, x_TI, [2], bits).any()
    assert triton.input_gradient(dlow_TR, a_RI, [2], bits).shape == (0, 32)
