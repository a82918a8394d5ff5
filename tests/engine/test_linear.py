"""One LoRA linear by itself: PEFT's own module is the judge."""

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from fastft import backends, ledger_of, patch_model
from fastft.backends import load_backend
from fastft.models.quantized import is_quantized

TOLERANCE = 5e-5 if torch.cuda.is_available() else 1e-5


class Net(nn.Module):
    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@pytest.fixture
def pair(device: torch.device) -> Callable[..., tuple[Any, Any]]:
    """A module in stock PEFT, and the same patched; both in training mode, with B ≠ 0."""

    def make(
        linear: nn.Module | None = None, dtype: torch.dtype = torch.float32, *, backend: str = "eager", **lora: Any
    ) -> tuple[Any, Any]:
        torch.manual_seed(1)
        base = (linear or nn.Linear(63, 40)).to(dtype)
        config = peft.LoraConfig(**{"r": 5, "lora_alpha": 9, "target_modules": ["linear"], **lora})
        stock = peft.get_peft_model(Net(base), config).to(device).train()
        with torch.no_grad():
            for name, parameter in stock.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.2 * torch.randn(parameter.shape))
        model = copy.deepcopy(stock)
        patch_model(model, backend=backend, strict=True)
        return stock, model

    return make


def run(model: Any, x: Tensor, *, grad_x: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the gradients of everything trained, and of x, for one fixed output gradient."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_(grad_x)
    y = model(x)
    generator = torch.Generator().manual_seed(4)
    y.backward(torch.randn(y.shape, generator=generator).to(y))
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return y.detach(), {**gradients, **({"x": x.grad} if x.grad is not None else {})}


def close(results: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]], rel: float) -> None:
    assert results[0].dtype == expected[0].dtype
    assert results[1].keys() == expected[1].keys()
    for name, right in {"y": expected[0], **expected[1]}.items():
        got = {"y": results[0], **results[1]}[name]
        assert got.dtype == right.dtype, name
        assert got.shape == right.shape, name
        assert (got.double() - right.double()).norm() <= rel * right.double().norm(), name


@pytest.mark.parametrize("grad_x", [True, False])
@pytest.mark.parametrize("shape", [(63,), (1, 63), (2, 3, 63), (0, 63), (2, 1, 5, 63)], ids=str)
@pytest.mark.parametrize(
    "lora", [{}, {"lora_bias": True}, {"bias": "all"}, {"lora_bias": True, "bias": "lora_only"}], ids=str
)
def test_equals_peft(lora, shape, grad_x, pair, device):
    stock, model = pair(**lora)
    x = torch.randn(shape, device=device)
    expected = run(stock, x, grad_x=grad_x)
    assert ("x" in expected[1]) is grad_x
    assert len(expected[1]) == 2 + grad_x + ("bias" in lora) + ("lora_bias" in lora)
    close(run(model, x, grad_x=grad_x), expected, TOLERANCE)
    assert ledger_of(model).counts() == {"linear: fused (eager)": 1}


@pytest.mark.parametrize("grad_x", [True, False])
@pytest.mark.parametrize("shape", [(63,), (2, 3, 63), (0, 63)], ids=str)
def test_triton_equals_peft(shape, grad_x, pair, device):
    stock, model = pair(backend="triton", lora_bias=True)
    x = torch.randn(shape, device=device)
    close(run(model, x, grad_x=grad_x), run(stock, x, grad_x=grad_x), TOLERANCE)
    assert ledger_of(model).counts() == {"linear: fused (triton)": 1}


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_the_backend_makes_the_narrow_gradients(backend, pair, device, monkeypatch):
    calls = []
    operations = load_backend(backend)

    def spy(*arguments: Any) -> Any:
        calls.append(arguments)
        return operations.narrow_gradients(*arguments)

    monkeypatch.setitem(backends._loaded, backend, operations._replace(narrow_gradients=spy))
    _, model = pair(backend=backend)
    run(model, torch.randn(7, 63, device=device))
    assert len(calls) == 1


def test_lora_bias_without_a_bias_of_the_base_layer(pair, device):
    stock, model = pair(nn.Linear(63, 40, bias=False), lora_bias=True)
    x = torch.randn(7, 63, device=device)
    close(run(model, x), run(stock, x), TOLERANCE)


def test_a_weight_that_is_stored_transposed(pair, device):
    """GPT-2's."""
    stock, model = pair(Conv1D(40, 63), fan_in_fan_out=True)
    x = torch.randn(7, 63, device=device)
    close(run(model, x), run(stock, x), TOLERANCE)


