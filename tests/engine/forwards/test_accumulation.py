"""Micro-batches, the number of items, labels and the loss function."""

# B rows, S tokens a row, V vocabulary

from typing import Any

import pytest
import torch
from torch import Tensor

from fastft import patch_model
from peft_models import on_device

TOLERANCE = 5e-5 if torch.cuda.is_available() else 1e-5  # ‖g − stock‖ / ‖stock‖ in fp32


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
