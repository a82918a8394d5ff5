"""The patched `forward`s against stock: every form of input, output and mode that callers use."""

# B rows, S tokens a row, V vocabulary

import copy
import logging
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils
from transformers.integrations import sdpa_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from fastft import ledger_of, patch_model
from fastft.engine import optimizer_step
from fastft.engine.deferred import Deferred
from fastft.engine.padding import padding_of
from fastft.engine.state import Placed, state_of
from fastft.models.kv_cache import KV_CACHE

TOLERANCE = 5e-5 if torch.cuda.is_available() else 1e-5  # ‖g − stock‖ / ‖stock‖ in fp32


def on_device(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}


@pytest.fixture
def equal_to_stock(step, error_of):
    """Asserts that loss and gradients equal stock's; gives the ledger's reasons."""

    def check(model: Any, batch: dict[str, Tensor], rows: int | None = None, **more: Any) -> dict[str, str]:
        loss, gradients = step(model, batch, rows, **more)
        patch_model(model, backend="eager", placement=["light", "mlp", "full"], loss_chunk_tokens=11)
        fused_loss, fused = step(model, batch, rows, **more)
        assert fused_loss == pytest.approx(loss, rel=1e-5)
        assert error_of(fused, gradients) < TOLERANCE
        return {name: path.reason for name, path in ledger_of(model).fallbacks.items()}

    return check


# Masks and positions


def test_right_padding_with_the_positions_that_stock_would_take(toy, batch_of, equal_to_stock):
    batch = batch_of("right")
    batch["position_ids"] = torch.arange(23).expand(4, -1).contiguous()
    assert not equal_to_stock(toy(), batch)


def test_right_padding_with_positions_counted_from_the_mask(toy, batch_of, equal_to_stock):
    batch = batch_of("right")
    mask_BS = batch["attention_mask"]
    batch["position_ids"] = (mask_BS.cumsum(-1) - 1).masked_fill(mask_BS == 0, 1)
    assert not equal_to_stock(toy(), batch)


def test_a_mask_of_ones_over_packed_positions_means_one_document(toy, batch_of, equal_to_stock):
    """So it is in stock: documents are told apart by their positions only where there is no mask."""
    batch = batch_of("packed")
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    assert not equal_to_stock(toy(), batch)


@pytest.mark.parametrize("shifted", [False, True])
def test_labelled_padding_sees_what_it_sees_in_stock(shifted, toy, batch_of, equal_to_stock):
    """Labels copied from the ids train the padding too; it may then attend to the tokens only."""
    batch = batch_of("right")
    batch["labels"] = batch["input_ids"].clone()
    if shifted:
        batch["shift_labels"] = batch["labels"].roll(-1, 1)
    assert not equal_to_stock(toy(), batch)


def test_a_row_of_padding_alone(toy, batch_of, equal_to_stock):
    batch = batch_of("right")
    batch["attention_mask"][2] = 0
    batch["labels"][2] = -100
    assert not equal_to_stock(toy(), batch)


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_a_mask_of_four_dimensions(kind, toy, batch_of, equal_to_stock):
    """A prefix that sees itself in both directions."""
    batch = batch_of("none")
    mask_BS = torch.ones(23, 23, dtype=torch.bool).tril()
    mask_BS[:5, :5] = True
    mask = mask_BS[None, None].expand(4, 1, 23, 23).contiguous()
    batch["attention_mask"] = mask if kind == "bool" else torch.zeros(mask.shape).masked_fill(~mask, -1e30)
    assert not equal_to_stock(toy(), batch)


def test_windows_of_some_layers(toy, batch_of, equal_to_stock):
    """Qwen2's `layer_types`; right padding, so that the mask of the full layers is dropped."""
    types = ["full_attention", "sliding_attention", "sliding_attention"]
    windows = {"use_sliding_window": True, "sliding_window": 4, "layer_types": types}
    batch = batch_of("right")
    assert not equal_to_stock(toy("toy-qwen2", base=windows), batch)
    model = toy("toy-qwen2", base=windows)
    plain = toy("toy-qwen2")
    assert model(**on_device(model, batch)).loss.item() != pytest.approx(plain(**on_device(plain, batch)).loss.item())


