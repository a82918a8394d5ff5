"""Where batches come from: a file, the embedded task or random tokens, in an order that a seed fixes.

The order is one of samples, not of micro-batches: however a global batch is split, every optimizer step sees
the same samples, and `batch_sha256` proves it.
"""

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from fastft.data.arithmetic import Split, generate
from fastft.data.formats import Conversation, conversation_of, load_rows
from fastft.errors import DataError

Sample = TypeVar("Sample")


def load_conversations(data: str, *, split: Split = "train", count: int, seed: int) -> list[Conversation]:
    """The samples that `data` names: `embedded`, or the path of a file.

    `count` and `seed` are of the embedded task.  A file is read whole and is its own training split.

    Raises:
        DataError: the file cannot be used, or its test split was asked for.
    """
    if data == "embedded":
        return embedded_conversations(split, count, seed)
    if split != "train":
        raise DataError(
            "a file has no test split", got=f"split '{split}' of {data}", allowed="train",
            fix="keep held-out rows in a file of their own and name that",
        )  # fmt: skip
    return load_rows(Path(data))


def embedded_conversations(split: Split, count: int, seed: int) -> list[Conversation]:
    """`count` samples of the embedded arithmetic task; those of `test` never occur in `train`."""
    rows = generate(split, count, seed=seed)
    return [conversation_of(row, where=f"embedded {split}:{number}") for number, row in enumerate(rows, 1)]


def global_batches(
    samples: Sequence[Sample], *, batch_size: int, steps: int, seed: int, first_step: int = 0
) -> Iterator[list[Sample]]:
    """`steps` global batches of exactly `batch_size` samples, one an optimizer step.

    Every epoch visits each sample once, in an order drawn from (`seed`, epoch) alone; a batch may begin in one
    epoch and end in the next.  `first_step` skips that many batches without making them, to resume a run.

    Raises:
        DataError: there are no samples.
    """
    if not samples:
        raise DataError("there are no samples to make batches of", got="an empty list", fix="check the data")
    order: list[int] = []
    epoch_of_order = -1
    for step in range(first_step, first_step + steps):
        batch = []
        for position in range(step * batch_size, (step + 1) * batch_size):
            epoch, place = divmod(position, len(samples))
            if epoch != epoch_of_order:
                order = list(range(len(samples)))
                random.Random(f"{seed}/{epoch}").shuffle(order)
                epoch_of_order = epoch
            batch.append(samples[order[place]])
        yield batch


def batch_sha256(batch: Mapping[str, Tensor]) -> str:
    """The SHA-256 (64 hex digits) of a global batch: shapes and values of `input_ids` and `labels`.

    Equal batches hash equally on every device and in every integer dtype.
    """
    digest = hashlib.sha256()
    for name in ("input_ids", "labels"):
        values = batch[name].detach().to("cpu", torch.int64).contiguous()
        digest.update(f"{name}{tuple(values.shape)}".encode())
        digest.update(values.numpy().astype("<i8", copy=False).tobytes())
    return digest.hexdigest()


def random_batch(vocabulary_size: int, batch_size: int, sequence_tokens: int, *, seed: int) -> dict[str, Tensor]:
    """Uniformly random tokens for models with random weights, where only the shapes matter.

    Returns:
        `input_ids`, `labels` (the same tokens) and `attention_mask` (all ones), int64, `batch_size`×`sequence_tokens`,
        on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    input_ids_BS = torch.randint(vocabulary_size, (batch_size, sequence_tokens), generator=generator)
    return {
        "input_ids": input_ids_BS,
        "labels": input_ids_BS.clone(),
        "attention_mask": torch.ones_like(input_ids_BS),
    }
