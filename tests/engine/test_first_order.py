"""Derivatives that the engine has not are an error, and those that were spoilt in between: never missing, never wrong.

First derivatives of every kind: `faithful/test_derivatives.py`.
"""

# B rows, S tokens a row, D model

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import functional
from torch.func import functional_call

from fastft import ledger_of, patch_model
from fastft.engine.first_order import path_to

TOLERANCE = 5e-5 if torch.cuda.is_available() else 1e-5
IN_PLACE = "modified by an inplace operation"
FAMILIES = ["toy-llama", "generic"]
"""Fused layers, and fused parts of layers that are stock's."""

Toy = Callable[..., Any]
Given = dict[str, Tensor]


@pytest.fixture
def pair(toy: Toy) -> Callable[..., tuple[Any, Any]]:
    """A stock and a patched model, with attention that stock can differentiate twice."""

    def make(family: str = "toy-llama", attention: str = "eager", **lora: Any) -> tuple[Any, Any]:
        models = []
        for fused in (False, True):
            model = toy("toy-llama", base={"attn_implementation": attention, "num_hidden_layers": 2}, **lora)
            if fused:
                patch_model(model, backend="eager")
                if family == "generic":
                    _by_parts(model)
            models.append(model)
        return models[0], models[1]

    return make


def _by_parts(model: Any) -> None:
    """Let stock's loop and layers run, with fused linears and norms in them."""
    for layer in model.get_base_model().model.layers:
        layer.forward = type(layer).forward.__get__(layer)


@pytest.fixture
def given(device: torch.device) -> Given:
    ids_BS = torch.randint(3, 512, (2, 9), generator=torch.Generator().manual_seed(2)).to(device)
    return {"input_ids": ids_BS, "labels": ids_BS}


@pytest.fixture
def embeds(device: torch.device) -> Tensor:
    return torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(3)).to(device)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def gradients(model: nn.Module, **given: Any) -> list[Tensor]:
    found = torch.autograd.grad(model(**given).loss, trained(model), create_graph=True)
    return list(found)


def squares(tensors: list[Tensor]) -> Tensor:
    return torch.stack([t.square().sum() for t in tensors]).sum()


def assert_close(found: Any, expected: Any) -> None:
    found, expected = ([t] if isinstance(t, Tensor) else list(t) for t in (found, expected))
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert b.norm() > 0, "a gradient of zero proves nothing"
        assert (a - b).norm() <= TOLERANCE * b.norm()


# Second derivatives


def _functional(name: str) -> Callable[[Any, Given, Tensor], Any]:
    def ask(model: Any, given: Given, embeds: Tensor) -> Any:
        path, value = next((n, p) for n, p in model.named_parameters() if p.requires_grad)

        def loss(matrix: Tensor) -> Tensor:
            output: Tensor = functional_call(model, {path: matrix}, (), given).loss
            return output

        more = () if name == "hessian" else (value.detach(),)
        return getattr(functional, name)(loss, value, *more)

    return ask


def _of_a_penalty(model: Any, given: Given, embeds: Tensor) -> Any:
    found = torch.autograd.grad(squares(gradients(model, **given)), trained(model), allow_unused=True)
    assert all(g is not None for g in found)
    return found


def _of_a_penalty_for_some(model: Any, given: Given, embeds: Tensor) -> Any:
    squares(gradients(model, **given)).backward(inputs=trained(model)[:3])
    return [p.grad for p in trained(model)[:3]]


def _of_a_penalty_of_the_last_layer(model: Any, given: Given, embeds: Tensor) -> Any:
    return torch.autograd.grad(squares(gradients(model, **given)[-4:]), trained(model)[:2], allow_unused=True)


def _of_saliency(model: Any, given: Given, embeds: Tensor) -> Any:
    embeds.requires_grad_()
    loss = model(inputs_embeds=embeds, labels=given["labels"]).loss
    (found,) = torch.autograd.grad(loss, embeds, create_graph=True)
    return torch.autograd.grad(found.square().sum(), embeds)


def _of_adapters_by_embeddings(model: Any, given: Given, embeds: Tensor) -> Any:
    embeds.requires_grad_()
    found = gradients(model, inputs_embeds=embeds, labels=given["labels"])
    return torch.autograd.grad(found[0].square().sum(), embeds, allow_unused=True)


