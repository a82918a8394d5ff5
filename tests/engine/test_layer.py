"""The engine's decoder layer against stock PEFT's autograd: which modules are adapted and how, dropout, what is saved.

Every family with every placement and form of batch: `test_families.py`.
"""

# B rows, S tokens a row, D model

import copy
import gc
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from fastft import ledger_of, patch_model, unpatch_model
from fastft.adapters.adapted import AdaptedLinear
from fastft.engine import layer as engine_layer
from fastft.engine.saved import SAVED
from fastft.kernels.dropout.reference import dropout_mask
from fastft.kernels.lora_linear import reference as lora_kernels

TOLERANCE = 5e-5 if torch.cuda.is_available() else 1e-5  # ‖g − stock‖ / ‖stock‖ in fp32


def assert_all_fused(model: Any) -> None:
    ledger = ledger_of(model)
    assert ledger is not None
    assert not ledger.fallbacks
    assert len(ledger.paths) == 5


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("attention", ["auto", "flash", "sdpa"])
def test_bf16_on_the_gpu_errs_no_more_than_stock(backend, attention, toy, batch_of, step):
    batch = batch_of("right", B=3, S=63)
    model = toy(base={"dtype": torch.bfloat16})
    _, stock = step(model, batch)
    _, exact = step(copy.deepcopy(model).float(), batch)
    patch_model(model, backend=backend, placement=["light", "mlp", "full"], attention=attention)
    _, fused = step(model, batch)
    assert_all_fused(model)
    flat = {
        key: torch.cat([g[name].flatten().double() for name in exact])
        for key, g in {"stock": stock, "fused": fused, "exact": exact}.items()
    }
    errors = {key: float((g - flat["exact"]).norm() / flat["exact"].norm()) for key, g in flat.items()}
    assert errors["fused"] <= 1.5 * errors["stock"]


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["down_proj"], ["o_proj"], ["k_proj", "up_proj"]], ids=str)
def test_some_targets(targets, toy, batch_of, step, error_of):
    batch = batch_of("right")
    for placement in ("light", "full"):
        model = toy("toy-qwen2", target_modules=targets)
        _, gradients = step(model, batch)
        assert len(gradients) == 3 * 2 * len(targets)
        patch_model(model, backend="eager", placement=placement)
        _, fused = step(model, batch)
        assert error_of(fused, gradients) < TOLERANCE


def test_some_layers(toy, batch_of, step, error_of):
    batch = batch_of("left")
    model = toy(layers_to_transform=[1])
    _, gradients = step(model, batch)
    assert all(".layers.1." in name for name in gradients)
    patch_model(model, backend="eager", placement=["keep", "light", "mlp"])
    _, fused = step(model, batch)
    assert error_of(fused, gradients) < TOLERANCE


@pytest.mark.parametrize("lora", [{"r": 1}, {"r": 8}, {"r": 64, "use_rslora": True, "lora_alpha": 16}], ids=str)
def test_ranks_and_scalings(lora, toy, batch_of, step, error_of):
    batch = batch_of("none")
    model = toy(**lora)
    _, gradients = step(model, batch)
    patch_model(model, backend="eager", placement="mlp")
    _, fused = step(model, batch)
    assert error_of(fused, gradients) < TOLERANCE


def test_different_ranks_and_scalings_in_one_group(toy, batch_of, step, error_of):
    batch = batch_of("none")
    model = toy(rank_pattern={"k_proj": 1, "up_proj": 9}, alpha_pattern={"q_proj": 3, "gate_proj": 1})
    _, gradients = step(model, batch)
    patch_model(model, backend="eager", placement="full")
    _, fused = step(model, batch)
    assert error_of(fused, gradients) < TOLERANCE


def test_llama_with_biases_everywhere(toy, batch_of, step, error_of):
    batch = batch_of("right")
    model = toy(base={"attention_bias": True, "mlp_bias": True})
    _, gradients = step(model, batch)
    patch_model(model, backend="eager", placement=["light", "mlp", "full"], strict=True)
    _, fused = step(model, batch)
    assert error_of(fused, gradients) < TOLERANCE


