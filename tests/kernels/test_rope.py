# T tokens, H heads, d head size, S rows of the tables

from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb

from fastft.errors import ModelError
from fastft.kernels.rope import reference

OPERATION = "rope"

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")


def tables(S: int, d: int, dtype: torch.dtype, device: torch.device | str) -> tuple[Tensor, Tensor]:
    frequencies_h = 10000.0 ** -(torch.arange(0, d, 2, device=device) / d)
    angles_Sd = torch.outer(torch.arange(S, device=device), frequencies_h).repeat(1, 2)
    return angles_Sd.cos().to(dtype), angles_Sd.sin().to(dtype)


def hugging_face(x_THd: Tensor, cos_Sd: Tensor, sin_Sd: Tensor) -> Tensor:
    rows = torch.arange(len(x_THd), device=x_THd.device) % len(cos_Sd)
    return apply_rotary_pos_emb(x_THd, x_THd, cos_Sd[rows], sin_Sd[rows])[0]


@pytest.mark.parametrize(
    ("T", "H", "d", "S", "width"),
    [(1, 1, 2, 1, 2), (63, 3, 64, 63, 64), (12, 5, 96, 4, 96), (13, 2, 128, 4, 128), (7, 1, 256, 1000, 256),
     (3, 40, 128, 3, 128), (13, 3, 96, 5, 64), (4, 2, 7, 4, 6), (5, 2, 8, 5, 0)],
)  # fmt: skip
def test_rotation_and_gradient_against_fp64(T, H, d, S, width, dtype, device, kernels, assert_accurate):
    """Tables narrower than a head rotate its first part."""
    x_THd, dy_THd = (torch.randn(T, H, d, device=device).to(dtype) for _ in range(2))
    cos_Sd, sin_Sd = tables(S, width, dtype, device)
    outputs = []
    for wide in (dtype, torch.float64):
        leaf_THd = x_THd.detach().to(wide).requires_grad_()
        y_THd = hugging_face(leaf_THd, cos_Sd.to(wide), sin_Sd.to(wide))
        outputs.append((y_THd.detach(), torch.autograd.grad(y_THd, leaf_THd, dy_THd.to(wide))[0]))
    (eager_y, eager_dx), (truth_y, truth_dx) = outputs

    result_THd = kernels.rope_(x_THd, cos_Sd, sin_Sd)
    assert result_THd is x_THd
    assert_accurate("y", x_THd, eager_y, truth_y)
    assert_accurate("dx", kernels.rope_(dy_THd, cos_Sd, sin_Sd, inverse=True), eager_dx, truth_dx)


def test_view_of_packed_qkv(device, kernels: ModuleType):
    T, heads, d = 9, 8, 32
    packed_THd = torch.randn(T, heads, d, device=device)
    before_THd = packed_THd.clone()
    cos_Sd, sin_Sd = tables(T, d, torch.float32, device)
    kernels.rope_(packed_THd[:, :5], cos_Sd, sin_Sd)
    expected_THd = hugging_face(before_THd[:, :5], cos_Sd, sin_Sd)
    assert_close(packed_THd[:, :5], expected_THd, atol=1e-6, rtol=1e-6)
    assert torch.equal(packed_THd[:, 5:], before_THd[:, 5:])


@pytest.mark.parametrize("order", [(1, 0, 2), (2, 1, 0)])
def test_any_strides(order, device, kernels: ModuleType):
    """Heads outermost, as in Hugging Face's B×H×S×d; and even the head's own dimension strided."""
    x_THd = torch.randn(7, 3, 16, device=device)
    cos_Sd, sin_Sd = tables(7, 16, torch.float32, device)
    strided_THd = x_THd.permute(order).contiguous().permute(order)
    assert strided_THd.stride() != x_THd.stride()
    kernels.rope_(strided_THd, cos_Sd, sin_Sd)
    assert_close(strided_THd, kernels.rope_(x_THd, cos_Sd, sin_Sd))


