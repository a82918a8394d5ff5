"""Head and cross-entropy together, against the two written out."""

# T tokens, D model, N labelled rows, V vocabulary

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastft.backends import Backend, load_backend
from fastft.engine.loss import IGNORED, Targets, chunk_for, labelled_rows, linear_cross_entropy, shifted_targets
from fastft.kernels.cross_entropy import LogitTransform
from fastft.kernels.launches import OPERATIONS, Launch

T, D, V = 45, 16, 67


@pytest.fixture(params=["eager", "triton"])
def ops(request: pytest.FixtureRequest) -> Backend:
    return load_backend(request.param)


def problem(device: torch.device, labelled: float = 0.6, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    hidden_TD = torch.randn(T, D, device=device).to(dtype)
    head_VD = torch.randn(V, D, device=device).to(dtype)
    targets_T = torch.randint(0, V, (T,), device=device)
    targets_T[torch.rand(T, device=device) >= labelled] = IGNORED
    return hidden_TD, head_VD, targets_T


def written_out(hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor, divisor: float) -> tuple[Tensor, Tensor]:
    leaf_TD = hidden_TD.detach().requires_grad_()
    logits_TV = leaf_TD @ head_VD.t()
    loss = F.cross_entropy(logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32)), targets_T,
                           ignore_index=IGNORED, reduction="sum") / divisor  # fmt: skip
    return loss.detach(), torch.autograd.grad(loss, leaf_TD)[0]


def fused(hidden_TD: Tensor, *rest: Tensor, scale: float = 1.0, **more: object) -> tuple[Tensor, Tensor]:
    leaf_TD = hidden_TD.detach().requires_grad_()
    loss = linear_cross_entropy(leaf_TD, *rest, **more)  # type: ignore[arg-type]
    return loss.detach(), torch.autograd.grad(loss * scale, leaf_TD)[0]


@pytest.mark.parametrize("labels", [[[1, IGNORED, 2], [IGNORED, 3, 4]], [[IGNORED] * 3] * 2, [[1, 2, 3]]])
@pytest.mark.parametrize("shifted", [False, True])
def test_targets_and_their_rows(labels, shifted, device):
    """Asked for in either order."""
    labels_BS = torch.tensor(labels, device=device)
    expected_BS = labels_BS if shifted else shifted_targets(labels_BS)
    first, second = (Targets(labels_BS, shifted=shifted) for _ in range(2))
    assert torch.equal(first.targets(), expected_BS)
    for targets in (first, second):
        assert torch.equal(targets.rows(), labelled_rows(expected_BS.reshape(-1)))
        assert torch.equal(targets.rows(), targets.rows())
    assert torch.equal(second.targets(), expected_BS)


@pytest.mark.parametrize(
    ("vocabulary", "rows"), [(0, 2048), (32_000, 2048), (128_256, 1024), (151_936, 1024), (262_144, 512), (10**7, 256)]
)
def test_a_large_vocabulary_has_fewer_rows_at_a_time(vocabulary, rows):
    assert chunk_for(vocabulary) == rows