def test_scaled_rope_and_a_head_size_that_is_not_hidden_over_heads(toy, batch_of, step, error_of):
    batch = batch_of("left")
    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }  # fmt: skip
    model = toy(base={"head_dim": 40, "rope_parameters": rope})
    _, gradients = step(model, batch)
    patch_model(model, backend="eager", placement="full", strict=True)
    _, fused = step(model, batch)
    assert error_of(fused, gradients) < TOLERANCE


@pytest.mark.parametrize("length", [1, 63])
def test_one_token_and_63(length, toy, batch_of, step, error_of):
    batch = batch_of("none", B=2, S=length)
    batch["shift_labels"] = batch["input_ids"]
    model = toy()
    _, gradients = step(model, batch, items=7)
    patch_model(model, backend="eager", placement="light", strict=True)
    _, fused = step(model, batch, items=7)
    # With one token, attention is constant: the gradients of q and k are zero, up to rounding.
    if length == 1:
        for name in list(gradients):
            if "q_proj" in name or "k_proj" in name:
                assert fused.pop(name).abs().max() < 1e-6
                del gradients[name]
    assert error_of(fused, gradients) < TOLERANCE


class _Products(TorchFunctionMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.mm, torch.addmm, torch.Tensor.addmm_):
            self.count += 1
        return function(*args, **(kwargs or {}))


def test_the_backward_stops_at_the_first_adapted_layer(toy, batch_of, monkeypatch):
    calls = []
    original = engine_layer._attention_backward

    def spy(*args: Any) -> Any:
        calls.append(args[-1])
        return original(*args)

    monkeypatch.setattr(engine_layer, "_attention_backward", spy)
    batch = batch_of("none")
    model = toy(layers_to_transform=[1, 2])
    device = next(model.parameters()).device
    patch_model(model, backend="eager")
    model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss.backward()
    assert calls == [True, False], "layers 2 and 1 run, layer 0 does not, and layer 1 makes no input gradient"
    assert model.get_base_model().model.embed_tokens.weight.grad is None


def test_no_input_gradient_saves_its_products(toy):
    model = toy()
    x_TI = torch.randn(5, 64, device=next(model.parameters()).device)
    group = [
        AdaptedLinear(torch.nn.Linear(64, 8), None, torch.randn(2, 64), torch.randn(8, 2), 1.0, 0.0) for _ in range(3)
    ]
    x_TI = x_TI.cpu()
    dy = [torch.randn(5, 8) for _ in group]
    low_TR = lora_kernels.low_rank(x_TI, group)
    counts = []
    with torch.no_grad():
        for needs_dx in (True, False):
            with _Products() as products:
                gradients = lora_kernels.lora_linear_backward(dy, x_TI, low_TR, group, needs_dx=needs_dx)
            assert (gradients.dx_TI is not None) == needs_dx
            counts.append(products.count)
    assert counts[0] - counts[1] == 4, "three products with W and one with the stacked A"


def test_an_input_that_requires_a_gradient_gets_one(toy, batch_of, step):
    """As with `enable_input_require_grads`, or a trained soft prompt."""
    batch = batch_of("right")
    inputs = []
    for backend in (None, "eager"):
        model = toy()
        device = next(model.parameters()).device
        if backend:
            patch_model(model, backend=backend, placement="full", strict=True)
        embeds = model.get_input_embeddings()(batch["input_ids"].to(device)).detach().requires_grad_()
        kept = {name: batch[name].to(device) for name in ("attention_mask", "labels")}
        model(inputs_embeds=embeds, **kept).loss.backward()
        inputs.append(embeds.grad[kept["attention_mask"] == 1])
    assert (inputs[1] - inputs[0]).norm() < TOLERANCE * inputs[0].norm()


@pytest.mark.parametrize("policy", ["keep", "full"])
def test_backward_twice_doubles_the_gradients(policy, toy, batch_of, error_of):
    """Nothing saved may be overwritten by the first backward."""
    model = toy("toy-qwen2")
    patch_model(model, backend="eager", placement=policy)
    device = next(model.parameters()).device
    loss = model(**{name: tensor.to(device) for name, tensor in batch_of("left").items()}).loss
    loss.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    loss.backward()
    twice = {name: p.grad / 2 for name, p in model.named_parameters() if p.grad is not None}
    assert error_of(twice, once) < 1e-7


