"""Logits, hidden states, attention weights and the cache of a forward."""

# B rows, S tokens a row, V vocabulary

import pytest
import torch

from fastft import ledger_of, patch_model
from fastft.models.kv_cache import KV_CACHE
from peft_models import on_device

TOLERANCE = 5e-5 if torch.cuda.is_available() else 1e-5  # ‖g − stock‖ / ‖stock‖ in fp32


def test_logits_are_computed_when_read_and_once(toy, batch_of):
    model = toy()
    batch = on_device(model, batch_of("right"))
    stock = model(**batch)
    expected = stock.logits
    patch_model(model, backend="eager")
    output = model(**batch)
    assert type(output) is type(stock)
    assert list(output.keys()) == list(stock.keys())
    assert output["loss"] is output.loss is output[0]
    assert output.logits.shape == expected.shape
    assert output.logits.is_pending
    torch.testing.assert_close(output.logits + 0, expected, rtol=1e-4, atol=1e-5)
    assert output.logits is output["logits"] is output[1]
    assert not output.logits.is_pending
    output.logits.sum().backward()


@pytest.mark.parametrize("key", [1, "logits", slice(0, 2)], ids=str)
def test_logits_by_index(key, toy, batch_of):
    model = toy()
    batch = on_device(model, batch_of("none"))
    stock = model(**batch, output_hidden_states=True)
    patch_model(model, backend="eager")
    output = model(**batch, output_hidden_states=True)
    expected, got = stock[key], output[key]
    if isinstance(key, slice):
        assert len(got) == 2
        expected, got = expected[1], got[1]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_tuple_where_one_is_asked_for(toy, batch_of):
    model = toy()
    batch = on_device(model, batch_of("none"))
    stock = model(**batch, return_dict=False)
    patch_model(model, backend="eager")
    loss, logits = model(**batch, return_dict=False)[:2]
    torch.testing.assert_close(loss, stock[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(logits, stock[1], rtol=1e-4, atol=1e-5)
    assert ledger_of(model).fallbacks["lm_head"].reason == "a tuple was asked for"
    loss.backward()


def test_some_logits(toy, batch_of):
    model = toy()
    ids = on_device(model, batch_of("none"))["input_ids"]
    expected = model(input_ids=ids, logits_to_keep=2).logits
    patch_model(model, backend="eager")
    torch.testing.assert_close(model(input_ids=ids, logits_to_keep=2).logits, expected, rtol=1e-4, atol=1e-5)


def test_logits_without_labels_carry_gradients(toy, batch_of, error_of):
    gradients = []
    for patched in (False, True):
        model = toy()
        if patched:
            patch_model(model, backend="eager")
        model(**{"input_ids": on_device(model, batch_of("none"))["input_ids"]}).logits.square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert error_of(gradients[1], gradients[0]) < TOLERANCE


def test_hidden_states_equal_stocks_and_layers_stay_fused(toy, batch_of, step):
    model = toy()
    batch = on_device(model, batch_of("none"))
    expected = model(**batch, output_hidden_states=True).hidden_states
    patch_model(model, backend="eager")
    for got, wanted in zip(model(**batch, output_hidden_states=True).hidden_states, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    step(model, batch_of("none"))
    assert not ledger_of(model).fallbacks


def test_attention_weights_equal_stocks(toy, batch_of, step):
    model = toy(base={"attn_implementation": "eager"})
    batch = on_device(model, batch_of("none"))
    expected = model(**batch, output_attentions=True).attentions
    patch_model(model, backend="eager")
    got = model(**batch, output_attentions=True).attentions
    assert len(got) == 3
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert ledger_of(model).fallbacks["layers.0"].reason == "attention weights are asked for"
    step(model, batch_of("none"))
    assert not ledger_of(model).fallbacks, "only for that call"


@pytest.mark.parametrize("asked", [{}, {"use_cache": True}, {"use_cache": True, "output_hidden_states": True}], ids=str)
def test_the_cache_of_a_training_forward_is_made_when_it_is_read(asked, toy, batch_of, step, error_of):
    batch = batch_of("right")
    model = toy()
    expected = model(**on_device(model, batch), **asked)[KV_CACHE]
    loss, gradients = step(model, batch, use_cache=None, **asked) if not asked else step(model, batch, **asked)
    patch_model(model, backend="eager", strict=True)
    output = model(**on_device(model, batch), **asked)
    fused_loss, fused = step(model, batch, use_cache=None, **asked) if not asked else step(model, batch, **asked)
    assert fused_loss == pytest.approx(loss, rel=1e-5)
    assert error_of(fused, gradients) < TOLERANCE
    for made, wanted in zip(output[KV_CACHE].layers, expected.layers, strict=True):
        torch.testing.assert_close(made.keys, wanted.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(made.values, wanted.values, rtol=1e-4, atol=1e-5)


def test_what_is_read_after_a_step_is_what_it_was(toy, batch_of):
    """A metric of the logits, say, which stock's output still has."""
    model = toy()
    batch = on_device(model, batch_of("right"))
    expected = model(**batch, use_cache=True)
    patch_model(model, backend="eager")
    output = model(**batch, use_cache=True)
    output.loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    torch.testing.assert_close(output.logits + 0, expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output[KV_CACHE].layers[1].keys, expected[KV_CACHE].layers[1].keys, rtol=1e-4, atol=1e-5)
    fresh = model(**batch).logits
    assert not torch.allclose(fresh, expected.logits, rtol=1e-2), "and the step is still there"


def test_what_an_unseen_change_made_impossible_is_an_error(toy, batch_of):
    """To make it from other adapters would be wrong without a word."""
    model = toy()
    patch_model(model, backend="eager")
    output = model(**on_device(model, batch_of("right")))
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).add_(1.0)
    with pytest.raises(RuntimeError, match="the adapters have changed since"):
        output[KV_CACHE].get_seq_length()
    with pytest.raises(RuntimeError, match="Logits of padding"):
        output.logits.sum()


def test_a_mask_may_be_longer_than_its_tokens_where_a_cache_is_built(toy, batch_of, equal_to_stock):
    batch = batch_of("right")
    batch["attention_mask"] = torch.nn.functional.pad(batch["attention_mask"], (0, 3), value=0)
    equal_to_stock(toy(), batch, use_cache=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_head_of_another_dtype_is_refused_as_in_stock(dtype, toy, batch_of):
    said = []
    for patched in (False, True):
        model = toy("toy-mistral")
        model.get_output_embeddings().to(dtype)
        if patched:
            patch_model(model, backend="eager")
        with pytest.raises(RuntimeError) as error:
            model(**on_device(model, batch_of("none")))
        said.append(str(error.value))
    assert said[0] == said[1]