@pytest.mark.parametrize("chunk", [1, 7, T, 10**6])
@pytest.mark.parametrize("labelled", [0.6, 1.0])
def test_any_chunk_gives_the_loss_and_its_gradient(chunk, labelled, ops, device):
    hidden_TD, head_VD, targets_T = problem(device, labelled)
    count = int((targets_T != IGNORED).sum())
    expected, expected_grad = written_out(hidden_TD.double(), head_VD.double(), targets_T, count)
    loss, grad_TD = fused(hidden_TD, head_VD, targets_T, ops, chunk_tokens=chunk)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad_TD.double(), expected_grad, rtol=1e-4, atol=1e-7)
    assert not grad_TD[targets_T == IGNORED].any()


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("multiplier", [1.0, 0.25])
def test_the_logits_may_be_transformed(softcap, multiplier, ops, device):
    """Scaled (Granite) and soft-capped (Gemma 2)."""
    hidden_TD, head_VD, targets_T = problem(device)
    leaf_TD = hidden_TD.double().requires_grad_()
    z_TV = multiplier * leaf_TD @ head_VD.double().t()
    if softcap is not None:
        z_TV = softcap * torch.tanh(z_TV / softcap)
    expected = F.cross_entropy(z_TV, targets_T, ignore_index=IGNORED)
    loss, grad_TD = fused(
        hidden_TD, head_VD, targets_T, ops, chunk_tokens=7, transform=LogitTransform(multiplier, softcap)
    )
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=0)
    expected_grad = torch.autograd.grad(expected, leaf_TD)[0]
    torch.testing.assert_close(grad_TD.double(), expected_grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("divisor", [11, 11.0, torch.tensor(11)], ids=["int", "float", "tensor"])
def test_the_divisor_is_the_callers(divisor, ops, device):
    arguments = problem(device)
    expected, expected_grad = written_out(*arguments, 11)
    loss, grad_TD = fused(*arguments, ops, divisor=divisor)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad_TD, expected_grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("divisor", [None, 5, 0, torch.tensor(0)], ids=str)
def test_without_a_label_the_loss_is_what_stock_makes_of_nothing(divisor, ops, device):
    hidden_TD, head_VD, targets_T = problem(device)
    loss, grad_TD = fused(hidden_TD, head_VD, torch.full_like(targets_T, IGNORED), ops, divisor=divisor)
    # A mean of nothing is NaN, and 0 over a count of 0; a sum of nothing over other labels is 0.
    assert loss.isnan() if not divisor else loss.item() == 0
    assert torch.equal(grad_TD, torch.zeros_like(hidden_TD))


def test_without_gradients_the_head_is_not_multiplied_twice(ops, device):
    hidden_TD, head_VD, targets_T = problem(device)
    scales = []

    def spy(logits_NV: Tensor, targets_N: Tensor, scale: object, transform: object) -> tuple[Tensor, Tensor | None]:
        scales.append(scale)
        return ops.cross_entropy_(logits_NV, targets_N, scale, transform)

    spying = ops._replace(cross_entropy_=spy)
    loss = linear_cross_entropy(hidden_TD, head_VD, targets_T, spying)
    assert not loss.requires_grad
    assert scales == [None]
    leaf_TD = hidden_TD.requires_grad_()
    torch.testing.assert_close(loss, linear_cross_entropy(leaf_TD, head_VD, targets_T, spying).detach())
    assert scales[1:] == [1.0]


def test_only_labelled_rows_and_one_chunk_at_a_time_have_logits(device):
    hidden_TD, head_VD, targets_T = problem(device)
    ops = load_backend("eager")
    shapes = []

    def spy(logits_NV: Tensor, targets_N: Tensor, scale: object, transform: object) -> tuple[Tensor, Tensor | None]:
        shapes.append(tuple(logits_NV.shape))
        return ops.cross_entropy_(logits_NV, targets_N, scale, transform)

    fused(hidden_TD, head_VD, targets_T, ops._replace(cross_entropy_=spy), chunk_tokens=8)
    count = int((targets_T != IGNORED).sum())
    assert [rows for rows, _ in shapes] == [8] * (count // 8) + ([count % 8] if count % 8 else [])
    assert {columns for _, columns in shapes} == {V}


def test_the_gradient_is_divided_without_rounding_the_factor(ops, device):
    """1/3 in bf16 is 0.2 % too large, and so would be every gradient of the step (on a GPU; a CPU does not round)."""
    hidden_TD, head_VD, targets_T = problem(device, 1.0, torch.bfloat16)
    _, exact_TD = written_out(hidden_TD.double(), head_VD.double(), targets_T, 3)
    _, grad_TD = fused(hidden_TD, head_VD, targets_T, ops, divisor=3)
    slope = (grad_TD.double() * exact_TD).sum() / exact_TD.square().sum()
    # Each element is rounded by up to 0.4 %, but in both directions; their mean must not move.
    interpreted = ops.name == "triton" and device.type == "cpu"  # it truncates to bf16, always downwards
    assert abs(slope - 1) < (5e-3 if interpreted else 7e-4)
    assert grad_TD.dtype == torch.bfloat16


@pytest.mark.parametrize("loss_scale", [2.0**16, 2.0**14])
def test_fp16_gradients_survive_with_a_loss_scale(loss_scale, ops, device):
    """Divided by ten million tokens they are below fp16's smallest number; the loss scale brings them back."""
    hidden_TD, head_VD, targets_T = problem(device, 1.0, torch.float16)
    _, exact_TD = written_out(hidden_TD.double(), head_VD.double(), targets_T, 1e7)
    assert (exact_TD.half() == 0).double().mean() > 0.1, "without a scale, much is lost"
    _, grad_TD = fused(hidden_TD, head_VD, targets_T, ops, divisor=1e7, scale=loss_scale)
    error = (grad_TD.double() / loss_scale - exact_TD).norm() / exact_TD.norm()
    assert error < 5e-3


def test_a_loss_scale_above_fp16s_largest_number_does_not_overflow(ops, device):
    hidden_TD, head_VD, targets_T = problem(device, 1.0, torch.float16)
    head_VD = head_VD * 1e-2
    _, exact_TD = written_out(hidden_TD.double(), head_VD.double(), targets_T, 1)
    _, grad_TD = fused(hidden_TD, head_VD, targets_T, ops, divisor=1, scale=2.0**17)
    assert 2.0**17 * exact_TD.abs().max() < 65504, "the gradient itself fits"
    assert grad_TD.isfinite().all()


@pytest.mark.parametrize("chunk", [7, T])
@pytest.mark.parametrize("labelled", [0.6, 1.0])
def test_rows_are_divided_by_what_their_kernel_says(chunk, labelled, device):
    arguments = problem(device, labelled)
    ops = load_backend("eager")

    def undivided(logits_NV: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        loss_N, _ = ops.cross_entropy_(logits_NV, *rest)
        divisor_N = 10 ** torch.linspace(0, 20, len(loss_N), device=device)
        logits_NV.mul_(divisor_N.unsqueeze(1))
        return loss_N, divisor_N

    expected, expected_TD = fused(*arguments, ops, chunk_tokens=chunk)
    loss, grad_TD = fused(*arguments, ops._replace(cross_entropy_=undivided), chunk_tokens=chunk)
    assert torch.equal(loss, expected)
    torch.testing.assert_close(grad_TD, expected_TD, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_far_above_their_first_logits(dtype, ops, device, monkeypatch):
    """The hidden states' gradient too is of a row times up to 10¹⁷, before it is divided."""
    narrow = OPERATIONS["cross_entropy"]._replace(default=lambda bucket: Launch(1, 32, 1, 0, 1))
    monkeypatch.setitem(OPERATIONS, "cross_entropy", narrow)
    hidden_TD, head_VD, targets_T = problem(device, 1.0)
    hidden_TD, head_VD = hidden_TD.abs().to(dtype), head_VD / 8
    head_VD[40] += 2.9
    head_VD[66] += 4.0
    head_VD = head_VD.to(dtype)
    logits_TV = hidden_TD.float() @ head_VD.float().t()
    rise_T = logits_TV[:, 32:].amax(1) - logits_TV[:, :32].amax(1)
    assert (rise_T > 40).any()
    assert (rise_T < 40).any()
    _, exact_TD = written_out(hidden_TD.double(), head_VD.double(), targets_T, T)
    _, grad_TD = fused(hidden_TD, head_VD, targets_T, ops)
    # The logits' gradient, the product and its division are each rounded by half an eps at most, the first by a whole
    # one where it is interpreted; and an fp32 logit of 60, an exponent, has an error of 4e-6.
    error = (grad_TD.double() - exact_TD).norm() / exact_TD.norm()
    assert error < 2 * torch.finfo(dtype).eps + 1e-5


@settings(max_examples=40)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 10**6))
def test_shifted_targets_are_the_next_labels(B, S, seed):
    labels_BS = torch.randint(-100, 50, (B, S), generator=torch.Generator().manual_seed(seed))
    targets_BS = shifted_targets(labels_BS)
    assert targets_BS.shape == labels_BS.shape
    assert torch.equal(targets_BS[:, :-1], labels_BS[:, 1:])
    assert (targets_BS[:, -1] == IGNORED).all()


@settings(max_examples=25)
@given(st.integers(1, 60), st.integers(1, 70), st.floats(0, 1), st.integers(0, 10**6))
def test_the_chunk_changes_nothing(chunk, rows, labelled, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden_TD = torch.randn(rows, D, generator=generator)
    head_VD = torch.randn(V, D, generator=generator)
    targets_T = torch.randint(0, V, (rows,), generator=generator)
    targets_T[torch.rand(rows, generator=generator) >= labelled] = IGNORED
    ops = load_backend("eager")
    one_loss, one_TD = fused(hidden_TD, head_VD, targets_T, ops, chunk_tokens=rows)
    loss, grad_TD = fused(hidden_TD, head_VD, targets_T, ops, chunk_tokens=chunk)
    torch.testing.assert_close(loss, one_loss, rtol=1e-5, atol=1e-6, equal_nan=not (targets_T != IGNORED).any())
    torch.testing.assert_close(grad_TD, one_TD, rtol=1e-4, atol=1e-6)
