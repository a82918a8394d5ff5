"""Examples → tensors.  B examples or P packs, S tokens a row, all int64 on the CPU."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastft.data.encoding import IGNORE_INDEX, Example
from fastft.data.packing import Pack
from fastft.errors import DataError


def collate(examples: Sequence[Example], *, pad_token_id: int, pad_to_multiple_of: int = 1) -> dict[str, Tensor]:
    """One row an example, padded on the right to the longest (rounded up to `pad_to_multiple_of`).

    Returns:
        `input_ids`, `attention_mask` (1 for a token, 0 for padding) and `labels` (`IGNORE_INDEX` at padding), B×S.

    Raises:
        DataError: there are no examples.
    """
    longest = _longest([len(example.input_ids) for example in examples])
    width = -(-longest // pad_to_multiple_of) * pad_to_multiple_of
    input_ids_BS = torch.full((len(examples), width), pad_token_id)
    labels_BS = torch.full((len(examples), width), IGNORE_INDEX)
    attention_mask_BS = torch.zeros((len(examples), width), dtype=torch.int64)
    for row, example in enumerate(examples):
        tokens = len(example.input_ids)
        input_ids_BS[row, :tokens] = torch.tensor(example.input_ids)
        labels_BS[row, :tokens] = torch.tensor(example.labels)
        attention_mask_BS[row, :tokens] = 1
    return {"input_ids": input_ids_BS, "attention_mask": attention_mask_BS, "labels": labels_BS}


def collate_packs(packs: Sequence[Pack], *, pad_token_id: int, max_tokens: int | None = None) -> dict[str, Tensor]:
    """One row a pack: its documents one after the other, padded on the right to `max_tokens` or to the longest.

    `position_ids` restart at 0 with every document, and padding is one more document that has no labels.  There
    is deliberately no attention mask: from its absence and the restarts transformers (sdpa, eager, flex) keeps
    attention inside each document, but only with `use_cache=False`; its flash-attention paths see the restarts
    only if there is one row.  The first token of a document is no target: shifted, the last token of the
    document before would be asked for it.

    Returns:
        `input_ids`, `labels` and `position_ids`, P×S.

    Raises:
        DataError: there are no packs, or one is longer than `max_tokens`.
    """
    longest = _longest([sum(len(example.input_ids) for example in documents) for documents in packs])
    width = longest if max_tokens is None else max_tokens
    if longest > width:
        raise DataError(
            "a pack is longer than its row", got=f"{longest} tokens", allowed=f"at most {width}",
            fix="collate with the max_tokens that you packed with",
        )  # fmt: skip
    input_ids_PS = torch.full((len(packs), width), pad_token_id)
    labels_PS = torch.full((len(packs), width), IGNORE_INDEX)
    position_ids_PS = torch.zeros((len(packs), width), dtype=torch.int64)
    for row, documents in enumerate(packs):
        begin = 0
        for example in documents:
            end = begin + len(example.input_ids)
            input_ids_PS[row, begin:end] = torch.tensor(example.input_ids)
            labels_PS[row, begin + 1 : end] = torch.tensor(example.labels[1:])
            position_ids_PS[row, begin:end] = torch.arange(end - begin)
            begin = end
        position_ids_PS[row, begin:] = torch.arange(width - begin)
    return {"input_ids": input_ids_PS, "labels": labels_PS, "position_ids": position_ids_PS}


def _longest(lengths: list[int]) -> int:
    if not lengths:
        raise DataError("there is nothing to collate", got="an empty batch", fix="give at least one example")
    return max(lengths)
