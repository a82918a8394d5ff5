# T tokens, I in, O out, R rank

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fastft.backends import load_backend
from fastft.kernels.dropout import Dropped
from fastft.kernels.lora_linear.reference import (
    ScaledInput,
    a_gradients,
    adapter_terms,
    b_gradients,
    drop,
    input_gradient,
    lora_linear,
    lora_linear_backward,
    low_rank,
    low_rank_gradient,
)

OPERATION = "lora_linear"


class Layer(NamedTuple):
    matrix: Tensor
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None
    scaling: float = 1.5
    dropout: float = 0.0

    def weight(self, dtype: torch.dtype) -> Tensor:
        return self.matrix.to(dtype)


def make_layer(
    inputs: int, outputs: int, rank: int | None, *, bias: bool = False, dropout: float = 0.0,
    adapter: torch.dtype | None = None, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu",
) -> Layer:  # fmt: skip
    def random(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*shape, device=device) / shape[-1] ** 0.5).to(kind)

    a = b = None
    if rank is not None:
        a, b = random(rank, inputs, kind=adapter or dtype), random(outputs, rank, kind=adapter or dtype)
    return Layer(random(outputs, inputs), random(outputs) if bias else None, a, b, 1.5, dropout)


def dropped(x_TI: Tensor, group: list[Layer], seed: int) -> Dropped | None:
    return drop(group, len(x_TI), x_TI.dtype, x_TI.device, seed, load_backend("eager").dropout)


def written_out(x_TI: Tensor, group: list[Layer], seed: int) -> list[Tensor]:
    """y = x·Wᵀ + bias + scaling · (mask ∘ x)·Aᵀ·Bᵀ, one layer after the other."""
    outputs = []
    all_dropped = dropped(x_TI.detach(), group, seed)
    masks = iter([] if all_dropped is None else all_dropped.masks)
    for layer in group:
        y_TO = x_TI @ layer.matrix.to(x_TI.dtype).t()
        if layer.bias is not None:
            y_TO = y_TO + layer.bias.to(x_TI.dtype)
        if layer.a is not None and layer.b is not None:
            dropped_TI = x_TI
            if layer.dropout:
                dropped_TI = x_TI * next(masks)
            y_TO = y_TO + layer.scaling * (dropped_TI @ layer.a.to(x_TI.dtype).t() @ layer.b.to(x_TI.dtype).t())
        outputs.append(y_TO)
    return outputs


GROUPS = {
    "one": [(17, 3)],
    "one without an adapter": [(17, None)],
    "three": [(17, 3), (8, 1), (5, 9)],
    "the second without an adapter": [(17, 3), (8, None), (5, 2)],
    "the first without an adapter": [(17, None), (8, 2)],
    "none with an adapter": [(17, None), (8, None)],
}


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("T", [1, 63])
@pytest.mark.parametrize("shape", GROUPS)
def test_forward_and_every_gradient_equal_autograd(shape, T, bias, dropout, device):
    inputs = 21
    group = [make_layer(inputs, o, r, bias=bias, dropout=dropout, device=device) for o, r in GROUPS[shape]]
    x_TI = torch.randn(T, inputs, dtype=torch.float64, device=device).requires_grad_()
    leaves = [m.requires_grad_() for layer in group for m in (layer.a, layer.b) if m is not None]
    expected = written_out(x_TI, group, seed=5)
    dy = [torch.randn_like(y) for y in expected]
    expected_gradients = torch.autograd.grad(expected, [x_TI, *leaves], dy)

    with torch.no_grad():
        outputs, low_TR = lora_linear(x_TI, group, dropped=dropped(x_TI.detach(), group, 5))
        gradients = lora_linear_backward(dy, x_TI, low_TR, group, dropped=dropped(x_TI.detach(), group, 5))
    assert_close(outputs, expected)
    flat = [m for pair in zip(gradients.da, gradients.db, strict=True) for m in pair]
    assert [m is None for m in flat] == [m is None for layer in group for m in (layer.a, layer.b)]
    assert_close([gradients.dx_TI, *(m for m in flat if m is not None)], list(expected_gradients))
    assert (low_TR is None) == (not leaves)


