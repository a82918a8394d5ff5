"""Log-probabilities, entropies and their gradients, from labelled rows in chunks."""

# T tokens, D model, N labelled rows, V vocabulary

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fastft.backends import Backend, load_backend
from fastft.engine.log_probs import linear_log_probs
from fastft.engine.loss import IGNORED, labelled_rows
from fastft.kernels.cross_entropy import LogitTransform
from fastft.kernels.row_statistics import NAMES

T, D, V = 23, 16, 130
TRANSFORMS = [LogitTransform(), LogitTransform(0.5, None, 0.7), LogitTransform(2.0, 3.0, 0.9)]


@pytest.fixture(params=["eager", "triton"])
def ops(request: pytest.FixtureRequest) -> Backend:
    return load_backend(request.param)


def make(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden_TD = torch.randn(T, D, generator=generator).to(device, dtype).requires_grad_()
    head_VD = (0.5 * torch.randn(V, D, generator=generator)).to(device, dtype)
    targets_T = torch.randint(0, V, (T,), generator=generator).to(device)
    targets_T[[0, 3, 4, 20]] = IGNORED
    return hidden_TD, head_VD, targets_T


def plain(hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor, transform: LogitTransform) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies in the dtype that is given, of all logits."""
    rows_N = labelled_rows(targets_T)
    z_NV = hidden_TD[rows_N] @ head_VD.t() * transform.multiplier
    if transform.softcap is not None:
        z_NV = transform.softcap * torch.tanh(z_NV / transform.softcap)
    log_p_NV = (z_NV / transform.temperature).log_softmax(-1)
    return log_p_NV.gather(1, targets_T[rows_N].unsqueeze(1)).squeeze(1), -(log_p_NV.exp() * log_p_NV).sum(-1)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("asked", ["log_probs", "entropy", "both"])
@pytest.mark.parametrize("chunk", [4, 64])
def test_values_and_gradients_equal_those_of_all_logits(chunk, asked, transform, ops, device):
    hidden_TD, head_VD, targets_T = make(device)
    rows_N = labelled_rows(targets_T)
    wide_TD = hidden_TD.detach().double().requires_grad_()
    expected = plain(wide_TD, head_VD.double(), targets_T, transform)
    found = linear_log_probs(
        hidden_TD, head_VD, targets_T, rows_N, ops, chunk_tokens=chunk, transform=transform, statistics=["entropy"]
    )
    values = found.log_probs_N, found.statistics.entropy_N
    weights = [torch.randn(len(rows_N), device=device) for _ in values]
    for value_N, expected_N in zip(values, expected, strict=True):
        assert_close(value_N.double(), expected_N, rtol=1e-5, atol=1e-5)
    chosen = {"log_probs": [0], "entropy": [1], "both": [0, 1]}[asked]
    sum((weights[i] * values[i]).sum() for i in chosen).backward()
    sum((weights[i] * expected[i]).sum() for i in chosen).backward()
    assert hidden_TD.grad is not None
    assert wide_TD.grad is not None
    difference_TD = hidden_TD.grad.double() - wide_TD.grad
    assert torch.linalg.vector_norm(difference_TD) < 1e-5 * torch.linalg.vector_norm(wide_TD.grad)
    assert not hidden_TD.grad[targets_T == IGNORED].any()


def test_16_bits_err_no_more_than_all_logits(ops, device):
    hidden_TD, head_VD, targets_T = make(device, torch.bfloat16)
    truth_TD, eager_TD = (hidden_TD.detach().to(dtype).requires_grad_() for dtype in (torch.float64, torch.bfloat16))
    plain(truth_TD, head_VD.double(), targets_T, TRANSFORMS[0])[0].sum().backward()
    rows_N = labelled_rows(targets_T)
    logits_NV = (eager_TD[rows_N] @ head_VD.t()).float()
    logits_NV.log_softmax(-1).gather(1, targets_T[rows_N].unsqueeze(1)).sum().backward()
    linear_log_probs(hidden_TD, head_VD, targets_T, rows_N, ops).log_probs_N.sum().backward()
    assert hidden_TD.grad is not None
    assert eager_TD.grad is not None
    assert truth_TD.grad is not None
    errors = [torch.linalg.vector_norm(g.double() - truth_TD.grad).item() for g in (hidden_TD.grad, eager_TD.grad)]
    # Triton's interpreter cuts off where a GPU rounds (tests/kernels/conftest.py).
    factor = 4.0 if ops.name == "triton" and not torch.cuda.is_available() else 1.5
    assert 0 < errors[0] <= factor * errors[1]


def test_the_other_statistics_have_no_gradient(ops, device):
    hidden_TD, head_VD, targets_T = make(device)
    found = linear_log_probs(
        hidden_TD, head_VD, targets_T, labelled_rows(targets_T), ops, statistics=NAMES, chunk_tokens=5
    )
    assert found.log_probs_N.requires_grad
    needs = [value_N.requires_grad for value_N in found.statistics if value_N is not None]
    assert needs == [True, False, False, False]
    assert all(len(value_N) == 19 for value_N in found.statistics if value_N is not None)


def test_no_row_has_a_gradient_of_zero(ops, device):
    hidden_TD, head_VD, targets_T = make(device)
    targets_T.fill_(IGNORED)
    found = linear_log_probs(hidden_TD, head_VD, targets_T, labelled_rows(targets_T), ops, statistics=["entropy"])
    assert found.log_probs_N.shape == (0,)
    (found.log_probs_N.sum() + 0.0 * hidden_TD.sum()).backward()
    assert hidden_TD.grad is not None
    assert not hidden_TD.grad.any()


def test_a_second_derivative_is_an_error(ops, device):
    hidden_TD, head_VD, targets_T = make(device)
    found = linear_log_probs(hidden_TD, head_VD, targets_T, labelled_rows(targets_T), ops)
    (gradient_TD,) = torch.autograd.grad(found.log_probs_N.sum(), hidden_TD, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        gradient_TD.sum().backward()


def test_only_a_chunk_of_logits_exists_at_a_time(ops, device, monkeypatch):
    hidden_TD, head_VD, targets_T = make(device)
    seen: list[int] = []
    product = torch.mm

    def spy(x: Tensor, y: Tensor, **more: Tensor) -> Tensor:
        made = product(x, y, **more)
        seen.append(made.numel())
        return made

    monkeypatch.setattr(torch, "mm", spy)
    linear_log_probs(hidden_TD, head_VD, targets_T, labelled_rows(targets_T), ops, chunk_tokens=4, statistics=NAMES)
    assert max(seen) == 4 * V
