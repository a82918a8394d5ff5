"""fastft.data.sources: the order of samples, hashes of batches, the embedded task, random batches."""

import importlib
import json
import subprocess
import sys
from collections import Counter
from itertools import chain
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastft.data.sources import (
    batch_sha256,
    embedded_conversations,
    global_batches,
    load_conversations,
    random_batch,
)
from fastft.errors import DataError

REPOSITORY = Path(__file__).resolve().parents[2]


@given(st.integers(1, 20), st.integers(1, 12), st.integers(0, 20), st.integers())
def test_every_epoch_visits_each_sample_once(count: int, batch_size: int, steps: int, seed: int) -> None:
    batches = list(global_batches(range(count), batch_size=batch_size, steps=steps, seed=seed))
    assert [len(batch) for batch in batches] == [batch_size] * steps
    flat = list(chain.from_iterable(batches))
    for begin in range(0, len(flat) - count + 1, count):
        assert sorted(flat[begin : begin + count]) == list(range(count))


@given(st.integers(1, 20), st.integers(1, 12), st.integers(0, 10), st.integers(0, 10))
def test_a_resumed_run_sees_the_same_batches(count: int, batch_size: int, first: int, steps: int) -> None:
    whole = list(global_batches(range(count), batch_size=batch_size, steps=first + steps, seed=3))
    rest = list(global_batches(range(count), batch_size=batch_size, steps=steps, seed=3, first_step=first))
    assert rest == whole[first:]


def test_the_order_follows_the_seed_and_changes_with_the_epoch() -> None:
    first, second = global_batches(range(50), batch_size=50, steps=2, seed=1)
    assert first != second
    assert first != next(global_batches(range(50), batch_size=50, steps=1, seed=2))
    halves = list(global_batches(range(50), batch_size=25, steps=2, seed=1))
    assert halves[0] + halves[1] == first, "the order is one of samples: the batch size does not change it"


def test_the_order_is_the_same_in_every_process_and_for_ever() -> None:
    """Plans, records and resumed runs rely on it, so the order itself is written down here."""
    assert next(global_batches(range(8), batch_size=8, steps=1, seed=0)) == [0, 2, 1, 4, 6, 7, 3, 5]


def test_no_samples_is_an_error() -> None:
    with pytest.raises(DataError, match="no samples"):
        next(global_batches([], batch_size=1, steps=1, seed=0))


def test_a_hash_sees_values_and_shapes_and_neither_dtype_nor_layout() -> None:
    batch = random_batch(100, 4, 6, seed=0)
    same = {name: tensor.to(torch.int32).T.contiguous().T for name, tensor in batch.items()}
    assert batch_sha256(batch) == batch_sha256(same)
    assert len(batch_sha256(batch)) == 64
    others = [
        {**batch, "input_ids": batch["input_ids"] + 1},
        {**batch, "labels": -batch["labels"]},
        {name: tensor.reshape(6, 4) for name, tensor in batch.items()},
        {"input_ids": batch["input_ids"][[1, 0, 2, 3]], "labels": batch["labels"][[1, 0, 2, 3]]},
    ]
    assert Counter(batch_sha256(other) for other in [batch, *others]).most_common(1)[0][1] == 1


def test_random_batches_follow_their_seed() -> None:
    batch = random_batch(10, 3, 50, seed=4)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in batch.items()} == dict.fromkeys(
        ["input_ids", "labels", "attention_mask"], (torch.Size([3, 50]), torch.int64)
    )
    assert torch.equal(batch["input_ids"], batch["labels"])
    assert batch["input_ids"].data_ptr() != batch["labels"].data_ptr()
    assert batch["attention_mask"].all()
    assert batch["input_ids"].unique().tolist() == list(range(10))
    assert torch.equal(batch["input_ids"], random_batch(10, 3, 50, seed=4)["input_ids"])
    assert not torch.equal(batch["input_ids"], random_batch(10, 3, 50, seed=5)["input_ids"])


def test_a_file_is_read_whole_and_has_no_test_split(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": "q", "answer": str(n)}) + "\n" for n in range(5)))
    assert [row.messages[1].content for row in load_conversations(str(path), count=2, seed=0)] == list("01234")
    with pytest.raises(DataError, match="no test split"):
        load_conversations(str(path), split="test", count=2, seed=0)


def test_embedded_samples_follow_their_split_count_and_seed() -> None:
    train = load_conversations("embedded", count=20, seed=1)
    assert train == embedded_conversations("train", 20, 1)
    assert [row.where for row in train[:2]] == ["embedded train:1", "embedded train:2"]
    test = load_conversations("embedded", split="test", count=20, seed=1)
    assert len(train) == len(test) == 20
    assert not {row.messages for row in train} & {row.messages for row in test}
    assert train != load_conversations("embedded", count=20, seed=2)


def test_the_package_itself_loads_without_torch() -> None:
    code = "import sys, fastft.data; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"


def test_every_public_name_exists() -> None:
    package: ModuleType = importlib.import_module("fastft.data")
    assert all(hasattr(package, name) for name in package.__all__)
