# T tokens, D width of a row

from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fastft.errors import BackendError
from fastft.kernels.norm import Norm, NormKind, reference, triton

OPERATION = "norm"
EPS = 1e-5
SHAPES = [(1, 64), (63, 100), (5, 3), (3, 1536), (1000, 63), (2, 5000)]
KINDS: tuple[NormKind, ...] = ("rms", "rms_unit_offset", "layer")

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> NormKind:
    return request.param


def written_out(x_TD: Tensor, norm: Norm) -> Tensor:
    """The formulas of LlamaRMSNorm, Gemma2RMSNorm and PyTorch's LayerNorm; in fp64 without their casts to fp32."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    wide_TD, weight_D = x_TD.to(wide), norm.weight_D.to(wide)
    if norm.kind == "layer":
        wide_TD = wide_TD - wide_TD.mean(-1, keepdim=True)
    wide_TD = wide_TD * torch.rsqrt(wide_TD.pow(2).mean(-1, keepdim=True) + norm.eps)
    if norm.kind == "rms":
        return norm.weight_D * wide_TD.to(x_TD.dtype)
    if norm.kind == "rms_unit_offset":
        return (wide_TD * (1 + weight_D)).to(x_TD.dtype)
    return (wide_TD * weight_D + norm.bias_D.to(wide)).to(x_TD.dtype)


def make(
    kind: NormKind, T: int, D: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Norm]:
    x_TD, residual_TD, dy_TD = (torch.randn(T, D, device=device).to(dtype) for _ in range(3))
    if kind == "layer":
        x_TD += 2  # a mean that matters
    weight_D = ((kind != "rms_unit_offset") + 0.2 * torch.randn(D, device=device)).to(dtype)
    bias_D = torch.randn(D, device=device).to(dtype) if kind == "layer" else None
    return x_TD, residual_TD, dy_TD, Norm(kind, weight_D, bias_D, EPS)


def to(norm: Norm, dtype: torch.dtype) -> Norm:
    bias_D = None if norm.bias_D is None else norm.bias_D.to(dtype)
    return norm._replace(weight_D=norm.weight_D.to(dtype), bias_D=bias_D)


def rstd(x_TD: Tensor, norm: Norm) -> Tensor:
    centred_TD = x_TD - x_TD.mean(-1, keepdim=True) if norm.kind == "layer" else x_TD
    return torch.rsqrt(centred_TD.pow(2).mean(-1) + norm.eps)


def differentiate(x_TD: Tensor, norm: Norm, dy_TD: Tensor) -> tuple[Tensor, Tensor]:
    x_TD = x_TD.detach().requires_grad_()
    y_TD = written_out(x_TD, norm)
    return y_TD.detach(), torch.autograd.grad(y_TD, x_TD, dy_TD)[0]


@pytest.mark.parametrize(("T", "D"), SHAPES)
def test_forward_and_gradient_against_fp64(T, D, kind, dtype, device, kernels, assert_accurate):
    x_TD, residual_TD, dy_TD, norm = make(kind, T, D, dtype, device)
    truth_y, truth_dx = differentiate(x_TD.double(), to(norm, torch.float64), dy_TD.double())
    eager_y, eager_dx = differentiate(x_TD, norm, dy_TD)

    y_TD, rstd_T = kernels.normalise(x_TD, norm)
    assert_accurate("y", y_TD, eager_y, truth_y)
    truth_rstd = rstd(x_TD.double(), norm)
    assert_accurate("rstd", rstd_T, truth_rstd.float(), truth_rstd)

    assert_accurate("dx", kernels.normalise_backward(dy_TD, x_TD, norm, rstd_T), eager_dx, truth_dx)
    dx_TD = kernels.normalise_backward(dy_TD, x_TD, norm, rstd_T, residual_TD)
    assert_accurate("dx + residual", dx_TD, eager_dx + residual_TD, truth_dx + residual_TD.double())


@pytest.mark.parametrize("multiplier", [1.0, 0.22])
@pytest.mark.parametrize(("T", "D"), [(63, 100), (2, 1536)])
def test_add_then_normalise(T, D, multiplier, kind, dtype, device, kernels, assert_accurate):
    x_TD, residual_TD, _, norm = make(kind, T, D, dtype, device)
    sum_TD, y_TD, rstd_T = kernels.add_and_normalise(x_TD, residual_TD, norm, multiplier)
    truth_sum = multiplier * x_TD.double() + residual_TD.double()
    assert_accurate("sum", sum_TD, multiplier * x_TD + residual_TD, truth_sum)
    # The norm sees the rounded sum, as in Hugging Face's layers: the truth starts from it.
    truth_TD = sum_TD.double()
    assert_accurate("y", y_TD, written_out(sum_TD, norm), written_out(truth_TD, to(norm, torch.float64)))
    truth_rstd = rstd(truth_TD, norm)
    assert_accurate("rstd", rstd_T, truth_rstd.float(), truth_rstd)


@pytest.mark.parametrize(("kind", "module"), [("rms", LlamaRMSNorm), ("rms_unit_offset", Gemma2RMSNorm)])
def test_reference_has_the_bits_of_hugging_face(kind, module, dtype, device):
    x_TD, residual_TD, _, norm = make(kind, 63, 1000, dtype, device)
    stock = module(1000, eps=EPS).to(device, dtype)
    stock.weight.data.copy_(norm.weight_D)
    assert torch.equal(reference.normalise(x_TD, norm)[0], stock(x_TD))
    sum_TD, y_TD, _ = reference.add_and_normalise(x_TD, residual_TD, norm)
    assert torch.equal(sum_TD, x_TD + residual_TD)
    assert torch.equal(y_TD, stock(x_TD + residual_TD))


def test_layer_is_pytorchs(dtype, device, kernels: ModuleType):
    x_TD, _, dy_TD, norm = make("layer", 63, 1000, dtype, device)
    leaf_TD = x_TD.clone().requires_grad_()
    expected_TD = nn.functional.layer_norm(leaf_TD, (1000,), norm.weight_D, norm.bias_D, EPS)
    y_TD, rstd_T = kernels.normalise(x_TD, norm)
    two_places = 2 * torch.finfo(dtype).eps
    assert_close(y_TD, expected_TD.detach(), rtol=two_places, atol=max(2e-6, two_places))
    expected_dx = torch.autograd.grad(expected_TD, leaf_TD, dy_TD)[0]
    dx_TD = kernels.normalise_backward(dy_TD, x_TD, norm, rstd_T)
    assert_close(dx_TD, expected_dx, rtol=two_places, atol=max(2e-6, two_places))


@pytest.mark.parametrize(("kind", "rounds_first"), [("rms", True), ("rms_unit_offset", False)])
def test_rounds_where_hugging_face_does(kind, rounds_first, device, kernels: ModuleType):
    """A kernel that rounds elsewhere is as accurate, but not the same training: a third of its bits differ.  Another
    order of the fp32 sum flips one in thousands."""
    x_TD, _, _, norm = make(kind, 63, 256, torch.float16, device)
    y_TD, _ = kernels.normalise(x_TD, norm)
    assert (y_TD != written_out(x_TD, norm)).float().mean() < 0.005
    as_rms = norm._replace(kind="rms", weight_D=norm.weight_D + (not rounds_first))
    once_TD = rstd(x_TD.float(), norm)[:, None] * x_TD.float() * as_rms.weight_D.float()
    other_TD = once_TD.half() if rounds_first else written_out(x_TD, as_rms)
    assert (y_TD != other_TD).float().mean() > 0.1


def test_inputs_keep_their_values_and_may_be_strided(kind, device, kernels: ModuleType):
    x_TD, residual_TD, dy_TD, norm = make(kind, 9, 64, torch.float32, device)
    y_TD, rstd_T = kernels.normalise(x_TD, norm)
    dx_TD = kernels.normalise_backward(dy_TD, x_TD, norm, rstd_T, residual_TD)
    # A slice of a wider buffer, a transposed matrix, every second weight.
    sliced_TD = torch.cat([torch.full_like(x_TD, 7.0), x_TD, x_TD], dim=1)[:, 64:128]
    transposed_TD = residual_TD.t().contiguous().t()
    strided = norm._replace(
        weight_D=norm.weight_D.repeat_interleave(2)[::2],
        bias_D=None if norm.bias_D is None else norm.bias_D.repeat_interleave(2)[::2],
    )
    copies = [x.clone() for x in (sliced_TD, transposed_TD, strided.weight_D, dy_TD)]
    assert_close(kernels.normalise(sliced_TD, strided)[0], y_TD)
    assert_close(kernels.normalise_backward(dy_TD, sliced_TD, strided, rstd_T, transposed_TD), dx_TD)
    kernels.add_and_normalise(sliced_TD, transposed_TD, strided)
    for before, after in zip(copies, (sliced_TD, transposed_TD, strided.weight_D, dy_TD), strict=True):
        assert torch.equal(before, after)


def test_expanded_gradient(kind, device, kernels: ModuleType):
    """`y.sum().backward()` passes one number with two zero strides."""
    x_TD, _, _, norm = make(kind, 5, 48, torch.float32, device)
    _, rstd_T = kernels.normalise(x_TD, norm)
    expanded_TD = torch.ones((), device=device).expand(5, 48)
    expected_TD = kernels.normalise_backward(torch.ones(5, 48, device=device), x_TD, norm, rstd_T)
    assert_close(kernels.normalise_backward(expanded_TD, x_TD, norm, rstd_T), expected_TD)


def test_fp32_weight_on_16_bit_activations(kind, device, kernels: ModuleType):
    """Quantized loading keeps norms in fp32; the activations' dtype must not widen."""
    x_TD, _, dy_TD, norm = make(kind, 5, 48, torch.float16, device)
    wide = to(norm, torch.float32)
    y_TD, rstd_T = kernels.normalise(x_TD, wide)
    assert torch.equal(y_TD, kernels.normalise(x_TD, norm)[0])
    assert kernels.normalise_backward(dy_TD, x_TD, wide, rstd_T).dtype == torch.float16