def test_stock_with_eager_attention(toy, batch_of, equal_to_stock):
    """Its masks are additive and always there."""
    for form in ("right", "packed"):
        assert not equal_to_stock(toy(base={"attn_implementation": "eager"}), batch_of(form))


def test_inputs_as_embeddings(toy, batch_of, step, error_of):
    for form in ("right", "left"):
        batch = batch_of(form)
        results = []
        for patched in (False, True):
            model = toy()
            given = dict(batch)
            with torch.no_grad():
                embeds = model.get_input_embeddings()(given.pop("input_ids").to(next(model.parameters()).device))
            given["inputs_embeds"] = embeds
            if patched:
                patch_model(model, backend="eager")
            results.append(step(model, given, 2))
        assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
        assert error_of(results[1][1], results[0][1]) < TOLERANCE


@pytest.mark.parametrize(
    ("mask", "answer"),
    [
        ([[1, 1, 1]], True),
        ([[1, 1, 0], [1, 0, 0]], True),
        ([[0, 1, 1]], False),
        ([[1, 0, 1]], False),
        ([[1, 1, 0], [0, 0, 0]], False),
    ],
)
def test_which_masks_hide_padding_only(mask, answer):
    mask_BS = torch.tensor(mask)
    real = mask_BS.flatten().nonzero().flatten().tolist()
    assert padding_of(mask_BS).is_right_only is answer
    padding = padding_of(mask_BS.bool())
    assert padding.is_right_only is answer
    assert padding.real == len(real)
    if answer and not mask_BS.all():
        assert padding.rows_R.tolist() == real
    else:
        assert padding.rows_R is None
    if answer:
        assert padding.all_rows(mask_BS).tolist() == real
        labelled = torch.where(mask_BS == 1, 5, -100)
        assert padding_of(mask_BS, labelled).is_right_only
        assert padding_of(mask_BS, torch.full_like(mask_BS, 5)).is_right_only is bool(mask_BS.all())


def test_packed_documents_need_no_mask(toy, batch_of, step, error_of, runs):
    """A (B × 1 × S × S) mask would be a gigabyte at 32k tokens."""
    model = toy()
    batch = batch_of("packed")
    _, stock = step(model, batch)
    patch_model(model, backend="eager", strict=True)
    _, fused = step(model, batch)
    assert error_of(fused, stock) < TOLERANCE
    seen = runs[0].calls[0].context.seen
    assert seen.mask is None
    assert seen.documents.tolist() == [place for row in range(4) for place in (23 * row, 23 * row + 7)] + [92]
    assert seen.longest == 16


def _halved(mlp: Any, x: Tensor) -> Tensor:
    return 0.5 * type(mlp).forward(mlp, x)


def _change_places(layers: Any) -> None:
    layers[0], layers[1] = layers[1], layers[0]
    layers[2].register_forward_hook(lambda *_: None)  # so that stock's loop calls each of them


