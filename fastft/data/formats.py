"""Files of training rows → conversations.

A file is JSON Lines (one object a line), one JSON list, or parquet, in one of four formats:

    instruction     {"instruction": …, "output": …}, optionally "input"
    messages        {"messages": [{"role": …, "content": …}, …]}             (ChatML, OpenAI)
    conversations   {"conversations": [{"from": …, "value": …}, …]}          (ShareGPT)
    question        {"question": …, "answer": …}                             (GSM8K)

Every row may also carry an `id`, which is ignored; any other key is refused, because what it means for
training would be a guess.  The format is read off the first row, and every other row must follow it.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastft.errors import DataError

Role = Literal["system", "user", "assistant"]

_MESSAGE_ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}
_SHAREGPT_ROLES: dict[str, Role] = {**_MESSAGE_ROLES, "human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Message:
    """One turn.  What an `assistant` says is what is trained on."""

    role: Role
    content: str


@dataclass(frozen=True)
class Conversation:
    """One sample: its turns, and where it came from (`file:line`).

    Raises:
        DataError: no answer, an empty answer, an answer before the first question, or text that is not Unicode.
    """

    messages: tuple[Message, ...]
    where: str

    def __post_init__(self) -> None:
        answers = [message for message in self.messages if message.role == "assistant"]
        if not answers:
            raise DataError(
                f"{self.where} has no answer", got=[message.role for message in self.messages],
                allowed="at least one assistant message", fix="add the answer or remove the row",
            )  # fmt: skip
        if not all(message.content.strip() for message in answers):
            raise DataError(
                f"{self.where} has an empty answer", got=[message.content for message in answers],
                allowed="text", fix="fill it in or remove the row",
            )  # fmt: skip
        if self.messages[0].role == "assistant":
            raise DataError(
                f"{self.where} begins with an answer", got=[message.role for message in self.messages],
                allowed="a system or user message first", fix="remove that turn or add the question before it",
            )  # fmt: skip
        for message in self.messages:
            try:
                message.content.encode()
            except UnicodeEncodeError as error:
                raise DataError(
                    f"{self.where} holds half of a surrogate pair, which is no character",
                    got=ascii(message.content[error.start : error.end]), fix="write the file anew as UTF-8",
                ) from error  # fmt: skip


def load_rows(path: Path) -> list[Conversation]:
    """Every row of the file at `path`, in the file's order.

    Raises:
        DataError: the file is missing, a folder, empty or not UTF-8, or a row (named by its line) is not JSON,
            mixes formats, has unknown or missing keys, an unknown role, or no answer.
    """
    conversations = []
    first: str | None = None
    for where, row in read_rows(path, allowed=_ALLOWED):
        name = _format_of(row, where)
        if first is None:
            first = name
        elif name != first:
            raise DataError(
                f"{where} mixes formats", got=f"'{name}', after '{first}' in the rows before", allowed=f"'{first}'",
                fix="put each format into its own file",
            )  # fmt: skip
        conversations.append(conversation_of(row, where=where))
    return conversations


def read_rows(path: Path, *, allowed: object) -> Iterator[tuple[str, Any]]:
    """(`file:line`, value) of every row of a file, of which there is at least one; `allowed` says in errors what rows
    may be.  The content, not the file's suffix, tells parquet, a JSON list and JSON Lines apart.  In parquet, a column
    that is null in a row is none of that row's.

    Raises:
        DataError: the file is missing, a folder, empty, or cannot be parsed.
    """
    raw = _read(path)
    if raw.startswith(_PARQUET):
        rows = _parquet_rows(path)
    else:
        text = _decode(raw, path)
        if not text.strip():
            raise DataError("the data file is empty", got=str(path), allowed=allowed, fix="add at least one row")
        rows = _rows(text, path)
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise DataError("the data file holds an empty list", got=str(path), allowed=allowed, fix="add a row")


def conversation_of(row: Mapping[str, Any], *, where: str) -> Conversation:
    """One row of any format as a conversation; `where` names it in errors.

    Raises:
        DataError: as `load_rows`.
    """
    chosen = _FORMATS[_format_of(row, where)]
    missing = chosen.required - row.keys()
    if missing:
        raise DataError(
            f"{where} has no '{min(missing)}'", got=f"keys {_names(row)}", allowed=chosen.example,
            fix="add the key or remove the row",
        )  # fmt: skip
    unknown = row.keys() - chosen.required - chosen.optional - {"id"}
    if unknown:
        raise DataError(
            f"{where} has unknown keys", got=", ".join(sorted(unknown)), allowed=_ALLOWED,
            fix="remove or rename them",
        )  # fmt: skip
    return Conversation(tuple(chosen.messages(row, where)), where)


def _instruction(row: Mapping[str, Any], where: str) -> list[Message]:
    parts = [_text(row, "instruction", where), _text(row, "input", where) if "input" in row else ""]
    question = "\n\n".join(part for part in parts if part)
    return [Message("user", question), Message("assistant", _text(row, "output", where))]


def _question(row: Mapping[str, Any], where: str) -> list[Message]:
    return [Message("user", _text(row, "question", where)), Message("assistant", _text(row, "answer", where))]


def _turns(list_key: str, role_key: str, text_key: str, roles: dict[str, Role]) -> "_Reader":
    def read(row: Mapping[str, Any], where: str) -> list[Message]:
        turns = row[list_key]
        if not isinstance(turns, list) or not turns:
            raise DataError(
                f"{where}: '{list_key}' is not a list of turns", got=turns,
                allowed=f'[{{"{role_key}": …, "{text_key}": …}}, …]', fix="correct the row",
            )  # fmt: skip
        messages = []
        for number, turn in enumerate(turns, 1):
            here = f"{where}, turn {number}"
            if not isinstance(turn, dict) or turn.keys() != {role_key, text_key}:
                raise DataError(
                    f"{here} is not a turn", got=_names(turn) if isinstance(turn, dict) else turn,
                    allowed=f"an object with '{role_key}' and '{text_key}' alone", fix="correct the turn",
                )  # fmt: skip
            role = roles.get(_text(turn, role_key, here))
            if role is None:
                raise DataError(
                    f"{here} has an unknown role", got=turn[role_key], allowed=sorted(roles),
                    fix="rename the role or remove the row",
                )  # fmt: skip
            messages.append(Message(role, _text(turn, text_key, here)))
        return messages

    return read


_Reader = Callable[[Mapping[str, Any], str], list[Message]]


@dataclass(frozen=True)
class _Format:
    example: str
    required: frozenset[str]
    messages: _Reader
    optional: frozenset[str] = frozenset()


_FORMATS = {
    # By the key that tells the formats apart.
    "instruction": _Format(
        '{"instruction": …, "input": … (optional), "output": …}',
        frozenset({"instruction", "output"}), _instruction, frozenset({"input"}),
    ),
    "messages": _Format(
        '{"messages": [{"role": …, "content": …}]}',
        frozenset({"messages"}), _turns("messages", "role", "content", _MESSAGE_ROLES),
    ),
    "conversations": _Format(
        '{"conversations": [{"from": …, "value": …}]}',
        frozenset({"conversations"}), _turns("conversations", "from", "value", _SHAREGPT_ROLES),
    ),
    "question": _Format('{"question": …, "answer": …}', frozenset({"question", "answer"}), _question),
}  # fmt: skip

_PARQUET = b"PAR1"
"""A parquet file's first bytes."""
_ALLOWED = [each.example for each in _FORMATS.values()]


