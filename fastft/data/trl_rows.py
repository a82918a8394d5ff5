"""Rows in TRL's formats, checked before anything is trained: https://huggingface.co/docs/trl/dataset_formats.

A text is a string ("standard") or a list of messages `{"role": …, "content": …}` ("conversational"); all texts of a
file are of one kind.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastft.data.formats import read_rows
from fastft.errors import DataError

ROLES = ("system", "user", "assistant")
_TEXTS = ("prompt", "chosen", "rejected", "completion")
_ANSWERS = ("chosen", "rejected", "completion")


@dataclass(frozen=True)
class RowFormat:
    """What a method asks of a row."""

    required: tuple[str, ...]
    example: str
    optional: tuple[str, ...] = ()
    prompt_in_messages: bool = False
    """Whether a conversational row may leave out its prompt: it is what its two answers share, as TRL takes it."""
    further: bool = False
    """Whether all other columns are kept, for a reward function; else they are dropped, and named."""
    reserved: tuple[str, ...] = ()
    """Columns that a row may not have: a reward function gets something else by that name."""


PREFERENCE = RowFormat(
    ("prompt", "chosen", "rejected"), '{"prompt": …, "chosen": …, "rejected": …}', prompt_in_messages=True
)
SCORED_PAIR = RowFormat(
    ("chosen", "rejected"), '{"prompt": … (optional), "chosen": …, "rejected": …, "margin": number (optional)}',
    optional=("prompt", "margin"),
)  # fmt: skip
JUDGEMENT = RowFormat(("prompt", "completion", "label"), '{"prompt": …, "completion": …, "label": true or false}')
PROMPT = RowFormat(
    ("prompt",), '{"prompt": …, and columns for the reward function}', further=True,
    reserved=("prompts", "completion", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"),
)  # fmt: skip


@dataclass(frozen=True)
class TrlRows:
    """Checked rows, all with the same columns."""

    rows: list[dict[str, Any]]
    places: list[str]
    """Where each came from: `file:line`."""
    conversational: bool
    dropped: tuple[str, ...]
    """Columns that the method does not read."""


def load_trl_rows(path: Path, wanted: RowFormat) -> TrlRows:
    """The rows of a JSON, JSON Lines or parquet file.

    Raises:
        DataError: the file cannot be read, or a row is not as `wanted`.
    """
    return check_rows(read_rows(path, allowed=wanted.example), wanted)


def check_rows(rows: Iterable[tuple[str, Any]], wanted: RowFormat) -> TrlRows:
    """`rows`, each with the place that errors name, as a method can train on them.

    Raises:
        DataError: a row lacks a column, has one of the wrong kind, or is not like the rows before it.
    """
    known = {*wanted.required, *wanted.optional}
    kept: list[dict[str, Any]] = []
    places: list[str] = []
    further: set[str] = set()
    first: tuple[frozenset[str], bool] | None = None
    for where, row in rows:
        conversational = _check(row, wanted, where)
        further |= row.keys() - known - {"id"}
        row = {name: value for name, value in row.items() if name not in known or value is not None}
        this = (frozenset(row.keys() & known), conversational)
        if first is None:
            first = this
        elif this != first:
            raise DataError(
                f"{where} is not like the rows before it", got=_describe(*this), allowed=_describe(*first),
                fix="give all rows the same columns, and all texts as strings or all as messages",
            )  # fmt: skip
        kept.append(row)
        places.append(where)
    if first is None:
        raise DataError("the data holds no rows", allowed=wanted.example, fix="add a row")
    columns = [name for name in (*wanted.required, *wanted.optional) if name in first[0]]
    columns += sorted(further) if wanted.further else []
    return TrlRows(
        [{name: row.get(name) for name in columns} for row in kept], places, first[1],
        dropped=() if wanted.further else tuple(sorted(further)),
    )  # fmt: skip


def _check(row: Any, wanted: RowFormat, where: str) -> bool:
    """Whether a row is conversational."""
    if not isinstance(row, Mapping):
        raise DataError(
            f"{where} is not an object", got=row, allowed=wanted.example, fix="write one object a line, or one list"
        )
    texts = {name: row[name] for name in _TEXTS if name in {*wanted.required, *wanted.optional} and name in row}
    texts = {name: text for name, text in texts.items() if text is not None}
    kinds = {name: _is_conversational(text, name, where) for name, text in texts.items()}
    missing = [name for name in wanted.required if row.get(name) is None]
    if missing == ["prompt"] and wanted.prompt_in_messages and all(kinds.values()):
        missing = []
    if missing:
        raise DataError(
            f"{where} has no '{missing[0]}'", got=f"columns {', '.join(map(str, row)) or 'none'}",
            allowed=wanted.example, fix="add the column, or choose the method that these rows are for",
        )  # fmt: skip
    if len({*kinds.values()}) > 1:
        said = ", ".join(f"'{name}' {'messages' if kind else 'text'}" for name, kind in kinds.items())
        raise DataError(f"{where} mixes text and messages", got=said, allowed="one of them", fix="convert the row")
    if "label" in wanted.required and not isinstance(row["label"], bool):
        raise DataError(f"{where}: 'label' is no label", got=row["label"], allowed="true or false", fix="correct it")
    margin = row.get("margin") if "margin" in wanted.optional else None
    if margin is not None and (isinstance(margin, bool) or not isinstance(margin, int | float)):
        raise DataError(f"{where}: 'margin' is no number", got=margin, fix="correct it, or leave it out")
    taken = [name for name in wanted.reserved if name in row]
    if taken:
        raise DataError(
            f"{where} has a column '{taken[0]}', by which a reward function is given something else",
            got=", ".join(map(str, row)), fix="rename the column",
        )  # fmt: skip
    return next(iter(kinds.values()))


def _is_conversational(text: Any, name: str, where: str) -> bool:
    """Whether `text` is a list of messages, each of them checked; else it is a string."""
    if isinstance(text, str):
        if name in _ANSWERS and not text.strip():
            raise DataError(f"{where}: '{name}' is empty", fix="fill it in or remove the row")
        return False
    if not isinstance(text, list) or not text:
        raise DataError(
            f"{where}: '{name}' is neither text nor messages", got=text,
            allowed='a string, or [{"role": …, "content": …}, …]', fix="correct the row",
        )  # fmt: skip
    for number, message in enumerate(text, 1):
        fits = isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        if not fits or message["role"] not in ROLES:
            raise DataError(
                f"{where}: message {number} of '{name}' is no message", got=message,
                allowed=f'{{"role": one of {", ".join(ROLES)}, "content": text}}', fix="correct the row",
            )  # fmt: skip
    if name in _ANSWERS and (text[-1]["role"] != "assistant" or not text[-1]["content"].strip()):
        raise DataError(
            f"{where}: '{name}' does not end with an answer", got=text[-1], allowed="a message of the assistant",
            fix="correct the row",
        )  # fmt: skip
    return True


def _describe(columns: frozenset[str], conversational: bool) -> str:
    return f"columns {', '.join(sorted(columns))}, {'messages' if conversational else 'texts'}"