CHANGES: dict[str, Callable[[Any], None]] = {
    "scaling": lambda layers: layers[1].self_attn.q_proj.scaling.update(default=0.25),
    "adapter off": lambda layers: layers[1].mlp.down_proj.enable_adapters(enabled=False),
    "another module": lambda layers: setattr(layers[1], "mlp", copy.deepcopy(layers[1].mlp)),
    "another forward": lambda layers: setattr(layers[1].mlp, "forward", partial(_halved, layers[1].mlp)),
    "other places": _change_places,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_noticed(change, toy, batch_of, step, error_of):
    batch = batch_of("none")
    results = []
    for patched in (False, True):
        model = toy()
        if patched:
            patch_model(model, backend="eager")
        step(model, batch)
        CHANGES[change](model.get_base_model().model.layers)
        results.append(step(model, batch))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    assert error_of(results[1][1], results[0][1]) < TOLERANCE


def test_noise_of_an_embedding_hook_is_drawn_once_where_autocast_keeps_the_layers_stock(toy, batch_of):
    """NEFTune's hook, in TRL's default of fp32 weights under autocast."""
    losses, drawn_after = [], []
    for patched in (False, True):
        model = toy()
        model.get_input_embeddings().register_forward_hook(lambda _, __, out: out + 0.1 * torch.rand_like(out))
        if patched:
            patch_model(model, backend="eager")
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses.append([float(model(**batch_of("none")).loss) for _ in range(3)])
        drawn_after.append(torch.rand(3))
    assert torch.equal(*drawn_after)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3), "to the last places of bf16"


def test_another_placement_for_the_same_sizes_runs_once(toy, batch_of, step, runs, monkeypatch):
    before, made = optimizer_step.steps(), list[int]()  # one entry an optimizer step
    monkeypatch.setattr(optimizer_step, "steps", lambda: before + len(made))
    model = toy()
    patch_model(model, backend="eager", placement=lambda *_: Placed(["full" if made else "light"] * 3, 2048))
    batch = batch_of("none")
    step(model, batch)
    step(model, batch)
    made.append(1)
    step(model, batch)
    step(model, batch)
    assert len(runs) == 4
    assert state_of(model.get_base_model()).settings.placement == ["full"] * 3


def test_an_error_of_layers_that_changed_is_not_the_users(toy, batch_of, step, error_of):
    """Between two steps a weight became another one that what was read of the layer does not fit."""
    batch = batch_of("none")
    model = toy()
    _, expected = step(model, batch)
    patch_model(model, backend="eager")
    step(model, batch)
    layer = model.get_base_model().model.layers[1]
    fitting, layer.mlp.down_proj.base_layer.weight.data = layer.mlp.down_proj.base_layer.weight.data, torch.zeros(1, 1)
    with pytest.raises(RuntimeError):
        step(model, batch)
    replacement = copy.deepcopy(layer.mlp.down_proj)
    replacement.base_layer.weight.data = fitting
    layer.mlp.down_proj = replacement  # the old one still does not fit
    _, gradients = step(model, batch)
    assert error_of(gradients, expected) < TOLERANCE


def test_who_looks_at_a_layer_sees_stocks_masks(toy, batch_of):
    """Packed documents have none: stock builds a cache, and then tells no documents apart."""
    model = toy()
    patch_model(model, backend="eager")
    seen = []
    layer = model.get_base_model().model.layers[0]
    layer.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True)
    for form in ("none", "right", "left", "packed"):
        model(**on_device(model, batch_of(form)))
    assert [mask is None for mask in seen] == [True, False, False, True]


# Accumulation and the loss


def test_sixteen_rows_at_once_equal_sixteen_times_one(toy, batch_of, step, error_of):
    batch = batch_of("right", B=16)
    model = toy("toy-qwen2")
    patch_model(model, backend="eager")
    loss, gradients = step(model, batch)
    for rows in (1, 5):
        other_loss, other = step(model, batch, rows)
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert error_of(other, gradients) < TOLERANCE


def test_packed_rows_equal_their_documents(toy, batch_of, step, error_of):
    packed = batch_of("packed", B=2, S=21)
    model = toy()
    patch_model(model, backend="eager")
    loss, gradients = step(model, packed)
    ids, labels = packed["input_ids"], packed["labels"].clone()
    apart = {"input_ids": torch.full((4, 14), 9), "labels": torch.full((4, 14), -100)}
    apart["attention_mask"] = torch.zeros(4, 14, dtype=torch.int64)
    for row in range(2):
        for part, (begin, end) in enumerate([(0, 7), (7, 21)]):
            apart["input_ids"][2 * row + part, : end - begin] = ids[row, begin:end]
            apart["labels"][2 * row + part, : end - begin] = labels[row, begin:end]
            apart["attention_mask"][2 * row + part, : end - begin] = 1
    apart_loss, other = step(model, apart)
    assert apart_loss == pytest.approx(loss, rel=1e-5)
    assert error_of(other, gradients) < TOLERANCE


