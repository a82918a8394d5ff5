# T tokens, F feed-forward width

from importlib import import_module
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers.activations import ACT2FN

from fastft.kernels.activation import ActivationKind, reference

OPERATION = "activation"
SHAPES = [(1, 1), (63, 100), (1000, 63), (1, 4099)]
HUGGING_FACE: dict[ActivationKind, str] = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")


@pytest.fixture(params=HUGGING_FACE)
def kind(request: pytest.FixtureRequest) -> ActivationKind:
    return request.param


def make(T: int, F: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    dact_TF, gate_TF, up_TF = (torch.randn(T, F, device=device) for _ in range(3))
    return dact_TF.to(dtype), (3 * gate_TF).to(dtype), up_TF.to(dtype)


def differentiate(
    kind: ActivationKind, dact_TF: Tensor, gate_TF: Tensor, up_TF: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    leaves = [x.detach().requires_grad_() for x in (gate_TF, up_TF) if x is not None]
    act_TF = ACT2FN[HUGGING_FACE[kind]](leaves[0])
    if up_TF is not None:
        act_TF = act_TF * leaves[1]
    dgate_TF, *dup = torch.autograd.grad(act_TF, leaves, dact_TF)
    return dgate_TF, dup[0] if dup else None, act_TF.detach()


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize(("T", "F"), SHAPES)
def test_forward_and_gradients_against_fp64(T, F, gated, kind, dtype, device, kernels, assert_accurate):
    dact_TF, gate_TF, up_TF = make(T, F, dtype, device)
    if not gated:
        up_TF = None
        if dtype == torch.bfloat16 and kernels.__name__.endswith("triton") and device.type == "cpu":
            pytest.skip("far right gelu(x) is x, where eager rounds right and the interpreter cuts off one place")
    truth = differentiate(kind, dact_TF.double(), gate_TF.double(), None if up_TF is None else up_TF.double())
    eager = differentiate(kind, dact_TF, gate_TF, up_TF)
    assert_accurate("act", kernels.activate(gate_TF, up_TF, kind), eager[2], truth[2])
    results = kernels.activate_backward(dact_TF, gate_TF, up_TF, kind)
    for name, result, *others in zip(("dgate", "dup", "act again"), results, eager, truth, strict=True):
        assert (result is None) == (name == "dup" and not gated)
        if result is not None:
            assert_accurate(name, result, *others)


def test_reference_has_the_bits_of_hugging_faces_mlp(kind, dtype, device):
    dact_TF, gate_TF, up_TF = make(63, 200, dtype, device)
    expected = differentiate(kind, dact_TF, gate_TF, up_TF)
    assert torch.equal(reference.activate(gate_TF, up_TF, kind), expected[2])
    for result, other in zip(reference.activate_backward(dact_TF, gate_TF, up_TF, kind), expected, strict=True):
        assert torch.equal(result, other)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
def test_recomputed_act_has_the_forwards_bits(gated, kind, dtype, device, kernels: ModuleType):
    dact_TF, gate_TF, up_TF = make(7, 333, dtype, device)
    up = up_TF if gated else None
    assert torch.equal(kernels.activate_backward(dact_TF, gate_TF, up, kind)[2], kernels.activate(gate_TF, up, kind))


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
def test_inputs_keep_their_values(gated, kind, device, kernels: ModuleType):
    inputs = make(7, 33, torch.float32, device)
    copies = [x.clone() for x in inputs]
    dact_TF, gate_TF, up_TF = inputs
    up = up_TF if gated else None
    kernels.activate(gate_TF, up, kind)
    kernels.activate_backward(dact_TF, gate_TF, up, kind)
    for before, after in zip(copies, inputs, strict=True):
        assert torch.equal(before, after)


def test_halves_of_a_packed_projection(kind, device, kernels: ModuleType):
    packed_TG = torch.randn(5, 2 * 2100, device=device)
    gate_TF, up_TF = packed_TG.chunk(2, dim=1)
    dact_TF = torch.randn(2100, 5, device=device).t()
    assert not gate_TF.is_contiguous()
    near = gate_TF.contiguous(), up_TF.contiguous()
    assert_close(kernels.activate(gate_TF, up_TF, kind), kernels.activate(*near, kind))
    strided = kernels.activate_backward(dact_TF, gate_TF, up_TF, kind)
    expected = kernels.activate_backward(dact_TF.contiguous(), *near, kind)
    for result, other in zip(strided, expected, strict=True):
        assert_close(result, other)


def test_gradients_go_where_they_are_asked_to(kind, device, kernels: ModuleType):
    dact_TF, gate_TF, up_TF = make(5, 2100, torch.float32, device)
    expected = kernels.activate_backward(dact_TF, gate_TF, up_TF, kind)
    packed_TG = torch.empty(5, 2 * 2100, device=device)
    halves = packed_TG.chunk(2, dim=1)
    dgate_TF, dup_TF, act_TF = kernels.activate_backward(dact_TF, gate_TF, up_TF, kind, halves)
    assert dgate_TF.data_ptr() == packed_TG.data_ptr()
    assert_close(packed_TG, torch.cat(expected[:2], dim=1))
    assert_close(dup_TF, halves[1])
    assert_close(act_TF, expected[2])


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # NumPy, under the interpreter
def test_extreme_gates(kind, device, kernels: ModuleType):
    """The activation is 0 far left and the identity far right, without a NaN from exp's overflow."""
    gate_TF = torch.tensor([[-1e4, -100.0, -0.0, 100.0, 1e4]], device=device)
    ones_TF = torch.ones_like(gate_TF)
    expected_TF = torch.tensor([[0.0, 0.0, 0.0, 100.0, 1e4]], device=device)
    dgate_TF, dup_TF, act_TF = kernels.activate_backward(ones_TF, gate_TF, ones_TF, kind)
    assert_close(kernels.activate(gate_TF, ones_TF, kind), expected_TF, atol=1e-30, rtol=1e-6)
    assert_close(act_TF, expected_TF, atol=1e-30, rtol=1e-6)
    assert_close(dup_TF, expected_TF, atol=1e-30, rtol=1e-6)
    slopes_TF = torch.tensor([[0.0, 0.0, 0.5, 1.0, 1.0]], device=device)
    assert_close(dgate_TF, slopes_TF, atol=1e-30, rtol=1e-6)


@pytest.mark.parametrize("shape", [(0, 32), (3, 0)])
def test_nothing_to_do(shape, kind, device, kernels: ModuleType):
    empty_TF = torch.zeros(shape, dtype=torch.bfloat16, device=device)
    assert kernels.activate(empty_TF, empty_TF, kind).shape == shape
    assert [x.shape for x in kernels.activate_backward(empty_TF, empty_TF, empty_TF, kind)] == [shape] * 3


def test_rows_past_two_to_the_31_elements(device, kernels: ModuleType, far_rows):
    gate_TF = far_rows(3, 48, dtype=torch.float16)
    near_TF = gate_TF.contiguous()
    assert_close(kernels.activate(gate_TF, near_TF, "silu"), kernels.activate(near_TF, near_TF, "silu"))
    far = kernels.activate_backward(near_TF, near_TF, gate_TF, "silu")
    for result, expected in zip(far, kernels.activate_backward(near_TF, near_TF, near_TF, "silu"), strict=True):
        assert_close(result, expected)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("gated", [True, False])
def test_overwriting_gives_the_same_bits(gated, kind, implementation, device):
    """And Triton's results are where its inputs were."""
    function = import_module(f"fastft.kernels.activation.{implementation}").activate_backward
    dact, gate, up = (torch.randn(5, 37, device=device) for _ in range(3))
    up = up if gated else None
    expected = function(dact.clone(), gate.clone(), None if up is None else up.clone(), kind)
    results = function(dact, gate, up, kind, overwrite=True)
    for result, wanted in zip(results, expected, strict=True):
        assert (result is None) == (wanted is None)
        assert result is None or torch.equal(result, wanted)
    if implementation == "triton":
        assert [r.data_ptr() for r in results if r is not None] == [
            t.data_ptr() for t in (gate, up, dact) if t is not None
        ]