def test_tables_may_be_strided_and_longer(device, kernels: ModuleType):
    x_THd = torch.randn(5, 2, 16, device=device)
    cos_Sd, sin_Sd = tables(5, 16, torch.float32, device)
    expected_THd = kernels.rope_(x_THd.clone(), cos_Sd, sin_Sd)
    long_cos_Sd, long_sin_Sd = (x.t().contiguous().t() for x in tables(50, 16, torch.float32, device))
    assert_close(kernels.rope_(x_THd, long_cos_Sd, long_sin_Sd), expected_THd)


def test_fp32_tables_on_16_bit_heads(device, kernels: ModuleType):
    x_THd = torch.randn(5, 2, 16, device=device).half()
    cos_Sd, sin_Sd = tables(5, 16, torch.float32, device)
    truth_THd = hugging_face(x_THd.double(), cos_Sd.double(), sin_Sd.double())
    assert_close(kernels.rope_(x_THd, cos_Sd, sin_Sd), truth_THd.half(), atol=1e-6, rtol=1e-3)


def test_no_tokens(device, kernels: ModuleType):
    cos_Sd, sin_Sd = tables(4, 16, torch.float32, device)
    assert kernels.rope_(torch.zeros(0, 2, 16, device=device), cos_Sd, sin_Sd).shape == (0, 2, 16)


def test_tokens_past_two_to_the_31_elements(device, kernels: ModuleType, far_rows):
    x_THd = far_rows(3, 2, 16, dtype=torch.float16)
    cos_Sd, sin_Sd = tables(3, 16, torch.float16, device)
    expected_THd = kernels.rope_(x_THd.contiguous(), cos_Sd, sin_Sd)
    assert_close(kernels.rope_(x_THd, cos_Sd, sin_Sd), expected_THd)


def test_tables_that_do_not_fit_are_refused(device, kernels: ModuleType):
    cos_Sd, sin_Sd = tables(4, 8, torch.float32, device)
    for cos, sin in ((cos_Sd, sin_Sd[:, :6]), (cos_Sd[:0], sin_Sd[:0])):
        with pytest.raises(ModelError, match="do not fit"):
            kernels.rope_(torch.ones(4, 2, 16, device=device), cos, sin)
    with pytest.raises(ModelError, match="do not fit"):
        kernels.rope_(torch.ones(4, 2, 6, device=device), cos_Sd, sin_Sd)
    with pytest.raises(ModelError, match="even"):
        kernels.rope_(torch.ones(4, 2, 7, device=device), cos_Sd[:, :7], sin_Sd[:, :7])


@settings(max_examples=30)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 20), st.integers(1, 12))
def test_inverse_undoes_and_lengths_stay(T, H, half, S):
    x_THd = torch.randn(T, H, 2 * half)
    before_THd = x_THd.clone()
    cos_Sd, sin_Sd = tables(S, 2 * half, torch.float32, "cpu")
    reference.rope_(x_THd, cos_Sd, sin_Sd)
    assert_close(x_THd.norm(dim=-1), before_THd.norm(dim=-1))
    assert_close(reference.rope_(x_THd, cos_Sd, sin_Sd, inverse=True), before_THd, atol=1e-5, rtol=1e-5)


def test_the_reference_has_the_bits_of_transformers(device):
    """In fp32, so that a model whose adapters are off gives the logits that it gave before it was adapted."""
    x_THd = torch.randn(37, 3, 16, device=device)
    angles_Sd = torch.randn(37, 8, device=device).repeat(1, 2)
    cos_Sd, sin_Sd = angles_Sd.cos(), angles_Sd.sin()
    expected = apply_rotary_pos_emb(
        x_THd.transpose(0, 1)[None], x_THd.transpose(0, 1)[None], cos_Sd[None], sin_Sd[None]
    )
    assert torch.equal(reference.rope_(x_THd.clone(), cos_Sd, sin_Sd), expected[0][0].transpose(0, 1))