def test_a_micro_batch_without_a_label_gives_no_gradient(toy, batch_of):
    model = toy()
    patch_model(model, backend="eager")
    batch = on_device(model, batch_of("right"))
    batch["labels"][:] = -100
    for items in (None, 5):
        model.zero_grad()
        more = {} if items is None else {"num_items_in_batch": items}
        loss = model(**batch, **more).loss
        loss.backward()
        # A mean of nothing is none, as in stock; a sum of nothing over all the labels of a global batch is 0.
        assert loss.isnan() if items is None else loss.item() == 0
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert not parameter.grad.any(), name


@pytest.mark.parametrize("items", [17, torch.tensor(17), torch.tensor(17.0)], ids=["int", "tensor", "float tensor"])
def test_the_number_of_items_is_the_callers(items, toy, batch_of):
    model = toy()
    batch = on_device(model, batch_of("right"))
    expected = model(**batch, num_items_in_batch=items).loss
    mean = model(**batch).loss
    patch_model(model, backend="eager")
    torch.testing.assert_close(model(**batch, num_items_in_batch=items).loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(model(**batch).loss, mean, rtol=1e-6, atol=0)
    assert expected > 2 * mean


def test_shifted_labels_replace_the_labels(toy, batch_of, equal_to_stock):
    batch = batch_of("none")
    batch["shift_labels"] = batch["input_ids"].flip(1)
    assert not equal_to_stock(toy(), batch)


def test_another_loss_function_is_used(toy, batch_of, equal_to_stock, caplog):
    model = toy()

    def double(logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
        return 2 * torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    model.get_base_model().loss_function = double
    assert equal_to_stock(model, batch_of("none")) == {"lm_head": "its loss function is double"}
    assert "its loss function is double" in caplog.text


def test_another_ignored_label_is_used(toy, batch_of, equal_to_stock):
    batch = batch_of("none")
    batch["labels"][batch["labels"] == -100] = 7
    reasons = equal_to_stock(toy(), batch, ignore_index=7)
    assert reasons == {"lm_head": "another ignore_index was asked for"}


# Outputs


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


# Modes


@pytest.mark.parametrize("mode", ["eval", "no_grad"])
@pytest.mark.parametrize("form", ["right", "left"])
def test_evaluation_gives_stocks_output(mode, form, toy, batch_of):
    model = toy("toy-qwen2")
    batch = on_device(model, batch_of(form))
    if mode == "eval":
        model.eval()
    with torch.set_grad_enabled(mode == "eval"):
        expected = model(**batch)
        patch_model(model, backend="eager")
        output = model(**batch)
    assert isinstance(output.logits, Deferred) is (mode == "eval"), "without gradients all is stock's"
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", ["toy-llama", "toy-qwen2"])
def test_generation_equals_stock_token_by_token(family, training, toy, batch_of):
    model = toy(family)
    model.train(training)
    batch = on_device(model, batch_of("left", S=9))
    wanted = {
        "input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "max_new_tokens": 8,
        "do_sample": False, "pad_token_id": 0,
    }  # fmt: skip
    expected = model.generate(**wanted)
    patch_model(model, backend="eager")
    assert torch.equal(model.generate(**wanted), expected)
    assert torch.equal(model.generate(**wanted, use_cache=False), expected)
    assert not ledger_of(model).fallbacks, "generation is no fallback"


def test_autocast_over_fp32_weights_runs_stock_aloud(toy, batch_of, step, caplog):
    model = toy()
    batch = batch_of("right")
    _, exact = step(model, batch)
    device = next(model.parameters()).device
    with torch.autocast(device.type, dtype=torch.bfloat16):
        stock_loss, stock = step(model, batch)
        patch_model(model, backend="eager")
        with caplog.at_level(logging.WARNING):
            loss, fused = step(model, batch)
    assert "computes in torch.bfloat16 on torch.float32 weights" in caplog.text
    assert all(ledger_of(model).paths[f"layers.{index}"].path == "stock" for index in range(3))
    assert loss == pytest.approx(stock_loss, rel=1e-3)

    def error(gradients: dict[str, Tensor]) -> float:
        flat, flat_exact = (torch.cat([g[name].flatten() for name in exact]) for g in (gradients, exact))
        return float((flat - flat_exact).norm() / flat_exact.norm())

    assert 1e-4 < error(fused) <= 1.5 * error(stock)


def test_under_autocast_the_head_computes_in_the_dtype_of_autocast(toy, batch_of, monkeypatch):
    """In fp32 it would be several times slower, and the loss another than stock's."""
    from fastft.engine import head

    seen = []
    original = head.linear_cross_entropy

    def spy(hidden: Tensor, head: Tensor, *rest: Any, **more: Any) -> Tensor:
        seen.append((hidden.dtype, head.dtype))
        return original(hidden, head, *rest, **more)

    monkeypatch.setattr(head, "linear_cross_entropy", spy)
    model = toy()
    patch_model(model, backend="eager")
    batch = on_device(model, batch_of("none"))
    model(**batch)
    with torch.autocast(batch["labels"].device.type, dtype=torch.bfloat16):
        model(**batch)
    assert seen == [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)]


def test_autocast_in_the_models_own_dtype_stays_fused(toy, batch_of, step, error_of):
    model = toy(base={"dtype": torch.bfloat16})
    patch_model(model, backend="eager", strict=True)
    loss, gradients = step(model, batch_of("right"))
    with torch.autocast(next(model.parameters()).device.type, dtype=torch.bfloat16):
        again, same = step(model, batch_of("right"))
    assert again == pytest.approx(loss, rel=1e-5)
    assert error_of(same, gradients) < (1e-2 if torch.cuda.is_available() else 1e-12)


def test_fp32_norms_over_bf16_weights_run_stock_aloud(toy, batch_of, step):
    """`prepare_model_for_kbit_training` leaves such models; their linears and norms still run fused."""
    model = toy(base={"dtype": torch.bfloat16})
    for name, parameter in model.named_parameters():
        if "norm" in name or "embed" in name:
            parameter.data = parameter.data.float()
    stock = copy.deepcopy(model)
    batch = batch_of("right")
    _, exact = step(copy.deepcopy(model).float(), batch)
    with torch.autocast(next(model.parameters()).device.type, dtype=torch.bfloat16):
        loss, gradients = step(stock, batch)
        patch_model(model, backend="eager")
        fused_loss, fused = step(model, batch)
    assert "layers.1" in ledger_of(model).fallbacks
    assert fused_loss == pytest.approx(loss, rel=1e-3)
    flat, flat_stock, flat_exact = (
        torch.cat([g[name].flatten().double() for name in exact]) for g in (fused, gradients, exact)
    )
    assert 1e-4 < (flat - flat_exact).norm() <= 1.5 * (flat_stock - flat_exact).norm()


# What stock's code reaches


def _half(function: Callable[..., Any]) -> Callable[..., Any]:
    def halved(*args: Any, **kwargs: Any) -> Any:
        given = function(*args, **kwargs)
        return (0.5 * given[0], *given[1:]) if isinstance(given, tuple) else 0.5 * given

    return halved


def _halve(monkeypatch: pytest.MonkeyPatch, holder: Any, name: str) -> None:
    monkeypatch.setattr(holder, name, _half(getattr(holder, name)))


def _another_attention(monkeypatch: pytest.MonkeyPatch, backbone: Any) -> None:
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "half", _half(ALL_ATTENTION_FUNCTIONS["sdpa"]))
    attention = backbone.layers[0].self_attn
    attention.config = copy.deepcopy(attention.config)
    attention.config._attn_implementation = "half"