def test_inputs_in_any_layout(pair, device):
    stock, model = pair()
    for x in (torch.randn(63, 7, device=device).t(), torch.randn(7, 126, device=device)[:, ::2]):
        close(run(model, x), run(stock, x), TOLERANCE)
    x = torch.randn(3, 63, device=device, requires_grad=True)
    grads = []
    for each in (stock, model):
        each(x).sum().backward()  # a gradient that is one number, expanded
        grads.append(x.grad.clone())
        x.grad = None
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("adapter_dtype", ["fp32", "as the base"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes_are_pefts(base_dtype, autocast, adapter_dtype, pair, device):
    """Outside of autocast stock casts its input to the adapter's dtype, and its output back to the base layer's.

    The values are those under autocast, in the activations' dtype, as everywhere in the engine.
    """
    stock, model = pair(dtype=base_dtype)
    if adapter_dtype != "fp32":
        stock.to(base_dtype)
        model.to(base_dtype)
    for x_dtype in {base_dtype} if not autocast else (torch.float32, torch.bfloat16):
        x = torch.randn(50, 63, device=device).to(x_dtype)
        exact = run(copy.deepcopy(stock).float(), x.float())
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            expected, got = run(stock, x), run(model, x)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast or base_dtype == torch.bfloat16):
            bound = run(stock, x)
        close(got, expected, 0.02 if torch.bfloat16 in (expected[0].dtype, base_dtype) else TOLERANCE)

        def error(result: tuple[Tensor, dict[str, Tensor]], reference: Any = exact) -> float:
            pairs = zip([result[0], *result[1].values()], [reference[0], *reference[1].values()], strict=True)
            return float(sum((a.double() - b.double()).norm() / b.double().norm() for a, b in pairs))

        assert error(got) <= 1.5 * error(bound) + TOLERANCE


def test_an_input_of_another_dtype_is_refused_as_stock_refuses_it(pair, device):
    _, model = pair(dtype=torch.bfloat16)
    patch_model(model, backend="eager")
    with pytest.raises(RuntimeError, match="dtype"):
        model(torch.randn(2, 63, device=device))
    assert "its weight is torch.bfloat16, its input torch.float32" in str(ledger_of(model).counts())


@pytest.mark.parametrize("trained", ["A", "B", "none"])
def test_what_is_frozen_gets_no_gradient(trained, pair, device):
    stock, model = pair()
    for each in (stock, model):
        for name, p in each.named_parameters():
            p.requires_grad_(f"lora_{trained}" in name)
    x = torch.randn(7, 63, device=device)
    expected = run(stock, x)
    assert len(expected[1]) == (1 if trained == "none" else 2)
    close(run(model, x), expected, TOLERANCE)
    with torch.no_grad():
        torch.testing.assert_close(model(x), stock(x))
    assert not model(x).requires_grad or trained != "none"


def test_it_saves_its_input_and_the_narrow_product_only(pair, device):
    _, model = pair(lora_dropout=0.5)
    x = torch.randn(7, 63, device=device, requires_grad=True)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    parameters = {p.data_ptr() for p in model.parameters()}
    activations = [t for t in saved if t.data_ptr() not in parameters]
    assert sorted(t.shape for t in activations) == [(7, 5), (7, 63)]
    assert any(t.data_ptr() == x.data_ptr() for t in activations), "the input itself, no copy"


def test_a_second_backward_and_a_change_in_between(pair, device):
    _, model = pair()
    x = torch.randn(7, 63, device=device, requires_grad=True)
    loss = model(x).square().sum()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert torch.equal(first, second)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, x)


# Dropout


def test_dropout_drops_that_share_and_keeps_the_mean(pair, device):
    """With A = 1 and one row in, the adapter's output is the sum of what was not dropped."""
    _, model = pair(nn.Linear(4000, 1, bias=False), r=1, lora_alpha=1, lora_dropout=0.3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.fill_(1.0 if "lora_" in name else 0.0)
    x = torch.ones(50, 4000, device=device)
    kept = model(x).detach() * 0.7 / 4000
    assert kept.mean().item() == pytest.approx(0.7, abs=0.01)
    assert 0.5 < kept.std().item() / (0.3 * 0.7 / 4000) ** 0.5 < 1.5, "every row has a mask of its own"
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x).detach(), torch.full_like(kept, 4000.0))


def test_the_backward_uses_the_forwards_mask(pair, device):
    """The output is linear in each of x, A and B; so differences are the derivative exactly."""
    _, model = pair(dtype=torch.float64, lora_dropout=0.4)
    model.double()
    x = torch.randn(7, 63, device=device, dtype=torch.float64, requires_grad=True)
    a, b = (next(p for name, p in model.named_parameters() if f"lora_{which}" in name) for which in "AB")

    def forward() -> Tensor:
        torch.manual_seed(11)
        return (model(x) * torch.linspace(-1, 1, 40, device=device, dtype=torch.float64)).sum()

    base = forward()
    gradients = torch.autograd.grad(base, (x, a, b))
    for tensor, gradient in zip((x, a, b), gradients, strict=True):
        step = torch.randn_like(tensor)
        with torch.no_grad():
            tensor.add_(step)
        moved = forward()
        with torch.no_grad():
            tensor.sub_(step)
        assert (moved - base).item() == pytest.approx((gradient * step).sum().item(), rel=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_around_it_repeats_the_masks(reentrant, pair, device):
    _, model = pair(lora_dropout=0.5)
    x = torch.randn(7, 63, device=device, requires_grad=True)
    results = []
    for around in (False, True):
        torch.manual_seed(5)
        model.zero_grad()
        x.grad = None
        y = checkpoint(model, x, use_reentrant=reentrant) if around else model(x)
        torch.manual_seed(99)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == 4
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-6, atol=1e-6)


# Quantized


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("compute", [None, torch.float32, torch.bfloat16], ids=str)
def test_nf4(compute, x_dtype, autocast, device):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(1)
    linear = bitsandbytes.nn.Linear4bit(128, 64, bias=False, quant_type="nf4", compute_dtype=compute)
    try:
        net = Net(linear).to("cpu").to(device)
        _ = linear(torch.zeros(1, 128, device=device, requires_grad=True))
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"bitsandbytes cannot quantize here: {error}")
    linear.compute_dtype, linear.compute_type_is_set = compute, compute is not None
    model = peft.get_peft_model(net, peft.LoraConfig(r=4, target_modules=["linear"])).train()
    assert is_quantized(model.base_model.model.linear.get_base_layer())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.2 * torch.randn(p.shape))
    x = torch.randn(5, 128, device=device).to(x_dtype)
    results = []
    for patched in (False, True):
        if patched:
            patch_model(model, backend="eager", strict=True)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            results.append(run(model, x))
    exactly = not autocast and x_dtype == torch.float32 and compute != torch.bfloat16
    close(results[1], results[0], TOLERANCE if exactly else 0.02)
    assert ledger_of(model).counts() == {"linear: fused (eager)": 1}
