"""Writing files so that a reader never sees half of one, and a failure leaves the old one in place."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastft.errors import OutputError

_ANOTHER_FOLDER = "free some space or choose a folder that you may write to"


def canonical_json(value: Any) -> str:
    """`value` as JSON with sorted keys and no spaces: equal values give equal text, so it can be hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_of(value: Any) -> str:
    """The SHA-256 (64 hex digits) of `value`'s canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def write_atomically(path: Path, data: str | bytes) -> None:
    """Write `data` (text as UTF-8) to `path`: a temporary file beside it, fsync, rename.

    Raises:
        OutputError: the folder cannot be created, the disk is full, or writing is not permitted; whatever
            stood at `path` is still there and no temporary file is left.  An interrupt leaves none either.
    """
    raw = data.encode() if isinstance(data, str) else data
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                # `mkstemp` makes files that only their owner may read; give this one the usual permissions.
                umask = os.umask(0)
                os.umask(umask)
                os.fchmod(handle, 0o666 & ~umask)
                stream.write(raw)
                stream.flush()
                os.fsync(stream.fileno())
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OutputError(
            f"cannot write {path}",
            got=error.strerror or str(error),
            fix=_ANOTHER_FOLDER,
        ) from error


def append_line(
    path: Path,
    text: str,
    *,
    name: str | None = None,
    fix: str = _ANOTHER_FOLDER,
) -> None:
    """Add one line to `path`, on disk when this returns; its folder is made.

    A torn last line, as a power cut leaves it, is ended first, so that it does not swallow this one.

    Args:
        name: what an error calls the file; None for its path.
        fix: what an error advises.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as stream:
            torn = False
            if stream.seek(0, os.SEEK_END):
                stream.seek(-1, os.SEEK_END)
                torn = stream.read(1) != b"\n"
            stream.write(b"\n" * torn + text.encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise OutputError(f"cannot write {name or path}", got=error.strerror or str(error), fix=fix) from error


def unfinished_writes(folder: Path) -> Iterator[tuple[Path, Path]]:
    """(temporary file, what it was to become) of each `write_atomically` in `folder` that goes on or was killed."""
    for temporary in sorted(folder.glob(".*.*.tmp")):
        yield temporary, folder / temporary.name[1:].rsplit(".", 2)[0]


def new_folder(path: Path, *, what: str) -> Path:
    """Claim `path` as an output folder: it must not exist, or be empty.

    Raises:
        OutputError: it holds something already, is a file, or cannot be created.
    """
    if path.is_file():
        raise OutputError(f"the {what} folder is a file", got=str(path), fix="choose another folder")
    if path.is_dir() and any(path.iterdir()):
        raise OutputError(
            f"the {what} folder is not empty",
            got=str(path),
            allowed="a new or empty folder",
            fix="choose another folder or remove this one; nothing was overwritten",
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot create the {what} folder {path}",
            got=error.strerror or str(error),
            fix="choose a folder that you may write to",
        ) from error
    return path