def _masks_without_the_first(monkeypatch: pytest.MonkeyPatch, _: Any) -> None:
    stocks = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]

    def mask_function(*args: Any, **kwargs: Any) -> Tensor:
        mask = stocks(*args, **{**kwargs, "allow_is_causal_skip": False}).clone()
        mask[..., 0] = False
        return mask | torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)

    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "sdpa", mask_function)


class _Skipping(nn.ModuleList):
    def __getitem__(self, index: Any) -> Any:
        return [super().__getitem__(1)] if isinstance(index, slice) else super().__getitem__(index)


def _replace(module: nn.Module, name: str, **more: Any) -> None:
    """A registry of a module as a whole, with other things in it."""
    module.__dict__[name] = {**module.__dict__[name], **more}


def _frozen_and_assigned(_: Any, backbone: Any) -> None:
    a = backbone.layers[0].mlp.up_proj.lora_A["default"]
    weight = a.weight.detach()
    del a.weight
    a.register_buffer("weight", weight)
    a(torch.zeros(1, weight.shape[1], device=weight.device))
    a.weight = 0.5 * weight


def _of_mlp(backbone: Any, path: str) -> Any:
    return backbone.layers[0].mlp.get_submodule(path)


REACHED: dict[str, tuple[str, str, Callable[[pytest.MonkeyPatch, Any], Any]]] = {
    "the config of one attention": ("toy-llama", "sdpa", _another_attention),
    "the registered mask": ("toy-llama", "sdpa", _masks_without_the_first),
    "how packed documents are told": (
        "toy-llama", "sdpa", lambda m, _: m.setattr(masking_utils, "find_packed_sequence_indices", lambda *_: None),
    ),
    "repeat_kv of sdpa": (
        "toy-llama", "sdpa",
        lambda m, _: (_halve(m, sdpa_attention, "repeat_kv"),
                      m.setattr(sdpa_attention, "use_gqa_in_sdpa", lambda *_: False, raising=False)),
    ),
    "get_interface": (
        "toy-llama", "sdpa",
        lambda m, _: m.setattr(
            AttentionInterface, "get_interface", lambda self, name, eager: _half(self.get(name, eager))
        ),
    ),
    "torch.rsqrt": ("toy-llama", "sdpa", lambda m, _: _halve(m, torch, "rsqrt")),
    "torch.matmul": ("toy-llama", "eager", lambda m, _: _halve(m, torch, "matmul")),
    "a method of the norm's class": (
        "toy-gemma2", "eager", lambda m, b: _halve(m, type(b.layers[0].input_layernorm), "_norm"),
    ),
    "a method of one norm": ("toy-gemma2", "eager", lambda m, b: _halve(m, b.layers[0].input_layernorm, "_norm")),
    "a method of the attention's class": (
        "toy-falcon", "sdpa", lambda m, b: _halve(m, type(b.h[0].self_attention), "_split_heads"),
    ),
    "a method of PEFT's class": (
        "toy-llama", "sdpa",
        lambda m, b: m.setattr(type(_of_mlp(b, "up_proj")), "_cast_input_dtype", lambda self, x, dtype: 0.5 * x),
    ),
    "a method of one adapter": (
        "toy-llama", "sdpa",
        lambda m, b: m.setattr(_of_mlp(b, "up_proj"), "_cast_input_dtype", lambda x, dtype: 0.5 * x),
    ),
    "the function of an activation": (
        "toy-gemma2", "eager", lambda m, b: m.setattr(_of_mlp(b, "act_fn"), "act", torch.tanh),
    ),
    "a list that skips layers": ("toy-llama", "sdpa", lambda m, b: setattr(b, "layers", _Skipping(b.layers))),
    "all parameters of an adapter": (
        "toy-llama", "sdpa",
        lambda m, b: _replace(
            _of_mlp(b, "up_proj.lora_A.default"), "_parameters",
            weight=nn.Parameter(0.5 * _of_mlp(b, "up_proj.lora_A.default").weight.detach()),
        ),
    ),
    "all modules of an MLP": (
        "toy-llama", "sdpa", lambda m, b: _replace(b.layers[0].mlp, "_modules", act_fn=nn.Tanh()),
    ),
    "all attributes of an MLP": (
        "toy-llama", "sdpa",
        lambda m, b: (setattr(b.layers[0].mlp, "__dict__", dict(b.layers[0].mlp.__dict__)),
                      setattr(b.layers[0].mlp, "act_fn", nn.Tanh())),
    ),
    "all hooks of an MLP": (
        "toy-llama", "sdpa",
        lambda m, b: (setattr(b.layers[0].mlp, "_forward_hooks", OrderedDict()),
                      b.layers[0].mlp.register_forward_hook(lambda _, __, out: 0.5 * out)),
    ),
    "a frozen matrix, assigned anew": ("toy-llama", "sdpa", _frozen_and_assigned),
}  # fmt: skip


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", REACHED)
def test_what_stocks_code_reaches_is_what_counts(change, when, toy, batch_of, step, error_of, monkeypatch):
    """Before the first step, and after one."""
    family, attention, do = REACHED[change]
    lora = {"target_modules": "all-linear"} if family == "toy-falcon" else {}
    batch = batch_of("packed" if "packed" in change else "none")
    results = []
    for patched in (False, True):
        model = toy(family, base={"attn_implementation": attention}, **lora)
        backbone = model.get_base_model().base_model
        if patched:
            patch_model(model, backend="eager")
        unchanged = step(model, batch) if when == "after" else None
        with monkeypatch.context() as context:
            do(context, backbone)
            results.append(step(model, batch))
        assert unchanged is None or results[-1][0] != pytest.approx(unchanged[0], rel=1e-5), "it changes nothing"
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    assert error_of(results[1][1], results[0][1]) < TOLERANCE


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "constant", ["scaling of an adapter", "scaling of attention", "residual_multiplier", "epsilon"]
)
def test_a_constant_that_is_a_tensor_is_trained_or_changes_in_place(constant, when, toy, batch_of, step, error_of):
    family = "toy-granite" if constant == "residual_multiplier" else "toy-llama"
    batch, results = batch_of("none"), []
    for patched in (False, True):
        model = toy(family, base={"attn_implementation": "eager"})
        layer = model.get_base_model().model.layers[1]
        if patched:
            patch_model(model, backend="eager")
        if when == "after":
            step(model, batch)
        made = torch.tensor(0.3, device=next(model.parameters()).device, requires_grad=constant != "epsilon")
        if constant == "scaling of an adapter":
            layer.mlp.up_proj.scaling["default"] = made
        elif constant == "epsilon":
            layer.input_layernorm.variance_epsilon = made
        else:
            name, holder = ("scaling", layer.self_attn) if "attention" in constant else (constant, layer)
            delattr(holder, name)
            setattr(holder, name, nn.Parameter(made.detach()))
            made = getattr(holder, name)
        first, gradients = step(model, batch)
        with torch.no_grad():
            made.mul_(0.5)
        second, others = step(model, batch)
        assert first != pytest.approx(second, rel=1e-5)
        gradients |= {f"then {name}": gradient for name, gradient in others.items()}
        if made.grad is not None:
            gradients["constant"] = made.grad
        results.append((first, second, gradients))
        if patched:
            reasons = " ".join(path.reason for path in ledger_of(model).fallbacks.values())
            assert "not a number" in reasons
    assert results[1][:2] == pytest.approx(results[0][:2], rel=1e-5)
    theirs, ours = ({name: each for name, each in result[2].items() if each.dim()} for result in results)
    assert error_of(ours, theirs) < TOLERANCE
    for name in results[0][2].keys() - theirs.keys():
        # A number's gradient is a sum of terms that cancel: stock's own is up to 1.8e-5 from its gradient in fp64.
        assert results[1][2][name].item() == pytest.approx(results[0][2][name].item(), rel=5 * TOLERANCE)


