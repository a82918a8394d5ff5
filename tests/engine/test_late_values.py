"""What an output holds and the fused forward left out: logits, those of padding, the cache.

Read late, by whatever way, they are what stock's output has held all along, and so are their gradients.
"""

import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from fastft import ledger_of, patch_model
from fastft.engine.deferred import Source
from fastft.models.kv_cache import KV_CACHE
from same_as_stock import Squares

Batches = Callable[[str], dict[str, Tensor]]
Pair = Callable[..., tuple[Any, Any]]
CLOSE: dict[str, float] = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def both(toy: Callable[..., Any]) -> Pair:
    """A stock model, and the same patched."""

    def make(family: str = "toy-llama", **lora: Any) -> tuple[Any, Any]:
        stock, model = toy(family, **lora), toy(family, **lora)
        patch_model(model, backend="eager")
        return stock, model

    return make


@pytest.fixture
def batch(batch_of: Callable[..., dict[str, Tensor]], device: torch.device) -> Batches:
    return lambda form: {name: tensor.to(device) for name, tensor in batch_of(form).items()}


def assert_equal_gradients(stock: Any, model: Any) -> None:
    expected, found = (
        {name: p.grad for name, p in each.named_parameters() if p.grad is not None} for each in (stock, model)
    )
    assert found.keys() == expected.keys()
    assert found
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6)


# The gradient of the logits themselves


def _retained(output: Any) -> Any:
    logits = output.logits
    logits.retain_grad()
    output.loss.backward()
    return logits.grad


def _hooked(output: Any) -> Any:
    seen: list[Tensor] = []

    def halve(gradient: Tensor) -> Tensor:
        seen.append(gradient)
        return 0.5 * gradient

    output.logits.register_hook(halve)
    output.loss.backward()
    (gradient,) = seen
    return gradient


def _asked_for(output: Any) -> Any:
    (gradient,) = torch.autograd.grad(output.loss, output.logits, retain_graph=True)
    output.loss.backward()
    return gradient


def _of_both(output: Any) -> Any:
    """The loss and something of the caller's own, together."""
    output.logits.retain_grad()
    (output.loss + output.logits.square().mean()).backward()
    return output.logits.grad


@pytest.mark.parametrize("form", ["none", "right", "left"])
@pytest.mark.parametrize("family", ["toy-llama", "toy-granite", "toy-falcon"])
@pytest.mark.parametrize("look", [_retained, _hooked, _asked_for, _of_both])
def test_who_looks_at_the_gradient_of_the_logits_sees_stocks(
    look: Callable[[Any], Any], family: str, form: str, both: Pair, batch: Batches
) -> None:
    more = {"target_modules": ["query_key_value", "dense"]} if family == "toy-falcon" else {}
    stock, model = both(family, **more)
    expected = look(stock(**batch(form)))
    torch.testing.assert_close(look(model(**batch(form))), expected, rtol=1e-3, atol=1e-6)
    assert_equal_gradients(stock, model)
    assert "head_and_loss: fused (eager)" in ledger_of(model).counts()


# Readers that do not ask the tensor what it is


def _mean(x: Tensor) -> Tensor:
    return x.logsumexp(-1).mean()


READERS: dict[str, Callable[[Any], Any]] = {
    "a function of its own": Squares.apply,
    "a reentrant checkpoint": lambda x: checkpoint(_mean, x, use_reentrant=True),
    "a checkpoint": lambda x: checkpoint(_mean, x, use_reentrant=False),
    "torch.jit.trace": lambda x: torch.jit.trace(_mean, (torch.zeros(1, 2, 3),))(x),
    "torch.compile": lambda x: torch.compile(_mean, backend="aot_eager")(x),
    "vmap": lambda x: torch.vmap(lambda row: row.logsumexp(-1))(x).mean(),
    "an operator by name": lambda x: torch.ops.aten.logsumexp(x, [-1]).mean(),
}


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_loss_of_ones_own_of_logits_with_gradient_checkpointing(reentrant: bool, both: Pair, batch: Batches) -> None:
    """What is run again in the backward is what ran."""
    models, losses = both(), []
    for model in models:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
        output = model(**batch("right"))
        losses.append(_mean(output.logits))
        losses[-1].backward()
    torch.testing.assert_close(*losses, **CLOSE)
    assert_equal_gradients(*models)


