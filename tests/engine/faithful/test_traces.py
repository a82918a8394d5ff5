"""A patched model leaves no traces: nothing drawn, changed, said or kept."""

import inspect
import threading
import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from same_as_stock import IDS, PADDED, Ask, Same, call, gradients, layers, on, step, trained


@pytest.mark.parametrize("family", ["toy-llama", "toy-qwen3"])
def test_nothing_is_drawn_changed_or_said(family: str, same: Same) -> None:
    def ask(model: Any) -> Any:
        state, buffers = torch.get_rng_state(), {name: b.clone() for name, b in model.named_buffers()}
        modules, hooks = len(list(model.modules())), sum(len(m._forward_hooks) for m in model.modules())
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            out = call(model, **PADDED)
            out.logits.sum()
            out.loss.backward()
        return [
            torch.equal(state, torch.get_rng_state()), buffers, dict(model.named_buffers()), modules, hooks,
            len(list(model.modules())), sum(len(m._forward_hooks) for m in model.modules()),
            [str(each.message)[:60] for each in said], list(model.state_dict()), repr(model),
        ]  # fmt: skip

    same(ask)


def test_a_model_looks_as_it_did(same: Same) -> None:
    def ask(model: Any) -> Any:
        causal = model.get_base_model()
        return [
            str(inspect.signature(causal.forward)), str(inspect.signature(model.forward)), causal.forward.__qualname__,
            causal.forward.__doc__, type(model).__name__, [type(m).__name__ for m in model.modules()],
            isinstance(causal, transformers.LlamaForCausalLM), model.get_nb_trainable_parameters(), str(model.dtype),
            causal.num_parameters(), causal.get_memory_footprint(), [name for name, _ in model.named_parameters()],
        ]  # fmt: skip

    same(ask)


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_checkpointing_hooks_are_called_as_often(reentrant: bool, same: Same) -> None:
    def ask(model: Any) -> Any:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
        seen: list[Any] = []
        layers(model)[0].mlp.register_forward_hook(lambda *_: seen.append(["mlp", torch.is_grad_enabled()]))
        layers(model)[1].register_forward_hook(lambda *_: seen.append(["layer", torch.is_grad_enabled()]))
        return [step(model), seen]

    same(ask)


def _after_an_error(model: Any) -> Any:
    def fail(*_: Any) -> None:
        raise KeyError("never")

    for module in (model.get_input_embeddings(), model.get_base_model().model):
        handle = module.register_forward_hook(fail)
        with pytest.raises(KeyError):
            call(model)
        handle.remove()
    return step(model)


def _called_by_its_own_hook(model: Any) -> Any:
    inner: list[Tensor] = []

    def hook(*_: Any) -> None:
        if not inner:
            inner.append(torch.zeros(()))
            inner.append(call(model, input_ids=IDS[:, :5], labels=IDS[:, :5]).loss)

    model.get_input_embeddings().register_forward_hook(hook)
    model.zero_grad()
    out = call(model)
    (out.loss + inner[1]).backward()
    return [out.loss, inner[1], out.logits, gradients(model)]


def _in_two_threads(model: Any) -> Any:
    """Both are inside of the model at the same time; one of them trains."""
    barrier, found = threading.Barrier(2), {}
    model.get_input_embeddings().register_forward_hook(lambda *_: [barrier.wait(30)].clear())

    def run(train: bool) -> None:
        with torch.set_grad_enabled(train):
            out = call(model)
        found[train] = [out.loss.detach(), out.logits.detach()]

    threads = [threading.Thread(target=run, args=(train,)) for train in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[True], found[False]]


def _checkpointed_from_outside(model: Any) -> Any:
    model.zero_grad()
    ids = on(model, IDS)
    loss = checkpoint(lambda given: model(input_ids=given, labels=given).loss, ids, use_reentrant=False)
    loss.backward()
    return [loss, gradients(model)]


ENTRIES: dict[str, Ask] = {
    "after an error": _after_an_error,
    "called by its own hook": _called_by_its_own_hook,
    "in two threads": _in_two_threads,
    "checkpointed from outside": _checkpointed_from_outside,
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_other_ways_into_a_forward(entry: str, same: Same) -> None:
    same(ENTRIES[entry])


def test_gradients_that_somebody_keeps_stay_what_they_are(same: Same) -> None:
    def ask(model: Any) -> Any:
        step(model)
        kept = [p.grad for p in trained(model).values()]
        values = [g.clone() for g in kept if g is not None]
        same_object = [id(p.grad) for p in trained(model).values()]
        call(model, **PADDED).loss.backward()
        added = [id(p.grad) for p in trained(model).values()] == same_object
        model.zero_grad(set_to_none=True)
        return [added, values, [g.clone() for g in kept if g is not None], step(model, **PADDED)]

    same(ask)
