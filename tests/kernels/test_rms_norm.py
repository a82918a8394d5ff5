# T tokens, D model width

from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fastft.errors import BackendError
from fastft.kernels.rms_norm import reference, triton

OPERATION = "rms_norm"
EPS = 1e-5
SHAPES = [(1, 64), (63, 100), (5, 3), (3, 1536), (1000, 63), (2, 5000)]

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")


def hugging_face(x_TD: Tensor, weight_D: Tensor) -> Tensor:
    """LlamaRMSNorm's formula; in fp64 without its casts to fp32."""
    statistics = torch.promote_types(x_TD.dtype, torch.float32)
    wide_TD = x_TD.to(statistics)
    wide_TD = wide_TD * torch.rsqrt(wide_TD.pow(2).mean(-1, keepdim=True) + EPS)
    return weight_D * wide_TD.to(x_TD.dtype)


def make(T: int, D: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x_TD, residual_TD, dy_TD = (torch.randn(T, D, device=device).to(dtype) for _ in range(3))
    return x_TD, residual_TD, dy_TD, (1 + 0.2 * torch.randn(D, device=device)).to(dtype)


def differentiate(x_TD: Tensor, weight_D: Tensor, dy_TD: Tensor) -> tuple[Tensor, Tensor]:
    x_TD = x_TD.detach().requires_grad_()
    y_TD = hugging_face(x_TD, weight_D)
    return y_TD.detach(), torch.autograd.grad(y_TD, x_TD, dy_TD)[0]


@pytest.mark.parametrize(("T", "D"), SHAPES)
def test_forward_and_gradient_against_fp64(T, D, dtype, device, kernels, assert_accurate):
    x_TD, residual_TD, dy_TD, weight_D = make(T, D, dtype, device)
    truth_y, truth_dx = differentiate(x_TD.double(), weight_D.double(), dy_TD.double())
    eager_y, eager_dx = differentiate(x_TD, weight_D, dy_TD)

    y_TD, rstd_T = kernels.rms_norm(x_TD, weight_D, EPS)
    assert_accurate("y", y_TD, eager_y, truth_y)
    truth_rstd = torch.rsqrt(x_TD.double().pow(2).mean(-1) + EPS)
    assert_accurate("rstd", rstd_T, truth_rstd.float(), truth_rstd)

    assert_accurate("dx", kernels.rms_norm_backward(dy_TD, x_TD, weight_D, rstd_T), eager_dx, truth_dx)
    dx_TD = kernels.rms_norm_backward(dy_TD, x_TD, weight_D, rstd_T, residual_TD)
    assert_accurate("dx + residual", dx_TD, eager_dx + residual_TD, truth_dx + residual_TD.double())


@pytest.mark.parametrize(("T", "D"), [(63, 100), (2, 1536)])
def test_add_then_normalise(T, D, dtype, device, kernels, assert_accurate):
    x_TD, residual_TD, _, weight_D = make(T, D, dtype, device)
    eager_sum = x_TD + residual_TD
    sum_TD, y_TD, rstd_T = kernels.add_rms_norm(x_TD, residual_TD, weight_D, EPS)
    assert_accurate("sum", sum_TD, eager_sum, x_TD.double() + residual_TD.double())
    # The norm sees the rounded sum, as in Hugging Face's layers: the truth starts from it.
    truth_TD = sum_TD.double()
    assert_accurate("y", y_TD, hugging_face(sum_TD, weight_D), hugging_face(truth_TD, weight_D.double()))
    truth_rstd = torch.rsqrt(truth_TD.pow(2).mean(-1) + EPS)
    assert_accurate("rstd", rstd_T, truth_rstd.float(), truth_rstd)


def test_reference_has_the_bits_of_llama_rms_norm(dtype, device):
    x_TD, residual_TD, _, weight_D = make(63, 1000, dtype, device)
    norm = LlamaRMSNorm(1000, eps=EPS).to(device, dtype)
    norm.weight.data.copy_(weight_D)
    assert torch.equal(reference.rms_norm(x_TD, weight_D, EPS)[0], norm(x_TD))
    sum_TD, y_TD, _ = reference.add_rms_norm(x_TD, residual_TD, weight_D, EPS)
    assert torch.equal(sum_TD, x_TD + residual_TD)
    assert torch.equal(y_TD, norm(x_TD + residual_TD))


def test_rounds_before_the_weight(device, kernels: ModuleType):
    """A kernel that rounds once, after the weight, is as accurate, but not the same training: a third of its bits
    differ.  Another order of the fp32 sum flips one in thousands."""
    x_TD, _, _, weight_D = make(63, 256, torch.float16, device)
    y_TD, _ = kernels.rms_norm(x_TD, weight_D, EPS)
    assert (y_TD != hugging_face(x_TD, weight_D)).float().mean() < 0.005


def test_inputs_keep_their_values_and_may_be_strided(device, kernels: ModuleType):
    x_TD, residual_TD, dy_TD, weight_D = make(9, 64, torch.float32, device)
    y_TD, rstd_T = kernels.rms_norm(x_TD, weight_D, EPS)
    dx_TD = kernels.rms_norm_backward(dy_TD, x_TD, weight_D, rstd_T, residual_TD)
    # A slice of a wider buffer, a transposed matrix, every second weight.
    sliced_TD = torch.cat([torch.full_like(x_TD, 7.0), x_TD, x_TD], dim=1)[:, 64:128]
    transposed_TD = residual_TD.t().contiguous().t()
    strided_D = weight_D.repeat_interleave(2)[::2]
    copies = [x.clone() for x in (sliced_TD, transposed_TD, strided_D, dy_TD)]
    assert_close(kernels.rms_norm(sliced_TD, strided_D, EPS)[0], y_TD)
    assert_close(kernels.rms_norm_backward(dy_TD, sliced_TD, strided_D, rstd_T, transposed_TD), dx_TD)
    kernels.add_rms_norm(sliced_TD, transposed_TD, strided_D, EPS)
    for before, after in zip(copies, (sliced_TD, transposed_TD, strided_D, dy_TD), strict=True):
        assert torch.equal(before, after)


def test_expanded_gradient(device, kernels: ModuleType):
    """`y.sum().backward()` passes one number with two zero strides."""
    x_TD, _, _, weight_D = make(5, 48, torch.float32, device)
    _, rstd_T = kernels.rms_norm(x_TD, weight_D, EPS)
    expanded_TD = torch.ones((), device=device).expand(5, 48)
    expected_TD = kernels.rms_norm_backward(torch.ones(5, 48, device=device), x_TD, weight_D, rstd_T)
    assert_close(kernels.rms_norm_backward(expanded_TD, x_TD, weight_D, rstd_T), expected_TD)


def test_fp32_weight_on_16_bit_activations(device, kernels: ModuleType):
    """Quantized loading keeps norms in fp32; the activations' dtype must not widen."""
    x_TD, _, dy_TD, weight_D = make(5, 48, torch.float16, device)
    y_TD, rstd_T = kernels.rms_norm(x_TD, weight_D.float(), EPS)
    assert torch.equal(y_TD, kernels.rms_norm(x_TD, weight_D, EPS)[0])
    assert kernels.rms_norm_backward(dy_TD, x_TD, weight_D.float(), rstd_T).dtype == torch.float16


def test_large_fp16_values_do_not_overflow(device, kernels: ModuleType):
    x_TD = torch.full((2, 64), 6e4, dtype=torch.float16, device=device)
    weight_D = torch.ones(64, dtype=torch.float16, device=device)
    y_TD, rstd_T = kernels.rms_norm(x_TD, weight_D, EPS)
    assert torch.equal(y_TD, torch.ones_like(y_TD))
    dx_TD = kernels.rms_norm_backward(torch.ones_like(x_TD), x_TD, weight_D, rstd_T)
    assert_close(dx_TD, torch.zeros_like(dx_TD), atol=1e-6, rtol=0)


def test_one_column(device, kernels: ModuleType):
    """x̂ is ±1 up to eps, so the gradient is a difference of nearly equal numbers: judged absolutely."""
    x_TD, _, dy_TD, weight_D = make(7, 1, torch.float32, device)
    truth_y, truth_dx = differentiate(x_TD.double(), weight_D.double(), dy_TD.double())
    y_TD, rstd_T = kernels.rms_norm(x_TD, weight_D, EPS)
    assert_close(y_TD, truth_y.float())
    dx_TD = kernels.rms_norm_backward(dy_TD, x_TD, weight_D, rstd_T)
    assert_close(dx_TD, truth_dx.float(), rtol=0, atol=1e-6 * float(rstd_T.max()))


def test_no_tokens(device, kernels: ModuleType):
    x_TD, residual_TD, dy_TD, weight_D = make(0, 32, torch.bfloat16, device)
    sum_TD, y_TD, rstd_T = kernels.add_rms_norm(x_TD, residual_TD, weight_D, EPS)
    assert sum_TD.shape == y_TD.shape == kernels.rms_norm_backward(dy_TD, x_TD, weight_D, rstd_T).shape == (0, 32)
    assert rstd_T.shape == (0,)


def test_rows_past_two_to_the_31_elements(device, kernels: ModuleType, far_rows):
    x_TD = far_rows(3, 48, dtype=torch.float16)
    weight_D = torch.rand(48, device=device).half()
    near_TD = x_TD.contiguous()
    y_TD, rstd_T = kernels.rms_norm(x_TD, weight_D, EPS)
    assert_close(y_TD, kernels.rms_norm(near_TD, weight_D, EPS)[0])
    dx_TD = kernels.rms_norm_backward(x_TD, x_TD, weight_D, rstd_T, x_TD)
    assert_close(dx_TD, kernels.rms_norm_backward(near_TD, near_TD, weight_D, rstd_T, near_TD))


def test_too_wide_a_row_is_refused(device):
    x_TD = torch.ones(1, 32769, device=device)
    with pytest.raises(BackendError, match="32768"):
        triton.rms_norm(x_TD, torch.ones(32769, device=device), EPS)