def _format_of(row: object, where: str) -> str:
    if not isinstance(row, Mapping):
        raise DataError(
            f"{where} is not an object", got=row, allowed=_ALLOWED, fix="write one object a line, or one list of them"
        )
    found = [name for name in _FORMATS if name in row]
    if len(found) != 1:
        what = "mixes the keys of several formats" if found else "has no known format"
        raise DataError(
            f"{where} {what}", got=f"keys {_names(row)}", allowed=_ALLOWED, fix="convert the rows to one format"
        )
    return found[0]


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise DataError(f"{where}: '{key}' is not text", got=value, allowed="a string", fix="correct the row")
    return value


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(map(str, row)) or "none"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"cannot read the data file {path}", got=error.strerror or str(error), allowed="a JSONL or JSON file",
            fix="check the path",
        ) from error  # fmt: skip


def _decode(raw: bytes, path: Path) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line} is not UTF-8", got=raw[error.start : error.end], fix="convert the file to UTF-8"
        ) from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not parquet", got=str(error).splitlines()[0], fix="write the file anew") from error
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", {name: value for name, value in row.items() if value is not None}


def _rows(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    """(`file:line`, value) of every row; the content, not the file's suffix, tells a list from JSON Lines."""
    if not text.lstrip().startswith("["):
        # splitlines() would also cut at U+2028 and U+0085, which JSON allows inside a string.
        for number, content in enumerate(text.split("\n"), 1):
            if content.strip():
                yield f"{path}:{number}", _parse(content, f"{path}:{number}")
        return
    _parse(text, str(path))
    decoder = json.JSONDecoder()
    position, line, counted = text.index("[") + 1, 1, 0
    while True:
        while text[position] in ", \t\r\n":
            position += 1
        if text[position] == "]":
            return
        line += text.count("\n", counted, position)
        counted = position
        value, position = decoder.raw_decode(text, position)
        yield f"{path}:{line}", value


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        here = where if error.lineno == 1 else f"{where}:{error.lineno}"
        raise DataError(
            f"{here} is not JSON", got=f"{error.msg} at column {error.colno}",
            allowed="one JSON object a line, or one JSON list", fix="correct or remove the line",
        ) from error  # fmt: skip
    except RecursionError as error:
        raise DataError(f"{where} is nested too deeply", fix="remove the line") from error