@pytest.mark.parametrize("kind", ["rms", "rms_unit_offset"])
def test_large_fp16_values_do_not_overflow(kind, device, kernels: ModuleType):
    x_TD = torch.full((2, 64), 6e4, dtype=torch.float16, device=device)
    norm = Norm(kind, torch.full((64,), float(kind == "rms"), dtype=torch.float16, device=device), None, EPS)
    y_TD, rstd_T = kernels.normalise(x_TD, norm)
    assert torch.equal(y_TD, torch.ones_like(y_TD))
    dx_TD = kernels.normalise_backward(torch.ones_like(x_TD), x_TD, norm, rstd_T)
    assert_close(dx_TD, torch.zeros_like(dx_TD), atol=1e-6, rtol=0)


def test_one_column(kind, device, kernels: ModuleType):
    """x̂ is ±1 up to eps (0 for `layer`), so the gradient is a difference of nearly equal numbers: judged absolutely."""
    x_TD, _, dy_TD, norm = make(kind, 7, 1, torch.float32, device)
    truth_y, truth_dx = differentiate(x_TD.double(), to(norm, torch.float64), dy_TD.double())
    y_TD, rstd_T = kernels.normalise(x_TD, norm)
    assert_close(y_TD, truth_y.float())
    dx_TD = kernels.normalise_backward(dy_TD, x_TD, norm, rstd_T)
    assert_close(dx_TD, truth_dx.float(), rtol=0, atol=1e-6 * float(rstd_T.max()))


