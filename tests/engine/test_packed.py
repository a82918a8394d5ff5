"""Batches that tell where their packed documents start: the same gradients, and nothing is believed that is not so."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DataCollatorWithFlattening

from fastft.engine import backbone
from fastft.engine.packed import confirmation, tell_documents, told_documents
from fastft.kernels.attention.seen import documents_of
from peft_models import gradients_on

TOLERANCE = 5e-5 if torch.cuda.is_available() else 1e-5  # ‖g − stock‖ / ‖stock‖ in fp32


def gradients_of(model: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    return gradients_on(model, batch)[1]


def positions_of(rows: list[list[int]]) -> torch.Tensor:
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows])


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fills with the rows of every batch whose position ids were read before its layers were launched."""
    seen: list[int] = []

    def spy(position_ids: torch.Tensor) -> Any:
        seen.append(len(position_ids))
        return documents_of(position_ids)

    monkeypatch.setattr(backbone, "documents_of", spy)
    return seen


def test_where_the_batch_tells_it_the_device_is_not_asked(toy, patched, batch_of, error_of, asked, runs):
    batch = batch_of("packed")
    stock = gradients_of(toy("toy-qwen2"), batch)
    told = tell_documents(batch)
    for _ in range(3):
        assert error_of(gradients_of(patched, told), stock) < TOLERANCE
    assert not asked
    assert len(runs) == 3, "the layers ran once a forward"
    gradients_of(patched, batch)
    assert len(asked) == 1, "without being told there is no other way"


def test_other_documents_of_the_same_size_are_told_too(toy, patched, batch_of, error_of, asked):
    batch, stock = batch_of("packed", B=2, S=21), toy("toy-qwen2")
    for rows in ([[7, 14], [7, 14]], [[5, 16], [1, 19, 1]], [[21], [20, 1]], [[21], [21]]):
        batch = {**batch, "position_ids": positions_of(rows)}
        assert error_of(gradients_of(patched, tell_documents(batch)), gradients_of(stock, batch)) < TOLERANCE
    assert not asked


@pytest.mark.parametrize(
    "lie",
    [
        {"cu_seq_lens_q": [0, 3, 21, 28, 42]}, {"cu_seq_lens_q": [0, 21, 42], "max_length_q": 21},
        {"cu_seq_lens_q": [0, 7, 14, 21, 28, 42]}, {"max_length_q": 21}, {"cu_seq_lens_q": [-9, 50, 1, 999, 3]},
    ],
    ids=["elsewhere", "fewer", "more", "longest", "beyond"],
)  # fmt: skip
def test_what_is_not_so_is_not_believed(toy, patched, batch_of, error_of, lie, runs):
    batch = batch_of("packed", B=2, S=21)
    stock = gradients_of(toy("toy-qwen2"), batch)
    told = tell_documents(batch)
    assert told["cu_seq_lens_q"].tolist() == [0, 7, 21, 28, 42]
    gradients_of(patched, told)
    runs.clear()
    wrong = {name: torch.tensor(v, dtype=torch.int32) if isinstance(v, list) else v for name, v in lie.items()}
    assert error_of(gradients_of(patched, {**told, **wrong}), stock) < TOLERANCE
    assert len(runs) == 2, "the layers had to run again"


def test_what_hugging_face_s_collator_tells_is_understood(toy, patched, error_of, asked):
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(0, 512, (length,), generator=generator).tolist() for length in (6, 1, 12)]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_tensors="pt")
    batch = collate([{"input_ids": one, "labels": one} for one in ids])
    stock = gradients_of(toy("toy-qwen2"), {name: batch[name] for name in ("input_ids", "labels", "position_ids")})
    for _ in range(2):
        assert error_of(gradients_of(patched, dict(batch)), stock) < TOLERANCE
    assert not asked


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_only_the_truth_is_confirmed(data: st.DataObject) -> None:
    B, S = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))

    def drawn() -> torch.Tensor:
        cuts = [sorted(data.draw(st.sets(st.integers(1, S - 1)))) if S > 1 else [] for _ in range(B)]
        return positions_of([[b - a for a, b in zip([0, *row], [*row, S], strict=True)] for row in cuts])

    positions_BS, other_BS = drawn(), drawn()
    told = told_documents(tell_documents({"position_ids": other_BS}), positions_BS)
    if told is None:
        pytest.fail("what was told fits the batch")
    assert confirmation(positions_BS, told)() == torch.equal(positions_BS, other_BS)
    one_longer = told[0], told[1] + 1
    assert not confirmation(positions_BS, one_longer)()


def test_what_fits_no_batch_of_this_size_tells_nothing() -> None:
    inputs = torch.zeros(2, 5, dtype=torch.int64)
    good = {"cu_seq_lens_q": torch.tensor([0, 5, 10], dtype=torch.int32), "max_length_q": 5}
    assert told_documents(good, inputs) is not None
    bad: list[dict[str, Any]] = [
        {"cu_seq_lens_q": [0, 5, 10]}, {"max_length_q": torch.tensor(5)}, {"max_length_q": 6}, {"max_length_q": 0},
        {"cu_seq_lens_q": torch.tensor([0, 5, 10])}, {"cu_seq_lens_q": torch.tensor([0, 10], dtype=torch.int32)},
        {"cu_seq_lens_q": torch.zeros(12, dtype=torch.int32)}, {"cu_seq_lens_q": None},
    ]  # fmt: skip
    for change in bad:
        assert told_documents({**good, **change}, inputs) is None, change
    assert told_documents({}, inputs) is None


def test_masks_and_batches_on_a_device_are_left_as_they_are(batch_of) -> None:
    for form in ("none", "right"):
        batch = batch_of(form)
        assert tell_documents(batch) == batch
    packed = batch_of("packed")
    assert tell_documents({**packed, "attention_mask": torch.ones(4, 23)}).keys() == {*packed, "attention_mask"}
    away = {"position_ids": torch.zeros(1, 3, dtype=torch.int64, device="meta")}
    assert tell_documents(away) == away
