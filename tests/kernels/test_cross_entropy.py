# N labelled rows, V vocabulary

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close
from transformers.loss.loss_utils import ForCausalLMLoss

from fastft.kernels.cross_entropy import LogitTransform, reference, triton
from fastft.kernels.launches import Launch

OPERATION = "cross_entropy"
SCALE = 1 / 37

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")


def make(N: int, V: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    return (4 * torch.randn(N, V, device=device)).to(dtype), torch.randint(0, V, (N,), device=device)


def differentiate(
    logits_NV: Tensor,
    targets_N: Tensor,
    transform: LogitTransform = LogitTransform(),  # noqa: B008
) -> tuple[Tensor, Tensor]:
    """Loss and scaled gradient as Hugging Face computes them; in fp64 without the upcast to fp32."""
    logits_NV = logits_NV.detach().requires_grad_()
    z_NV = logits_NV / (1 / transform.multiplier)
    if transform.softcap is not None:
        z_NV = torch.tanh(z_NV / transform.softcap) * transform.softcap
    z_NV = z_NV / transform.temperature
    wide_NV = z_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    loss_N = functional.cross_entropy(wide_NV, targets_N, reduction="none")
    return loss_N.detach(), torch.autograd.grad(loss_N.sum() * SCALE, logits_NV)[0]


def divided(logits_NV: Tensor, divisor_N: Tensor) -> Tensor:
    """The gradient in fp64, of what stands in the logits' place."""
    return logits_NV.double() / divisor_N.double().unsqueeze(1)


def compare_gradient(
    assert_accurate: Callable[[str, Tensor, Tensor, Tensor], None],
    result: tuple[Tensor, Tensor],
    logits_NV: Tensor,
    targets_N: Tensor,
    transform: LogitTransform = LogitTransform(),  # noqa: B008
) -> None:
    """The rule for what stands in the logits' place and its divisor: eager PyTorch's is in fp32, rounded once.

    Of the divisor the powers of two go, which are exact in every dtype: else the rows would count by their sums.
    """
    stored_NV, divisor_N = result
    assert divisor_N.dtype == torch.float32
    power_N1 = torch.exp2(divisor_N.log2().round()).unsqueeze(1)
    rest_N1 = divisor_N.unsqueeze(1) / power_N1
    eager_NV = (differentiate(logits_NV.float(), targets_N, transform)[1] * rest_N1).to(logits_NV.dtype)
    truth_NV = differentiate(logits_NV.double(), targets_N, transform)[1] * rest_N1.double()
    assert_accurate("gradient", (stored_NV.double() / power_N1).to(stored_NV.dtype), eager_NV, truth_NV)


@pytest.fixture
def narrow_blocks(launched_as: Callable[[str, Launch], None]) -> None:
    """Triton's blocks are 32 wide, so that a small row has many."""
    launched_as("cross_entropy", Launch(1, 32, 1, 0, 1))


@pytest.mark.parametrize(("N", "V"), [(1, 2), (63, 100), (251, 63), (31, 20011), (2, 8192)])
def test_loss_and_gradient_against_fp64(N, V, dtype, device, kernels, assert_accurate):
    logits_NV, targets_N = make(N, V, dtype, device)
    truth_loss, _ = differentiate(logits_NV.double(), targets_N)
    eager_loss, _ = differentiate(logits_NV, targets_N)
    before_NV = logits_NV.clone()

    loss_N, divisor_N = kernels.cross_entropy_(logits_NV, targets_N)
    assert divisor_N is None
    assert_accurate("loss alone", loss_N, eager_loss, truth_loss)
    assert torch.equal(logits_NV, before_NV), "without a scale nothing is overwritten"

    loss_N, divisor_N = kernels.cross_entropy_(logits_NV, targets_N, SCALE)
    assert_accurate("loss", loss_N, eager_loss, truth_loss)
    compare_gradient(assert_accurate, (logits_NV, divisor_N), before_NV, targets_N)


@pytest.mark.parametrize(
    "transform",
    [(1 / 16, None), (-0.5, None), (1.0, 30.0), (1.0, 2.0), (0.25, 5.0), (1.0, None, 0.7), (0.5, 5.0, 1.3)],
    ids=str,
)
@pytest.mark.parametrize(("N", "V"), [(63, 100), (31, 20011)])
def test_transformed_logits_against_fp64(N, V, transform, dtype, device, kernels, assert_accurate):
    transform = LogitTransform(*transform)
    logits_NV, targets_N = make(N, V, dtype, device)
    logits_NV[0, : V // 2] *= 1e-3  # where a tanh that cancels would show
    truth_loss, _ = differentiate(logits_NV.double(), targets_N, transform)
    eager_loss, _ = differentiate(logits_NV, targets_N, transform)
    before_NV = logits_NV.clone()
    loss_N, _ = kernels.cross_entropy_(logits_NV, targets_N, None, transform)
    assert_accurate("alone", loss_N, eager_loss, truth_loss)
    assert torch.equal(logits_NV, before_NV)
    loss_N, divisor_N = kernels.cross_entropy_(logits_NV, targets_N, SCALE, transform)
    assert_accurate("loss", loss_N, eager_loss, truth_loss)
    compare_gradient(assert_accurate, (logits_NV, divisor_N), before_NV, targets_N, transform)


@pytest.mark.usefixtures("narrow_blocks")
@pytest.mark.parametrize(
    ("transform", "shift"),
    [((1.0, None), 0.0), ((1.0, None), 1e4), ((1.0, None), -1e4), ((1 / 16, None), 0.0), ((1.0, 1000.0), 0.0)],
    ids=str,
)
def test_rows_that_rise_late_and_often(transform, shift, dtype, device, kernels, assert_accurate):
    """By less and by more than a row may be above its level, once and in every block; and then fall."""
    transform = LogitTransform(*transform)
    blocks = torch.tensor([
        [-39, 0, 0, 0, 0, 0], [-60, -60, -60, 0, 0, -60], [-225, -180, -135, -90, -45, 0], [0, -45, -90, -9, -5, -1],
        [-50, -100, -150, -200, -250, 0], [-330, -100, -50, -55, 0, -35],
    ], device=device)  # fmt: skip
    logits_NV, targets_N = make(len(blocks), 170, torch.float32, device)
    logits_NV += blocks.repeat_interleave(32, 1)[:, :170] + shift
    logits_NV = (logits_NV / transform.multiplier).to(dtype)
    before_NV = logits_NV.clone()
    truth_loss, _ = differentiate(logits_NV.double(), targets_N, transform)
    eager_loss, _ = differentiate(logits_NV, targets_N, transform)
    loss_N, divisor_N = kernels.cross_entropy_(logits_NV, targets_N, SCALE, transform)
    assert_accurate("loss", loss_N, eager_loss, truth_loss)
    compare_gradient(assert_accurate, (logits_NV, divisor_N), before_NV, targets_N, transform)


@pytest.mark.usefixtures("narrow_blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # in fp16, 10⁻⁶ · SCALE is under the smallest number
@pytest.mark.parametrize("rise", [20.0, 50.0])
def test_a_confident_targets_gradient_keeps_its_precision(rise, dtype, device, kernels: ModuleType):
    """p − 1 in fp32 has an error of 6 % where p is 1 − 10⁻⁶."""
    V = 100
    targets_N = torch.tensor([0, 40, 99], device=device)
    logits_NV = torch.zeros(3, V, device=device)
    logits_NV[:, 50:] = rise
    logits_NV[torch.arange(3), targets_N] = rise + 17.75  # exact in bf16
    logits_NV = logits_NV.to(dtype)
    truth_NV = differentiate(logits_NV.double(), targets_N)[1]
    target_N1 = targets_N.unsqueeze(1)
    assert (truth_NV.gather(1, target_N1) / SCALE > -2e-6).all()
    _, divisor_N = kernels.cross_entropy_(logits_NV, targets_N, SCALE)
    result_N1 = divided(logits_NV, divisor_N).gather(1, target_N1)
    # exp's argument is up to 70 and has an fp32 number's error.
    rtol = max(1e-5, torch.finfo(dtype).eps)
    assert_close(result_N1, truth_NV.gather(1, target_N1), atol=0, rtol=rtol)


def test_a_soft_cap_gives_no_weight_outside_the_row(device, kernels: ModuleType):
    """Lanes past V must not count as −softcap; a logit of −∞ does, as in Hugging Face's model."""
    logits_NV = torch.zeros(2, 3, device=device)
    logits_NV[1, 2] = float("-inf")
    loss_N, divisor_N = kernels.cross_entropy_(
        logits_NV, torch.zeros(2, dtype=torch.long, device=device), 1.0, LogitTransform(1.0, 2.0)
    )
    expected_N = torch.tensor([3.0, 2.0 + torch.tensor(-2.0).exp().item()]).log().to(device)
    assert_close(loss_N, expected_N)
    assert divided(logits_NV, divisor_N).isfinite().all()


def test_reference_is_hugging_faces_loss(dtype, device):
    logits_NV, targets_N = make(40, 500, dtype, device)
    leaf_BNV = logits_NV.unsqueeze(0).clone().requires_grad_()
    expected = ForCausalLMLoss(
        leaf_BNV, None, 500, num_items_in_batch=torch.tensor(37, device=device), shift_labels=targets_N.unsqueeze(0)
    )
    expected.backward()
    loss_N, divisor_N = reference.cross_entropy_(logits_NV, targets_N, SCALE)
    assert torch.equal(divisor_N, torch.ones_like(loss_N))
    assert_close(loss_N.sum() * SCALE, expected.detach(), atol=0, rtol=1e-6)
    # A rounding boundary moves the last place, and a GPU's exp differs from its log-softmax in the last two bits.
    assert_close(logits_NV, leaf_BNV.grad[0], atol=1e-8, rtol=4 * torch.finfo(dtype).eps)


def test_blocks_of_rows_change_nothing(device, monkeypatch):
    logits_NV, targets_N = make(11, 50, torch.float32, device)
    whole_NV, blocks_NV = logits_NV.clone(), logits_NV.clone()
    whole = reference.cross_entropy_(whole_NV, targets_N, SCALE)
    monkeypatch.setitem(reference.BLOCK_ELEMENTS, device.type, 150)
    assert_close(reference.cross_entropy_(blocks_NV, targets_N, SCALE), whole)
    assert_close(blocks_NV, whole_NV, atol=1e-8, rtol=1e-5)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scale_as_a_tensor(shape, scale_dtype, device, kernels: ModuleType):
    logits_NV, targets_N = make(5, 100, torch.float32, device)
    by_number_NV, by_tensor_NV = logits_NV.clone(), logits_NV.clone()
    _, divisor_N = kernels.cross_entropy_(by_number_NV, targets_N, 0.25)
    scale = torch.full(shape, 0.25, dtype=scale_dtype, device=device)
    assert torch.equal(kernels.cross_entropy_(by_tensor_NV, targets_N, scale)[1], divisor_N)
    assert torch.equal(by_number_NV, by_tensor_NV)


def test_zero_scale_gives_zero_gradient(device, kernels: ModuleType):
    logits_NV, targets_N = make(3, 10, torch.float32, device)
    _, divisor_N = kernels.cross_entropy_(logits_NV, targets_N, 0.0)
    assert not divided(logits_NV, divisor_N).any()


def test_slice_of_a_wider_buffer_and_strided_targets(device, kernels: ModuleType):
    wide_NW, targets_N = make(6, 130, torch.float32, device)
    targets_N = targets_N.remainder(100)
    before_NW = wide_NW.clone()
    expected_NV = wide_NW[:, 20:120].contiguous()
    expected = kernels.cross_entropy_(expected_NV, targets_N, SCALE)
    result = kernels.cross_entropy_(wide_NW[:, 20:120], targets_N.repeat_interleave(2)[::2], SCALE)
    assert_close(result, expected)
    assert_close(wide_NW[:, 20:120], expected_NV, atol=1e-8, rtol=1e-5)
    assert torch.equal(wide_NW[:, :20], before_NW[:, :20])
    assert torch.equal(wide_NW[:, 120:], before_NW[:, 120:])


def test_transposed_logits(device, kernels: ModuleType):
    """The end of each row is so far up that the beginning is scaled down."""
    logits_NV, targets_N = make(6, 9000, torch.float32, device)
    logits_NV[:, 8192:] += 60
    transposed_NV = logits_NV.t().contiguous().t()
    loss_N, divisor_N = kernels.cross_entropy_(transposed_NV, targets_N, SCALE)
    assert_close((loss_N, divisor_N), kernels.cross_entropy_(logits_NV, targets_N, SCALE), atol=1e-6, rtol=1e-6)
    assert_close(transposed_NV, logits_NV, atol=1e-8, rtol=1e-5)


def test_masked_vocabulary_and_large_logits(device, kernels: ModuleType):
    """−inf in all of the first block, and logits whose exp overflows."""
    logits_NV = torch.full((2, 9000), float("-inf"), device=device)
    logits_NV[:, -2:] = torch.tensor([500.0, 501.0], device=device)
    targets_N = torch.tensor([8999, 8998], device=device)
    truth_loss, truth_gradient = differentiate(logits_NV[:, -2:].double(), targets_N - 8998)
    loss_N, divisor_N = kernels.cross_entropy_(logits_NV, targets_N, SCALE)
    assert_close(loss_N, truth_loss.float(), atol=0, rtol=1e-6)
    assert_close(divided(logits_NV, divisor_N)[:, -2:], truth_gradient, atol=0, rtol=1e-5)
    assert torch.equal(logits_NV[:, :-2], torch.zeros_like(logits_NV[:, :-2]))


def test_no_rows(device, kernels: ModuleType):
    for result_N in kernels.cross_entropy_(*make(0, 10, torch.bfloat16, device), SCALE):
        assert result_N.shape == (0,)
        assert result_N.dtype == torch.float32


def test_one_word_vocabulary(device, kernels: ModuleType):
    logits_NV, targets_N = make(3, 1, torch.float32, device)
    loss_N, divisor_N = kernels.cross_entropy_(logits_NV, targets_N, 1.0)
    assert torch.equal(loss_N, torch.zeros(3, device=device))
    assert not divided(logits_NV, divisor_N).any()


@pytest.mark.parametrize("scale", [None, SCALE])
@pytest.mark.parametrize("target", [-100, 10, 11])
def test_a_target_outside_the_vocabulary_is_loud_and_writes_nowhere(target, scale, dtype, device):
    wide_NW, targets_N = make(3, 12, dtype, device)
    before_NW = wide_NW.clone()
    targets_N = targets_N.remainder(10)
    targets_N[1] = target
    for result_N in triton.cross_entropy_(wide_NW[:, :10], targets_N, scale):
        assert result_N is None or result_N.isnan().tolist() == [False, True, False]
    assert torch.equal(wide_NW[:, 10:], before_NW[:, 10:])


def test_rows_past_two_to_the_31_elements(device, kernels: ModuleType, far_rows):
    logits_NV = far_rows(3, 50, dtype=torch.float16)
    near_NV = logits_NV.contiguous()
    targets_N = torch.tensor([0, 49, 7], device=device)
    near = kernels.cross_entropy_(near_NV, targets_N, SCALE)
    assert_close(kernels.cross_entropy_(logits_NV, targets_N, SCALE), near)
    assert_close(logits_NV, near_NV)


@pytest.mark.gpu
@pytest.mark.parametrize("tensor_scale", [False, True])
def test_the_host_never_waits(tensor_scale, device, kernels: ModuleType):
    logits_NV, targets_N = make(64, 1000, torch.bfloat16, device)
    scale = torch.full((), SCALE, device=device) if tensor_scale else SCALE
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernels.cross_entropy_(logits_NV, targets_N, scale)
    finally:
        torch.cuda.set_sync_debug_mode("default")
