# N rows, V vocabulary

from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fastft.kernels.cross_entropy import LogitTransform
from fastft.kernels.row_statistics import NAMES, RowStatistics, reference, unknown

OPERATION = "row_statistics"
TRANSFORMS = [
    LogitTransform(),
    LogitTransform(0.5, None, 0.7),
    LogitTransform(1.0, 3.0, 1.0),
    LogitTransform(2.0, 5.0, 0.9),
]

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")


def transformed(logits_NV: Tensor, transform: LogitTransform) -> Tensor:
    multiplier, softcap, temperature = transform
    z_NV = logits_NV.double() * multiplier
    return (z_NV if softcap is None else softcap * torch.tanh(z_NV / softcap)) / temperature


def written_out(logits_NV: Tensor, targets_N: Tensor, transform: LogitTransform) -> RowStatistics:
    """The definitions, in fp64."""
    z_NV = transformed(logits_NV, transform)
    p_NV = z_NV.softmax(-1)
    return RowStatistics(
        torch.special.entr(p_NV).sum(-1),
        p_NV.square().sum(-1).log(),
        z_NV.mean(-1),
        torch.tensor([row.index(max(row)) == t for row, t in zip(z_NV.tolist(), targets_N.tolist(), strict=True)]),
    )


def make(N: int, V: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    logits_NV = (4 * torch.randn(N, V, device=device)).to(dtype)
    targets_N = torch.randint(0, V, (N,), device=device)
    targets_N[::2] = logits_NV[::2].float().argmax(-1)
    return logits_NV, targets_N


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("N", "V"), [(1, 1), (3, 2), (7, 63), (5, 1000), (2, 9001)])
def test_each_against_fp64(N, V, transform, dtype, device, kernels: ModuleType):
    logits_NV, targets_N = make(N, V, dtype, device)
    before_NV = logits_NV.clone()
    found = kernels.row_statistics(logits_NV, targets_N, NAMES, transform)
    expected = written_out(logits_NV, targets_N, transform)
    assert torch.equal(logits_NV, before_NV)
    for name, value_N, expected_N in zip(NAMES, found, expected, strict=True):
        if name == "is_top1":
            assert value_N.dtype == torch.bool
            # A soft-cap flattens what is far up, until two are equal in fp32.
            if transform.softcap is None:
                assert torch.equal(value_N.cpu(), expected_N)
        else:
            assert value_N.dtype == torch.float32
            assert_close(value_N.double(), expected_N.to(device), rtol=2e-5, atol=2e-5, msg=name)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_asked_for_is_none(name, device, kernels: ModuleType):
    logits_NV, targets_N = make(4, 50, torch.float32, device)
    found = kernels.row_statistics(logits_NV, targets_N, [name])
    together = kernels.row_statistics(logits_NV, targets_N, NAMES)
    for each, value_N, all_N in zip(NAMES, found, together, strict=True):
        assert (value_N is None) == (each != name)
        if value_N is not None:
            assert_close(value_N, all_N)


def test_the_first_of_two_equal_maxima_is_the_likeliest(device, kernels: ModuleType):
    logits_NV = torch.zeros(3, 5000, device=device)
    logits_NV[:, 40] = logits_NV[:, 4500] = 2.0
    targets_N = torch.tensor([40, 4500, 0], device=device)
    assert kernels.row_statistics(logits_NV, targets_N, ["is_top1"]).is_top1_N.tolist() == [True, False, False]


def test_logits_that_are_far_up_or_cut_off(device, kernels: ModuleType):
    """exp overflows at 89; a token that is forbidden has −∞."""
    logits_NV = torch.full((2, 5000), float("-inf"), device=device)
    logits_NV[:, -2:] = torch.tensor([500.0, 501.0], device=device)
    logits_NV[1, 7] = 400.0
    found = kernels.row_statistics(logits_NV, torch.tensor([4999, 7], device=device), NAMES)
    p = torch.tensor([0.0, 1.0], dtype=torch.float64).softmax(-1)
    entropy, log_sum_sq = torch.special.entr(p).sum(), p.square().sum().log()
    assert_close(found.entropy_N.double().cpu(), entropy.expand(2), rtol=1e-5, atol=1e-6)
    assert_close(found.log_sum_sq_probs_N.double().cpu(), log_sum_sq.expand(2), rtol=1e-5, atol=1e-6)
    assert found.mean_logits_N.isneginf().all()
    assert found.is_top1_N.tolist() == [True, False]


def test_no_rows_and_strided_ones(device, kernels: ModuleType):
    empty = kernels.row_statistics(
        torch.zeros(0, 9, device=device), torch.zeros(0, dtype=torch.long, device=device), NAMES
    )
    assert [value_N.shape for value_N in empty] == [(0,)] * len(NAMES)
    wide_NW, targets_N = make(6, 130, torch.float32, device)
    targets_N = targets_N.remainder(100)
    for view_NV in (wide_NW[:, 20:120], wide_NW[:, 20:120].t().contiguous().t()):
        assert_close(
            tuple(kernels.row_statistics(view_NV, targets_N.repeat_interleave(2)[::2], NAMES)),
            tuple(kernels.row_statistics(wide_NW[:, 20:120].contiguous(), targets_N, NAMES)),
        )


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_entropys_gradient(transform, dtype, device):
    logits_NV, targets_N = make(5, 70, dtype, device)
    logits_NV[0, 3] = -1e4  # a probability of 0
    factor_N = torch.randn(5, device=device)
    leaf_NV = logits_NV.double().requires_grad_()
    p_NV = transformed(leaf_NV, transform).softmax(-1)
    (torch.special.entr(p_NV.clamp(min=1e-300)).sum(-1) * factor_N).sum().backward()
    entropy_N = reference.row_statistics(logits_NV, targets_N, ["entropy"], transform).entropy_N
    gradient_NV = reference.entropy_gradient(logits_NV, entropy_N, factor_N, transform)
    assert gradient_NV.dtype == dtype
    error = torch.linalg.vector_norm(gradient_NV.double() - leaf_NV.grad) / torch.linalg.vector_norm(leaf_NV.grad)
    assert error < max(1e-5, torch.finfo(dtype).eps)


def test_unknown_names_are_told():
    assert unknown(["entropy", "is_top1"]) == []
    assert unknown(["perplexity", "entropy"]) == ["perplexity"]