@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_somebody_elses_checkpoint(reentrant, toy, batch_of, step, error_of):
    batch = batch_of("none")  # padding that is left out would draw another mask
    model = toy(lora_dropout=0.3)
    patch_model(model, backend="eager", placement="light")
    torch.manual_seed(5)
    loss, gradients = step(model, batch)
    for layer in model.get_base_model().model.layers:
        inner = layer.forward

        def wrapped(hidden: Tensor, _inner: Any = inner, **kwargs: Any) -> Tensor:
            return checkpoint(lambda h: _inner(h, **kwargs), hidden.requires_grad_(), use_reentrant=reentrant)

        layer.__dict__["forward"] = wrapped
    torch.manual_seed(5)
    again_loss, again = step(model, batch)
    assert again_loss == pytest.approx(loss, rel=1e-5)
    assert error_of(again, gradients) < 1e-6


@pytest.mark.parametrize("policy", ["light", "mlp", "full"])
def test_recomputation_repeats_the_dropout(policy, toy, batch_of, step, error_of):
    batch = batch_of("right")
    results = []
    for placement in ("keep", policy):
        model = toy(lora_dropout=0.4)
        patch_model(model, backend="eager", placement=placement)
        torch.manual_seed(7)
        results.append(step(model, batch, 2))
    (loss, gradients), (other_loss, other) = results
    assert other_loss == pytest.approx(loss, rel=1e-5)
    assert error_of(other, gradients) < TOLERANCE


def test_dropout_differs_from_step_to_step_and_follows_the_seed(toy, batch_of, step):
    batch = batch_of("none")
    model = toy(lora_dropout=0.4)
    patch_model(model, backend="eager")
    torch.manual_seed(7)
    first, second = step(model, batch)[0], step(model, batch)[0]
    torch.manual_seed(7)
    assert step(model, batch)[0] == first != second


def test_no_dropout_in_eval_mode(toy, batch_of):
    model = toy(lora_dropout=0.4)
    device = next(model.parameters()).device
    ids_BS = batch_of("none")["input_ids"].to(device)
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=ids_BS, use_cache=False).logits
        patch_model(model, backend="eager")
        torch.testing.assert_close(model(input_ids=ids_BS, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)
    assert_all_fused(model)


def test_dropout_follows_the_mode_of_its_own_module(toy, batch_of, step):
    """Someone may put the dropout alone into eval mode."""
    batch = batch_of("none")
    model = toy(lora_dropout=0.4)
    for name, module in model.named_modules():
        if "lora_dropout" in name:
            module.eval()
    loss, _ = step(model, batch)
    patch_model(model, backend="eager")
    assert step(model, batch)[0] == pytest.approx(loss, rel=1e-5)


def test_gradients_with_dropout_equal_autograd_of_the_written_out_layer(toy):
    """One layer as a composition of plain operations, with the masks that the engine draws."""
    model = toy(lora_dropout=0.4)
    device = next(model.parameters()).device
    patch_model(model, backend="eager", placement="full")
    backbone = model.get_base_model().model
    layer = backbone.layers[0]
    x_BSD = torch.randn(2, 9, 64, device=device)
    positions = backbone.rotary_emb(x_BSD, torch.arange(9, device=device)[None])
    dy_BSD = torch.randn_like(x_BSD)
    torch.manual_seed(11)
    y_BSD = layer(x_BSD, position_embeddings=positions)
    y_BSD.backward(dy_BSD)
    fused = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}

    torch.manual_seed(11)
    seed = int(torch.randint(2**62, ()).item())
    model.zero_grad()
    unpatch_model(model)
    order = {
        "q_proj": 0, "k_proj": 1, "v_proj": 2, "o_proj": 3, "gate_proj": 4, "up_proj": 5, "down_proj": 6,
    }  # fmt: skip

    class Mask(torch.nn.Module):
        def __init__(self, offset: int) -> None:
            super().__init__()
            self.offset = offset

        def forward(self, x: Tensor) -> Tensor:
            shape = x.numel() // x.shape[-1], x.shape[-1]
            return x * dropout_mask(shape, 0.4, seed + self.offset, x.dtype, x.device).view_as(x)

    for block in (layer.self_attn, layer.mlp):
        for name, module in block.named_children():
            if name in order:
                module.lora_dropout["default"] = Mask(order[name])
    expected_BSD = layer(x_BSD, position_embeddings=positions)
    torch.testing.assert_close(y_BSD, expected_BSD, rtol=1e-5, atol=1e-5)
    expected_BSD.backward(dy_BSD)
    for name, parameter in layer.named_parameters():
        if parameter.grad is not None:
            error = (fused[name] - parameter.grad).norm() / parameter.grad.norm()
            assert error < TOLERANCE, name