@pytest.mark.parametrize("form", ["none", "right"])
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_gets_values_and_gives_gradients(reader: str, form: str, both: Pair, batch: Batches) -> None:
    models, losses = both(), []
    for model in models:
        output = model(**batch(form))
        losses.append(output.loss + READERS[reader](output.logits))
        losses[-1].backward()
    torch.testing.assert_close(*losses, **CLOSE)
    assert_equal_gradients(*models)


def test_chosen_gradients_of_what_reads_padding_unseen_are_an_error(both: Pair, batch: Batches) -> None:
    """The padding's part of them would have to come from a graph that this one does not reach."""
    _, model = both()
    output = model(**batch("right"))
    adapters = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(RuntimeError, match="only in a plain backward"):
        torch.autograd.grad(Squares.apply(output.logits), adapters)
    expected = torch.autograd.grad(output.logits.clone().square().mean(), adapters)
    assert all(gradient.abs().sum() > 0 for gradient in expected)


def test_a_functions_gradient_by_logits(both: Pair, batch: Batches) -> None:
    results = [torch.func.grad(lambda x: x.logsumexp(-1).sum())(m(**batch("right")).logits).detach() for m in both()]
    torch.testing.assert_close(*results, **CLOSE)


def test_an_output_with_a_cache_is_pickled_as_stocks(both: Pair, batch: Batches) -> None:
    _, model = both()
    output = model(**batch("right"), use_cache=True)
    file = io.BytesIO()
    torch.save(output, file)
    file.seek(0)
    for restored in (torch.load(file, weights_only=False), pickle.loads(pickle.dumps(output))):
        assert type(restored) is type(output)
        assert list(restored) == list(output)
        assert type(restored.logits) is Tensor
        assert type(restored[KV_CACHE]) is DynamicCache
        torch.testing.assert_close(restored[KV_CACHE].layers[1].keys, output[KV_CACHE].layers[1].keys)
    assert type(output[KV_CACHE]) is DynamicCache, "once it was looked at"


# What changed between the forward and the reading


def _refill(model: Any, inputs: dict[str, Tensor]) -> None:
    for tensor in inputs.values():
        tensor.copy_(tensor.flip(1))


def _scale(model: Any, inputs: dict[str, Tensor]) -> None:
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.scaling["default"] *= 3


CHANGES: dict[str, Callable[[Any, dict[str, Tensor]], Any]] = {
    "its arguments were filled anew": _refill,
    "the adapters were switched off": lambda model, _: model.base_model.disable_adapter_layers(),
    "another adapter was chosen": lambda model, _: model.set_adapter("other"),
    "their scaling was changed": _scale,
    "it was evaluated": lambda model, _: model.eval(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("what", ["logits", "cache"])
def test_what_is_read_late_is_what_it_was(
    what: str, change: str, both: Pair, batch: Batches, shake: Callable[..., None]
) -> None:
    models, found = both(), []
    for model in models:
        model.add_adapter("other", model.peft_config["default"])
        shake(model)
        model.train()
        inputs = batch("right")
        output = model(**inputs, use_cache=True)
        CHANGES[change](model, inputs)
        found.append(output.logits + 0 if what == "logits" else output[KV_CACHE].layers[1].keys)
        fresh = model(**batch("right"), use_cache=True)
        found[-1] = found[-1], fresh.logits + 0
    (expected, after), (late, fresh) = found
    torch.testing.assert_close(late, expected, **CLOSE)
    torch.testing.assert_close(fresh, after, **CLOSE)


def test_a_base_that_is_switched_off_for_one_forward_is_off_for_its_padding(both: Pair, batch: Batches) -> None:
    found = []
    for model in both():
        with model.disable_adapter():
            output = model(**batch("right"))
        found.append(output.logits.detach())
    torch.testing.assert_close(*found, **CLOSE)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: model.lm_head.weight.mul_(2.0), "the head has changed since"),
        (lambda model: model.base_model.merge_adapter(), "have changed since"),
    ],
)
def test_what_cannot_be_made_any_more_is_an_error(
    change: Callable[[Any], Any], reason: str, both: Pair, batch: Batches
) -> None:
    _, model = both()
    output = model(**batch("right"))
    with torch.no_grad():
        change(model)
    with pytest.raises(RuntimeError, match=reason):
        output.logits.sum()