def test_other_output_embeddings_are_not_the_head_that_stock_calls(toy, batch_of, equal_to_stock):
    model = toy()
    causal = model.get_base_model()
    other = nn.Linear(*reversed(causal.lm_head.weight.shape), bias=False).requires_grad_(False)
    causal.get_output_embeddings = lambda: other.to(causal.device)
    assert equal_to_stock(model, batch_of("none")) == {"lm_head": "get_output_embeddings is not its lm_head"}


class _Halving(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = function(*args, **(kwargs or {}))
        return 0.5 * given if function is nn.functional.silu else given


class _HalvingOperations(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = function(*args, **(kwargs or {}))
        return 0.5 * given if function is torch.ops.aten.silu.default else given


@pytest.mark.parametrize("mode", [_Halving, _HalvingOperations])
def test_a_mode_sees_stocks_calls(mode, toy, batch_of, error_of):
    """Over the forward only: what the engine computes again in the backward would be computed without it."""
    results = []
    for patched in (False, True):
        model = toy()
        batch = on_device(model, batch_of("none"))
        if patched:
            patch_model(model, backend="eager", placement="full")
        with mode():
            loss = model(**batch).loss
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append((loss.item(), gradients))
        if patched:
            assert {path.reason for path in ledger_of(model).fallbacks.values()} == {
                f"{mode.__name__} is a mode that sees PyTorch's {'functions' if mode is _Halving else 'operations'}"
            }
            model(**batch).loss.backward()
            assert not ledger_of(model).fallbacks, "only for that call"
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    assert error_of(results[1][1], results[0][1]) < TOLERANCE


def test_a_default_device_changes_nothing(toy, batch_of, step, error_of):
    """Its mode only says where new tensors are, and the engine says that of its own."""
    model = toy(lora_dropout=0.1)
    patch_model(model, backend="eager", strict=True)
    batch = {**batch_of("none"), "position_ids": torch.arange(23)[None]}
    torch.manual_seed(5)
    loss, gradients = step(model, batch)
    copied = copy.deepcopy(model)
    torch.manual_seed(5)
    with torch.device("meta"):
        again, same = step(copied, batch)
    assert again == pytest.approx(loss, rel=1e-6)
    assert error_of(same, gradients) < TOLERANCE


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_model_on_the_meta_device_has_shapes_only(when, toy, batch_of, step):
    model = toy()
    patch_model(model, backend="eager")
    if when == "after":
        step(model, batch_of("none"))
    model = model.to("meta")
    output = model(**{name: tensor.to("meta") for name, tensor in batch_of("none").items()})
    output.loss.backward()
    assert output.loss.is_meta
    assert output.logits.shape == (4, 23, 512)
    assert "its weight is on the meta device" in ledger_of(model).fallbacks["layers.0"].reason


def test_the_look_at_stocks_inputs_leaves_no_trace_in_dynamic_angles(toy, batch_of, step, error_of):
    """A long forward without gradients, then the first with them: the angles are those of the long one, as in stock."""
    dynamic = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 8}
    results = []
    for patched in (False, True):
        model = toy(base={"rope_parameters": dynamic, "max_position_embeddings": 8})
        if patched:
            patch_model(model, backend="eager", strict=True)
        with torch.no_grad():
            model(**on_device(model, batch_of("none", S=70)))
        results.append((*step(model, batch_of("none")), model.get_base_model().model.rotary_emb.inv_freq))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    assert error_of(results[1][1], results[0][1]) < TOLERANCE
    assert torch.equal(results[1][2], results[0][2])