def test_no_tokens(kind, device, kernels: ModuleType):
    x_TD, residual_TD, dy_TD, norm = make(kind, 0, 32, torch.bfloat16, device)
    sum_TD, y_TD, rstd_T = kernels.add_and_normalise(x_TD, residual_TD, norm)
    assert sum_TD.shape == y_TD.shape == kernels.normalise_backward(dy_TD, x_TD, norm, rstd_T).shape == (0, 32)
    assert rstd_T.shape == (0,)


def test_rows_past_two_to_the_31_elements(device, kernels: ModuleType, far_rows):
    x_TD = far_rows(3, 48, dtype=torch.float16)
    norm = Norm("rms", torch.rand(48, device=device).half(), None, EPS)
    near_TD = x_TD.contiguous()
    y_TD, rstd_T = kernels.normalise(x_TD, norm)
    assert_close(y_TD, kernels.normalise(near_TD, norm)[0])
    dx_TD = kernels.normalise_backward(x_TD, x_TD, norm, rstd_T, x_TD)
    assert_close(dx_TD, kernels.normalise_backward(near_TD, near_TD, norm, rstd_T, near_TD))


def test_too_wide_a_row_is_refused(device):
    x_TD = torch.ones(1, 32769, device=device)
    with pytest.raises(BackendError, match="32768"):
        triton.normalise(x_TD, Norm("rms", torch.ones(32769, device=device), None, EPS))


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("T", "D"), [(5, 3), (63, 100)])
def test_a_narrow_branch_joins_a_wide_residual_stream(T, D, narrow, kind, device, kernels):
    """Between fp32 norms autocast computes in 16 bits: the sum stays fp32, and what goes on is rounded once."""
    x_TD, residual_TD, dy_TD, norm = make(kind, T, D, torch.float32, device)
    x_TD, dy_TD, norm = x_TD.to(narrow), dy_TD.to(narrow), norm._replace(dtype=narrow)
    sum_TD, y_TD, rstd_T = kernels.add_and_normalise(x_TD, residual_TD, norm, 0.5)
    assert (sum_TD.dtype, y_TD.dtype, rstd_T.dtype) == (torch.float32, narrow, torch.float32)
    assert_close(sum_TD, 0.5 * x_TD.float() + residual_TD)
    expected_TD, expected_dx_TD = differentiate(sum_TD, norm, dy_TD.float())
    # One rounding of 16 bits, of values that may differ by a rounding of fp32.
    assert_close(y_TD.float(), expected_TD, rtol=torch.finfo(narrow).eps, atol=1e-6)
    assert_close(kernels.normalise(sum_TD, norm)[0], y_TD)
    dx_TD = kernels.normalise_backward(dy_TD, sum_TD, norm, rstd_T, residual_TD)
    assert dx_TD.dtype == torch.float32
    assert_close(dx_TD, expected_dx_TD + residual_TD, rtol=1e-4, atol=1e-5)