def test_hooks_of_the_embedding_run_once(both: Pair, batch: Batches) -> None:
    """NEFTune's draws numbers."""
    found = []
    for model in both():
        calls: list[int] = []

        def noise(module: Any, args: Any, output: Tensor, calls: list[int] = calls) -> Tensor:
            calls.append(1)
            return output + 0.1 * torch.randn_like(output)

        model.get_input_embeddings().register_forward_hook(noise)
        torch.manual_seed(0)
        output = model(**batch("right"), use_cache=True)
        logits = output.logits.detach()
        assert output[KV_CACHE].get_seq_length() == logits.shape[1]
        assert calls == [1]
        found.append((logits, torch.randn(())))
    torch.testing.assert_close(found[1], found[0], **CLOSE)


# Labels that are no token's


@pytest.mark.parametrize(
    "change",
    [
        lambda labels: labels[:, :-3],
        lambda labels: labels[:1],
        lambda labels: torch.cat([labels, labels], dim=1),
        lambda labels: labels.int(),
        lambda labels: labels.double(),
        lambda labels: labels.flatten(),
    ],
    ids=["shorter", "one row", "longer", "int32", "fp64", "flat"],
)
@pytest.mark.parametrize("family", ["toy-llama", "toy-falcon"])
def test_labels_that_stock_refuses_are_refused(
    family: str, change: Callable[[Tensor], Tensor], both: Pair, batch: Batches
) -> None:
    more = {"target_modules": ["query_key_value", "dense"]} if family == "toy-falcon" else {}
    said = []
    for model in both(family, **more):
        given = batch("none")
        try:
            said.append(model(input_ids=given["input_ids"], labels=change(given["labels"])).loss.item())
        except (ValueError, RuntimeError, IndexError) as error:
            said.append(str(error))
    assert said[1] == (said[0] if isinstance(said[0], str) else pytest.approx(said[0], rel=1e-5))


@pytest.mark.parametrize("items", ["of two", "to be differentiated"])
def test_a_divisor_that_is_no_constant_is_stocks(items: str, both: Pair, batch: Batches) -> None:
    found = []
    for model in both():
        divisor = torch.tensor([30.0, 40.0]) if items == "of two" else torch.tensor(30.0, requires_grad=True)
        loss = model(**batch("none"), num_items_in_batch=divisor).loss
        loss.sum().backward()
        found.append((loss.detach(), divisor.grad))
    torch.testing.assert_close(found[1], found[0], **CLOSE)


def test_a_loss_alone_makes_no_logits(both: Pair, batch: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor a gradient of zeros in their shape, which would be the largest tensor of the step."""
    _, model = both()
    monkeypatch.setattr(Source, "gradient", None)
    monkeypatch.setattr(Source, "make", None)
    for form in ("none", "right", "left"):
        model(**batch(form)).loss.backward()


def test_a_loss_alone_keeps_no_hidden_states(both: Pair, batch: Batches) -> None:
    """They would be B × S × D more at the peak, which is in the backward."""
    _, model = both()
    output = model(**batch("right"))
    hidden = weakref.ref(output.logits.source.hidden)
    loss = output.loss
    del output
    assert hidden() is None
    loss.backward()
