# T tokens, F feed-forward width

from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers.activations import ACT2FN

from fastft.kernels.swiglu import reference

OPERATION = "swiglu"
SHAPES = [(1, 1), (63, 100), (1000, 63), (1, 4099)]

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")


def make(T: int, F: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    dact_TF, gate_TF, up_TF = (torch.randn(T, F, device=device) for _ in range(3))
    return dact_TF.to(dtype), (3 * gate_TF).to(dtype), up_TF.to(dtype)


def differentiate(dact_TF: Tensor, gate_TF: Tensor, up_TF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gate_TF, up_TF = gate_TF.detach().requires_grad_(), up_TF.detach().requires_grad_()
    act_TF = ACT2FN["silu"](gate_TF) * up_TF
    return *torch.autograd.grad(act_TF, (gate_TF, up_TF), dact_TF), act_TF.detach()


@pytest.mark.parametrize(("T", "F"), SHAPES)
def test_forward_and_gradients_against_fp64(T, F, dtype, device, kernels, assert_accurate):
    dact_TF, gate_TF, up_TF = make(T, F, dtype, device)
    truth = differentiate(dact_TF.double(), gate_TF.double(), up_TF.double())
    eager = differentiate(dact_TF, gate_TF, up_TF)
    assert_accurate("act", kernels.swiglu(gate_TF, up_TF), eager[2], truth[2])
    results = kernels.swiglu_backward(dact_TF, gate_TF, up_TF)
    for name, *values in zip(("dgate", "dup", "act again"), results, eager, truth, strict=True):
        assert_accurate(name, *values)


def test_reference_has_the_bits_of_the_llama_mlp(dtype, device):
    dact_TF, gate_TF, up_TF = make(63, 200, dtype, device)
    dgate_TF, dup_TF, act_TF = differentiate(dact_TF, gate_TF, up_TF)
    assert torch.equal(reference.swiglu(gate_TF, up_TF), act_TF)
    for result, expected in zip(
        reference.swiglu_backward(dact_TF, gate_TF, up_TF), (dgate_TF, dup_TF, act_TF), strict=True
    ):
        assert torch.equal(result, expected)


def test_recomputed_act_has_the_forwards_bits(dtype, device, kernels: ModuleType):
    dact_TF, gate_TF, up_TF = make(7, 333, dtype, device)
    assert torch.equal(kernels.swiglu_backward(dact_TF, gate_TF, up_TF)[2], kernels.swiglu(gate_TF, up_TF))


def test_inputs_keep_their_values(device, kernels: ModuleType):
    inputs = make(7, 33, torch.float32, device)
    copies = [x.clone() for x in inputs]
    kernels.swiglu(*inputs[1:])
    kernels.swiglu_backward(*inputs)
    for before, after in zip(copies, inputs, strict=True):
        assert torch.equal(before, after)


def test_halves_of_a_packed_projection(device, kernels: ModuleType):
    packed_TG = torch.randn(5, 2 * 2100, device=device)
    gate_TF, up_TF = packed_TG.chunk(2, dim=1)
    dact_TF = torch.randn(2100, 5, device=device).t()
    assert not gate_TF.is_contiguous()
    near = gate_TF.contiguous(), up_TF.contiguous()
    assert_close(kernels.swiglu(gate_TF, up_TF), kernels.swiglu(*near))
    strided = kernels.swiglu_backward(dact_TF, gate_TF, up_TF)
    for result, expected in zip(strided, kernels.swiglu_backward(dact_TF.contiguous(), *near), strict=True):
        assert_close(result, expected)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # NumPy, under the interpreter
def test_extreme_gates(device, kernels: ModuleType):
    """silu is 0 far left and the identity far right, without a NaN from exp's overflow."""
    gate_TF = torch.tensor([[-1e4, -100.0, -0.0, 100.0, 1e4]], device=device)
    ones_TF = torch.ones_like(gate_TF)
    expected_TF = torch.tensor([[0.0, 0.0, 0.0, 100.0, 1e4]], device=device)
    dgate_TF, dup_TF, act_TF = kernels.swiglu_backward(ones_TF, gate_TF, ones_TF)
    assert_close(kernels.swiglu(gate_TF, ones_TF), expected_TF, atol=1e-30, rtol=1e-6)
    assert_close(act_TF, expected_TF, atol=1e-30, rtol=1e-6)
    assert_close(dup_TF, expected_TF, atol=1e-30, rtol=1e-6)
    slopes_TF = torch.tensor([[0.0, 0.0, 0.5, 1.0, 1.0]], device=device)
    assert_close(dgate_TF, slopes_TF, atol=1e-30, rtol=1e-6)


@pytest.mark.parametrize("shape", [(0, 32), (3, 0)])
def test_nothing_to_do(shape, device, kernels: ModuleType):
    empty_TF = torch.zeros(shape, dtype=torch.bfloat16, device=device)
    assert kernels.swiglu(empty_TF, empty_TF).shape == shape
    assert [x.shape for x in kernels.swiglu_backward(empty_TF, empty_TF, empty_TF)] == [shape] * 3


def test_rows_past_two_to_the_31_elements(device, kernels: ModuleType, far_rows):
    gate_TF = far_rows(3, 48, dtype=torch.float16)
    near_TF = gate_TF.contiguous()
    assert_close(kernels.swiglu(gate_TF, near_TF), kernels.swiglu(near_TF, near_TF))
    far = kernels.swiglu_backward(near_TF, near_TF, gate_TF)
    for result, expected in zip(far, kernels.swiglu_backward(near_TF, near_TF, near_TF), strict=True):
        assert_close(result, expected)
