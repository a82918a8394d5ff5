"""First derivatives of every kind, and what torch.func makes of a model."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from fastft import patch_model
from same_as_stock import EMBEDDINGS, IDS, PADDED, PLAIN, SMALL, Ask, Same, call, gradients, on, step, trained


def _functional(model: Any, **given: Any) -> Callable[[Any], Tensor]:
    named = {name: on(model, value) for name, value in {**PLAIN, **given}.items() if isinstance(value, Tensor)}
    return lambda weights: torch.func.functional_call(model, weights, (), {**named, "use_cache": False}).loss


def _of_each_sample(model: Any) -> Any:
    def loss(weights: dict[str, Tensor], ids_S: Tensor) -> Tensor:
        named = {"input_ids": ids_S[None], "labels": ids_S[None], "use_cache": False}
        return torch.func.functional_call(model, weights, (), named).loss

    return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(trained(model), on(model, IDS))


def _of_duals(model: Any) -> Any:
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(p, p.detach()) for name, p in trained(model).items()}
        return list(forward_ad.unpack_dual(_functional(model)(duals)))


TRANSFORMS: dict[str, Ask] = {
    "grad": lambda model: torch.func.grad(_functional(model))(trained(model)),
    "vjp": lambda model: torch.func.vjp(_functional(model), trained(model))[1](on(model, torch.tensor(1.0)))[0],
    "jvp": lambda model: list(torch.func.jvp(_functional(model), (trained(model),), (trained(model),))),
    "a gradient a sample": _of_each_sample,
    "dual numbers": _of_duals,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_what_torch_func_transforms_is_stocks(transform: str, same: Same) -> None:
    answers = same(TRANSFORMS[transform], base={"attn_implementation": "eager"})
    why = "forward-mode automatic differentiation is on" if transform == "dual numbers" else "torch.func transforms it"
    assert set(answers.ledger.values()) == {why}


def test_a_penalty_that_is_differentiated_for_all_says_that_it_cannot_be(toy: Callable[..., Any]) -> None:
    model = toy(base=SMALL)
    patch_model(model, backend="eager")
    found = torch.autograd.grad(call(model).loss, list(trained(model).values()), create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.stack([each.square().sum() for each in found]).sum().backward()


def _updated_in_the_backward(model: Any) -> Any:
    def hook(parameter: Tensor) -> None:
        with torch.no_grad():
            parameter.add_(parameter.grad, alpha=-0.05)  # type: ignore[arg-type]
        parameter.grad = None

    for parameter in trained(model).values():
        parameter.register_post_accumulate_grad_hook(hook)
    found = []
    for _ in range(3):
        loss = call(model).loss
        loss.backward()
        found.append(loss)
    return found


def _made_by_another_network(model: Any) -> Any:
    factor = on(model, torch.tensor(0.5)).requires_grad_()
    loss = _functional(model)({name: p.detach() * factor for name, p in trained(model).items()})
    loss.backward()
    return [loss, factor.grad]


def _of_hidden_states(model: Any) -> Any:
    out = call(model, output_hidden_states=True)
    return list(torch.autograd.grad(out.loss, out.hidden_states[1:]))


def _of_attentions(model: Any) -> Any:
    out = call(model, output_attentions=True)
    return list(torch.autograd.grad(out.loss, out.attentions))


def _of_an_embedding_that_a_hook_cut_off(model: Any) -> Any:
    seen = []

    def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        seen.append(out.detach().requires_grad_())
        return seen[0]

    model.get_input_embeddings().register_forward_hook(hook)
    call(model, **PADDED).loss.backward()
    return seen[0].grad


def _in_another_thread(model: Any) -> Any:
    loss = call(model).loss
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    return gradients(model)


def _by_hooks_on_gradients(model: Any) -> Any:
    seen: dict[str, Tensor] = {}
    for name, parameter in trained(model).items():
        parameter.register_hook(lambda gradient, name=name: seen.__setitem__(name, gradient.clone()))
    counts: list[int] = []
    torch.autograd.graph.register_multi_grad_hook(list(trained(model).values()), lambda all_: counts.append(len(all_)))
    return [step(model), seen, counts]


def _clipped_in_a_graph(model: Any) -> Any:
    call(model).loss.backward(create_graph=True)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    return gradients(model)


def _inside_no_grad(model: Any) -> Any:
    with torch.no_grad(), torch.enable_grad():
        loss = call(model).loss
    loss.backward()
    return gradients(model)


def _of_a_position(model: Any) -> Any:
    embeds = on(model, EMBEDDINGS[:1, :3])
    return torch.autograd.functional.jacobian(lambda x: model(inputs_embeds=x).logits[0, -1, :4], embeds)


DERIVATIVES: dict[str, Ask] = {
    "updated in the backward": _updated_in_the_backward,
    "weights that another network made": _made_by_another_network,
    "of hidden states": _of_hidden_states,
    "of attention weights": _of_attentions,
    "of an embedding that a hook cut off": _of_an_embedding_that_a_hook_cut_off,
    "in another thread": _in_another_thread,
    "hooks on gradients": _by_hooks_on_gradients,
    "clipped in a graph": _clipped_in_a_graph,
    "grad inside no_grad": _inside_no_grad,
    "a Jacobian of embeddings": _of_a_position,
}


@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_first_derivatives_of_every_kind(derivative: str, same: Same) -> None:
    same(DERIVATIVES[derivative], base={"attn_implementation": "eager"})