def _by_the_losss_weight(model: Any, given: Given, embeds: Tensor) -> Any:
    weight = torch.tensor(0.3, device=embeds.device, requires_grad=True)
    found = torch.autograd.grad(weight * model(**given).loss, trained(model), create_graph=True)
    return torch.autograd.grad(squares(list(found)), weight, allow_unused=True)


def _of_logits(model: Any, given: Given, embeds: Tensor) -> Any:
    loss = model(given["input_ids"]).logits.square().mean()
    found = torch.autograd.grad(loss, trained(model), create_graph=True)
    return torch.autograd.grad(squares(list(found)), trained(model), allow_unused=True)


SECOND: dict[str, Callable[[Any, Given, Tensor], Any]] = {
    **{name: _functional(name) for name in ("hvp", "vhp", "hessian", "jvp")},
    "penalty": _of_a_penalty,
    "penalty for some": _of_a_penalty_for_some,
    "penalty of the last layer's gradients": _of_a_penalty_of_the_last_layer,
    "saliency": _of_saliency,
    "adapters' gradients by the embeddings": _of_adapters_by_embeddings,
    "by the loss's weight": _by_the_losss_weight,
    "of logits": _of_logits,
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("derivative", SECOND)
def test_a_second_derivative_is_an_error_not_wrong(
    derivative: str, family: str, pair: Callable[..., tuple[Any, Any]], given: Given, embeds: Tensor
) -> None:
    stock, fused = pair(family, r=1, target_modules=["q_proj", "down_proj"])
    expected = SECOND[derivative](stock, given, embeds.clone())
    for each in [expected] if isinstance(expected, Tensor) else expected:
        assert each.norm() > 0, "it is one that stock has"
    with pytest.raises(RuntimeError, match="first derivatives only"):
        SECOND[derivative](fused, given, embeds.clone())


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_with_a_graph_are_tensors_of_their_own(
    family: str, pair: Callable[..., tuple[Any, Any]], given: Given
) -> None:
    """Changed in place, clipped, accumulated, and stepped with, as stock's."""
    found = []
    for model in pair(family):
        changed = gradients(model, **given)
        changed[0].mul_(2)
        model(**given).loss.backward(create_graph=True)
        nn.utils.clip_grad_norm_(trained(model), 0.1)
        model(**given).loss.backward()
        found.append([t.detach() for t in changed] + [p.grad.detach() for p in trained(model) if p.grad is not None])
    assert_close(found[1], found[0])


def test_a_gradient_without_a_graph_has_none(pair: Callable[..., tuple[Any, Any]], given: Given) -> None:
    _, model = pair()
    found = torch.autograd.grad(model(**given).loss, trained(model))
    assert not any(g.requires_grad for g in found)


def test_a_path_keeps_nothing_and_is_one() -> None:
    x_TD = torch.randn(5, 3, requires_grad=True) * 2
    with torch.no_grad():
        path = path_to(x_TD)
    assert path is not None
    assert path.untyped_storage().nbytes() == 0
    (gradient,) = torch.autograd.grad(path.sum(), x_TD)
    assert torch.equal(gradient, torch.zeros_like(x_TD))
    assert path_to(x_TD.detach()) is None


# Several gradients at once


def _batched(model: Any, given: Given, embeds: Tensor) -> Any:
    loss = model(**given).loss
    return torch.autograd.grad(loss, trained(model), torch.ones(3, device=loss.device), is_grads_batched=True)


def _batched_tokens(model: Any, given: Given, embeds: Tensor) -> Any:
    logits = model(given["input_ids"]).logits[0, -1, :4]
    return torch.autograd.grad(logits, trained(model), torch.eye(4, device=logits.device), is_grads_batched=True)


def _vectorized(model: Any, given: Given, embeds: Tensor) -> Any:
    return functional.jacobian(lambda x: model(inputs_embeds=x).logits[0, -1, :4], embeds, vectorize=True)


def _mapped(model: Any, given: Given, embeds: Tensor) -> Any:
    loss = model(**given).loss
    one = lambda v: torch.autograd.grad(loss, trained(model), v, retain_graph=True)  # noqa: E731
    return torch.vmap(one)(torch.ones(3, device=loss.device))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ask", [_batched, _batched_tokens, _vectorized, _mapped])
def test_several_gradients_at_once_are_an_error(
    ask: Callable[..., Any], family: str, pair: Callable[..., tuple[Any, Any]], given: Given, embeds: Tensor
) -> None:
    stock, fused = pair(family)
    ask(stock, given, embeds)
    with pytest.raises(RuntimeError, match="one gradient at a time"):
        ask(fused, given, embeds)


def test_a_jacobian_row_by_row_is_stocks(pair: Callable[..., tuple[Any, Any]], embeds: Tensor) -> None:
    found = [functional.jacobian(lambda x, m=m: m(inputs_embeds=x).logits[0, -1, :4], embeds) for m in pair()]
    assert_close(found[1], found[0])


# What the backward reads and the caller may change


def _refilled(model: Any, given: Given, embeds: Tensor) -> None:
    loss = model(inputs_embeds=embeds, labels=given["labels"]).loss
    embeds.mul_(-1)
    loss.backward()


def _refilled_for_another(model: Any, given: Given, embeds: Tensor) -> None:
    loss = model(inputs_embeds=embeds, labels=given["labels"]).loss
    embeds.copy_(embeds.flip(1))
    (loss + model(inputs_embeds=embeds, labels=given["labels"].flip(1)).loss).backward()


def _by_a_hook(model: Any, given: Given, embeds: Tensor) -> None:
    handle = model.get_input_embeddings().register_forward_hook(lambda module, args, output: embeds.copy_(output))
    first = model(**given).loss
    flipped = {name: tensor.flip(0).flip(1) for name, tensor in given.items()}
    (first + model(**flipped).loss).backward()
    handle.remove()


def _by_an_embedding_of_ones_own(model: Any, given: Given, embeds: Tensor) -> None:
    embedding = model.get_input_embeddings()
    inner = embedding.forward
    embedding.forward = lambda ids: embeds.copy_(inner(ids))
    first = model(**given).loss
    flipped = {name: tensor.flip(0).flip(1) for name, tensor in given.items()}
    (first + model(**flipped).loss).backward()


REFILLED = [_refilled, _refilled_for_another, _by_a_hook, _by_an_embedding_of_ones_own]


@pytest.mark.parametrize("placement", ["light", "offload"])
@pytest.mark.parametrize("refill", REFILLED)
def test_a_buffer_of_the_callers_may_be_filled_anew(
    refill: Callable[..., None], placement: Any, toy: Toy, given: Given, embeds: Tensor
) -> None:
    """Stock's backward reads nothing of it."""
    found = []
    for fused in (False, True):
        model = toy(base={"num_hidden_layers": 2})
        if fused:
            patch_model(model, backend="eager", placement=placement)
        refill(model, given, embeds.clone())
        found.append([p.grad for p in trained(model)])
    assert_close(found[1], found[0])
    assert not ledger_of(model).fallbacks  # type: ignore[union-attr]


@pytest.mark.parametrize("refill", REFILLED)
def test_a_buffer_of_the_callers_may_be_filled_anew_where_layers_run_one_by_one(
    refill: Callable[..., None], pair: Callable[..., tuple[Any, Any]], given: Given, embeds: Tensor
) -> None:
    found = []
    for model in pair():
        model.get_base_model().model.layers[1].register_forward_hook(lambda *_: None)
        refill(model, given, embeds.clone())
        found.append([p.grad for p in trained(model)])
    assert_close(found[1], found[0])


def _spoil_embeddings(model: Any, given: Given, embeds: Tensor) -> Any:
    x_BSD = embeds.requires_grad_() * 1
    return model(inputs_embeds=x_BSD, labels=given["labels"]).loss, x_BSD


def _spoil_mask(model: Any, given: Given, embeds: Tensor) -> Any:
    S = embeds.shape[1]
    mask = torch.full((2, 1, S, S), -1e30, device=embeds.device).triu(1)
    return model(**given, attention_mask=mask).loss, mask


def _spoil_count(model: Any, given: Given, embeds: Tensor) -> Any:
    items = torch.tensor(20.0, device=embeds.device)
    return model(**given, num_items_in_batch=items).loss, items


def _spoil_weight(path: str) -> Callable[..., Any]:
    def spoil(model: Any, given: Given, embeds: Tensor) -> Any:
        return model(**given).loss, model.get_base_model().get_parameter(path)

    return spoil


SPOILT: dict[str, Callable[[Any, Given, Tensor], Any]] = {
    "embeddings": _spoil_embeddings,
    "mask": _spoil_mask,
    "number of targets": _spoil_count,
    "base weight": _spoil_weight("model.layers.0.mlp.up_proj.base_layer.weight"),
    "norm weight": _spoil_weight("model.layers.1.input_layernorm.weight"),
    "adapter": _spoil_weight("model.layers.1.self_attn.v_proj.lora_B.default.weight"),
}
WAYS = {"at once": lambda model: None, "one by one": lambda model: _watch_a_layer(model), "by parts": _by_parts}


def _watch_a_layer(model: Any) -> None:
    model.get_base_model().model.layers[1].register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("what", SPOILT)
def test_what_the_backward_needs_is_not_changed_in_place_without_a_word(
    what: str, way: str, toy: Toy, given: Given, embeds: Tensor
) -> None:
    for fused in (False, True):
        model = toy(base={"num_hidden_layers": 2})
        if fused:
            patch_model(model, backend="eager")
            WAYS[way](model)
        loss, tensor = SPOILT[what](model, given, embeds.clone())
        with torch.no_grad():
            tensor.add_(1)
        with pytest.raises(RuntimeError, match=IN_PLACE):
            loss.backward()
        model.zero_grad()
        model(**given).loss.backward()  # the next step is as ever


def test_weights_of_layers_that_have_no_backward_may_be_changed(toy: Toy, given: Given) -> None:
    found = []
    for fused in (False, True):
        model = toy(base={"num_hidden_layers": 2}, layers_to_transform=[1])
        if fused:
            patch_model(model, backend="eager")
        loss = model(**given).loss
        with torch.no_grad():
            model.get_base_model().model.layers[0].mlp.up_proj.weight.mul_(2)
        loss.backward()
        found.append([p.grad for p in trained(model)])
    assert_close(found[1], found[0])


def test_weights_made_under_inference_mode_train(toy: Toy, given: Given) -> None:
    """They have no versions; stock can train what needs no gradient through them."""
    model = toy(base={"num_hidden_layers": 2}, target_modules=["down_proj"], layers_to_transform=[1])
    with torch.inference_mode():
        frozen = model.get_base_model().model.layers[0].mlp.up_proj.weight.clone()
    model.get_base_model().model.layers[0].mlp.up_proj.weight = nn.Parameter(frozen, requires_grad=False)
    patch_model(model, backend="eager")
    model(**given).loss.backward()
    assert all(p.grad is not None for p in trained(model))


@pytest.mark.parametrize("way", ["at once", "one by one"])
def test_a_mask_that_is_differentiated_has_its_gradient(
    way: str, pair: Callable[..., tuple[Any, Any]], given: Given, embeds: Tensor
) -> None:
    found = []
    for model in pair():
        WAYS[way](model)
        _, mask = _spoil_mask(model, given, embeds)
        model(**given, attention_mask=mask.requires_grad_()).loss.backward()
        found.append([mask.grad, *[p.grad for p in trained(model)]])
    assert_close(found[1], found[0])


def test_angles_that_are_differentiated_have_their_gradients(
    pair: Callable[..., tuple[Any, Any]], embeds: Tensor
) -> None:
    found = []
    for model in pair():
        backbone = model.get_base_model().model
        positions = torch.arange(embeds.shape[1], device=embeds.device)[None]
        angles = tuple(t.clone().requires_grad_() for t in backbone.rotary_emb(embeds, positions))
        output = backbone.layers[0](embeds, position_embeddings=angles)
        (output[0] if isinstance(output, tuple) else output).square().sum().backward()
        found.append([t.grad for t in angles])
    assert_close(found[1], found[0])


def test_a_divisor_has_its_gradient(pair: Callable[..., tuple[Any, Any]], given: Given, device: torch.device) -> None:
    found = []
    for model in pair():
        items = torch.tensor(30.0, device=device, requires_grad=True)
        model(**given, num_items_in_batch=items).loss.backward()
        found.append([items.grad, *[p.grad for p in trained(model)]])
    assert_close(found[1], found[0])
