"""Every form of input: masks, positions, embeddings."""

# B rows, S tokens a row, V vocabulary

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastft import patch_model
from fastft.engine import optimizer_step
from fastft.engine.padding import padding_of
from fastft.engine.state import Placed, state_of
from peft_models import on_device

TOLERANCE = 5e-5 if torch.cuda.is_available() else 1e-5  # ‖g − stock‖ / ‖stock‖ in fp32


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