@pytest.mark.parametrize("placement", ["light", "full"])
def test_a_scaled_gradient_of_small_hidden_values_stays_finite_in_fp16(placement, toy):
    """The norm multiplies such values by nearly 1,000; so large a factor may not meet the scaled loss's gradient."""
    model = toy(base={"dtype": torch.float16})
    exact = copy.deepcopy(model).double()
    patch_model(model, backend="eager", placement=placement)
    x_BSD = 1e-3 * torch.randn(2, 9, 64)
    dy_BSD = 300 * torch.randn(2, 9, 64)
    gradients = []
    for one, dtype in ((model, torch.float16), (exact, torch.float64)):
        backbone = one.get_base_model().model
        device = next(one.parameters()).device
        x, dy = (t.half().to(device, dtype) for t in (x_BSD, dy_BSD))
        positions = backbone.rotary_emb(x, torch.arange(9, device=device)[None])
        backbone.layers[0](x, position_embeddings=positions).backward(dy)
        gradients.append({name: p.grad for name, p in backbone.layers[0].named_parameters() if p.grad is not None})
    fused, expected = gradients
    assert fused.keys() == expected.keys()
    rstd = (x_BSD.square().mean(-1) + 1e-6).rsqrt().max()
    for name, gradient in expected.items():
        assert (fused[name].double() - gradient).norm() < 1e-2 * gradient.norm(), (name, float(rstd))


def test_what_the_policies_save():
    assert SAVED["full"] < SAVED["mlp"] < SAVED["light"] < SAVED["keep"]
    assert {name for name in SAVED["full"] if not name.startswith("low_")} == {"x"}


def _saved_bytes(model: Any, batch: dict[str, Tensor], placement: Any) -> int:
    """Bytes of all tensors that the forward leaves alive for the backward."""
    patch_model(model, backend="eager", placement=placement)
    device = next(model.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in batch.items()}
    gc.collect()
    before = {t.untyped_storage().data_ptr() for t in _alive()}
    loss = model(**inputs).loss
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _alive()}
    loss.backward()
    return sum(size for pointer, size in storages.items() if pointer not in before)


def _alive() -> list[Tensor]:
    """Tensors that have memory: what torch.compile traced with in an earlier test has none."""
    things = [thing for thing in gc.get_objects() if isinstance(thing, Tensor)]
    return [thing for thing in things if not isinstance(thing, FakeTensor)]


def test_each_policy_saves_less_than_the_one_before(toy, batch_of):
    model = toy("toy-qwen3")  # with norms of heads, behind which `keep` keeps what `light` does not
    batch = batch_of("none")
    sizes = [_saved_bytes(model, batch, policy) for policy in ("keep", "light", "mlp", "full")]
    assert all(more > less for more, less in pairwise(sizes))
    assert sizes[-1] < sizes[0] / 4
    mixed = _saved_bytes(model, batch, ["keep", "full", "full"])
    assert sizes[-1] < mixed < sizes[0]


def test_a_placement_of_one_layer_changes_that_layer_only(toy, batch_of):
    """Against a placement list read the wrong way round: the first and the last layer are the same size."""
    model = toy(layers_to_transform=[2])
    batch = batch_of("none")
    only_last_matters = [_saved_bytes(model, batch, p) for p in (["keep", "keep", "full"], ["full", "full", "keep"])]
    assert only_last_matters[0] < only_last_matters[1]


def test_a_retained_graph_keeps_what_triton_would_overwrite(toy, batch_of):
    model = toy()
    patch_model(model, backend="triton", placement=["light", "keep", "mlp"])
    device = next(model.parameters()).device
    loss = model(**{name: t.to(device) for name, t in batch_of("none", B=1, S=7).items()}).loss
    loss.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    loss.backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, 2 * once[name])