def test_gradients_equal_finite_differences():
    """With dropout, against the formula itself: autograd of the same masks could share its error."""
    group = [make_layer(4, 3, 2, dropout=0.3), make_layer(4, 2, 1, dropout=0.3)]
    x_TI = torch.randn(5, 4, dtype=torch.float64)
    dy = [torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)]

    def loss() -> float:
        outputs, _ = lora_linear(x_TI, group, dropped=dropped(x_TI, group, 9))
        return float(sum((y * d).sum() for y, d in zip(outputs, dy, strict=True)))

    _, low_TR = lora_linear(x_TI, group, dropped=dropped(x_TI, group, 9))
    gradients = lora_linear_backward(dy, x_TI, low_TR, group, dropped=dropped(x_TI, group, 9))
    tensors = [(x_TI, gradients.dx_TI)]
    for layer, da, db in zip(group, gradients.da, gradients.db, strict=True):
        tensors += [(layer.a, da), (layer.b, db)]
    for tensor, gradient in tensors:
        for index in range(tensor.numel()):
            before = tensor.view(-1)[index].item()
            tensor.view(-1)[index] = before + 1e-5
            above = loss()
            tensor.view(-1)[index] = before - 1e-5
            below = loss()
            tensor.view(-1)[index] = before
            assert (above - below) / 2e-5 == pytest.approx(gradient.reshape(-1)[index].item(), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_adapters_on_16_bit_inputs(dtype, device):
    """PEFT keeps adapters in fp32; their gradients come back in it."""
    group = [make_layer(32, 24, 4, dtype=dtype, adapter=torch.float32, device=device) for _ in range(2)]
    x_TI = torch.randn(19, 32, device=device).to(dtype)
    dy = [torch.randn(19, 24, device=device).to(dtype) for _ in group]
    outputs, low_TR = lora_linear(x_TI, group)
    gradients = lora_linear_backward(dy, x_TI, low_TR, group)
    assert outputs[0].dtype == gradients.dx_TI.dtype == dtype
    leaf_TI = x_TI.double().requires_grad_()
    leaves = [m.double().requires_grad_() for layer in group for m in (layer.a, layer.b)]
    exact = [
        Layer(layer.matrix.double(), None, leaves[2 * index], leaves[2 * index + 1])
        for index, layer in enumerate(group)
    ]
    exact_gradients = torch.autograd.grad(written_out(leaf_TI, exact, 0), [leaf_TI, *leaves], [d.double() for d in dy])
    flat = [m for pair in zip(gradients.da, gradients.db, strict=True) for m in pair]
    for name, got, wanted in zip(["x", "a0", "b0", "a1", "b1"], [gradients.dx_TI, *flat], exact_gradients, strict=True):
        assert got.dtype == (dtype if name == "x" else torch.float32)
        assert (got - wanted).norm() / wanted.norm() < 2e-2, name


def test_nothing_that_was_passed_is_overwritten(device):
    group = [make_layer(8, 6, 2, bias=True, dropout=0.2, device=device) for _ in range(2)]
    x_TI = torch.randn(5, 8, dtype=torch.float64, device=device)
    dy = [torch.randn(5, 6, dtype=torch.float64, device=device) for _ in group]
    held = [x_TI, *dy, *(m for layer in group for m in (layer.matrix, layer.bias, layer.a, layer.b))]
    before = [m.clone() for m in held]
    _, low_TR = lora_linear(x_TI, group, dropped=dropped(x_TI, group, 1))
    low_before = low_TR.clone()
    lora_linear_backward(dy, x_TI, low_TR, group, dropped=dropped(x_TI, group, 1))
    assert_close(held, before, rtol=0, atol=0)
    assert torch.equal(low_TR, low_before)


def test_scaled_inputs_need_not_be_written_out(device):
    """dA from x, and what a norm scales its rows and columns by, is dA from the norm's output."""
    x_TI, rows_T, columns_I = (
        torch.randn(*shape, dtype=torch.float64, device=device) for shape in ((5, 8), (5,), (8,))
    )
    dlow_TR = torch.randn(5, 4, dtype=torch.float64, device=device)
    for p in (0.0, 0.3):
        group = [make_layer(8, 6, 2, dropout=p, device=device) for _ in range(2)]
        masks = dropped(x_TI, group, 1)
        expected = a_gradients(dlow_TR, rows_T[:, None] * x_TI * columns_I, group, masks)
        assert_close(a_gradients(dlow_TR, ScaledInput(x_TI, rows_T, columns_I), group, masks), expected)
    assert a_gradients(dlow_TR, None, group) == [None, None]


def test_terms_left_out_can_be_added_later(device):
    group = [make_layer(8, 6, 2, bias=True, device=device), make_layer(8, 3, None, device=device)]
    x_TI = torch.randn(5, 8, dtype=torch.float64, device=device)
    expected, low_TR = lora_linear(x_TI, group)
    outputs, again_TR = lora_linear(x_TI, group, low_TR=low_TR, left_out=(0, 1))
    assert again_TR is low_TR
    term, none = adapter_terms(low_TR, group)
    assert none is None
    assert_close(outputs[0] + term.scaling * term.low_TR @ term.matrix_RO, expected[0])
    assert_close(outputs[1], expected[1])


def test_the_parts_are_the_whole(device):
    """The engine's MLP backward takes the steps apart; they must give what the whole gives."""
    group = [make_layer(8, 6, 2, dropout=0.2, device=device)]
    x_TI = torch.randn(5, 8, dtype=torch.float64, device=device)
    dy = [torch.randn(5, 6, dtype=torch.float64, device=device)]
    masks = dropped(x_TI, group, 3)
    _, low_TR = lora_linear(x_TI, group, dropped=masks)
    whole = lora_linear_backward(dy, x_TI, low_TR, group, dropped=masks)
    dlow_TR = low_rank_gradient(dy, group)
    assert_close(low_rank(x_TI, group, masks), low_TR)
    assert_close(input_gradient(dy, dlow_TR, group, masks), whole.dx_TI)
    da, db = a_gradients(dlow_TR, x_TI, group, masks), b_gradients(dy, low_TR, group)
    assert_close(da, whole.da)
    assert_close(db, whole.db)


def test_the_mean_over_many_masks_is_the_output_without_dropout():
    plain = make_layer(24, 6, 4)
    dropping = plain._replace(dropout=0.5)
    x_TI = torch.randn(7, 24, dtype=torch.float64)
    (expected,), _ = lora_linear(x_TI, [plain])
    samples = torch.stack(
        [lora_linear(x_TI, [dropping], dropped=dropped(x_TI, [dropping], s))[0][0] for s in range(600)]
    )
    spread = samples.std(0) / 600**0.5
    assert (samples.std(0) > 0).all()
    assert ((samples.mean(0) - expected).abs() < 5 * spread).all()
