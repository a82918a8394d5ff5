"""PPO's prompts: their rows, their order over epochs, and how they are padded to be answered.

Legend: B rows, S tokens of the longest prompt.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import Sampler

from fastft.errors import DataError


def encode_prompts(rows: Any, tokenizer: Any, *, name: str, processes: int | None = None) -> Dataset:
    """A data set whose rows have their prompt's tokens as `input_ids`.

    Args:
        rows: a `datasets.Dataset` or a list of rows, with `input_ids` or with `prompt`: a text, or a conversation,
            which the tokenizer's chat template turns into one.
        tokenizer: of the model.
        name: what an error calls the rows.
        processes: so many encode.

    Raises:
        DataError: there are no rows, or one has no prompt.
    """
    if isinstance(rows, list):
        rows = Dataset.from_list(rows)
    if not isinstance(rows, Dataset) or not len(rows):
        raise DataError(
            f"{name} is not usable", got=f"{type(rows).__name__}, {len(rows) if isinstance(rows, Dataset) else 0} rows",
            allowed="a datasets.Dataset with rows, or a list of them", fix="pass rows with prompt or input_ids",
        )  # fmt: skip
    if "input_ids" not in rows.column_names:
        if "prompt" not in rows.column_names:
            raise DataError(f"{name} has no prompts", got=rows.column_names, allowed="a column prompt or input_ids")

        def encode(row: dict[str, Any]) -> dict[str, list[int]]:
            if isinstance(row["prompt"], str):
                return {"input_ids": tokenizer(row["prompt"])["input_ids"]}
            told = tokenizer.apply_chat_template(
                row["prompt"], add_generation_prompt=True, tokenize=True, return_dict=True
            )
            return {"input_ids": told["input_ids"]}

        rows = rows.map(encode, num_proc=processes, desc="Tokenizing prompts")
    for number, ids in enumerate(rows["input_ids"]):
        if not len(ids):
            raise DataError(f"row {number} of {name} has an empty prompt", got=0, allowed="1 token or more")
    return rows


class EpisodeSampler(Sampler[int]):
    """Rows in a new random order each epoch, without end; an epoch's rest, too small for an update, is left out."""

    def __init__(self, rows: int, batch: int, *, process: int, processes: int, seed: int, updates_done: int) -> None:
        """Of so many rows, `batch` an update for each of the processes; begin after the updates that are done."""
        self._rows, self._batch, self._process, self._processes = rows, batch, process, processes
        self._seed, self._update = seed, updates_done

    def __iter__(self) -> Iterator[int]:
        size = self._batch * self._processes
        an_epoch, update = self._rows // size, self._update
        while True:
            epoch, within = divmod(update, an_epoch)
            order = torch.randperm(self._rows, generator=torch.Generator().manual_seed(self._seed + epoch)).tolist()
            for number in range(within, an_epoch):
                start = number * size + self._process * self._batch
                yield from order[start : start + self._batch]
            update = (epoch + 1) * an_epoch


def left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts with padding before them, and which tokens are real (each B × S, int64)."""
    longest = max(map(len, prompts))
    ids = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
