"""The cache folder: where it is, and files in it that many processes read and write at the same time.

A reader never sees half a file, and a bad file never ends a run: it is moved away with one warning.
"""

import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from fastft.errors import OutputError, PlanError

LOCK_SECONDS = 30.0

_log = logging.getLogger(__name__)
_STRINGS_AND_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)

Content = TypeVar("Content")


def cache_folder() -> Path:
    """`FASTFT_CACHE_DIR`, or the user's cache folder for fastft."""
    folder = os.environ.get("FASTFT_CACHE_DIR")
    if folder:
        return Path(folder).expanduser()
    import platformdirs

    return platformdirs.user_cache_path("fastft")


def read_json_text(path: Path, *, what: str, most_bytes: int, most_depth: int) -> str:
    """The text of a JSON file that is not too large and does not nest too deeply; it is not parsed.

    Raises:
        PlanError: it cannot be read, has more than `most_bytes`, is no UTF-8, or nests deeper than `most_depth`.
    """
    try:
        with path.open("rb") as stream:
            raw = stream.read(most_bytes + 1)
    except OSError as error:
        raise PlanError(
            f"cannot read the {what} {path}", got=error.strerror or str(error), fix="check the path"
        ) from error
    if len(raw) > most_bytes:
        raise PlanError(
            f"{what} {path} is too large", got=f"more than {most_bytes // 2**20} MiB",
            fix=f"a {what} has some kilobytes; take another file",
        )  # fmt: skip
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise PlanError(
            f"{what} {path} cannot be parsed", got=str(error)[:120], fix="remove it and run `fastft tune` again"
        ) from error
    if _depth(text) > most_depth:
        raise PlanError(f"{what} {path} nests too deeply", allowed=f"{most_depth} levels", fix="take another file")
    return text


def read_or_quarantine(path: Path, read: Callable[[Path], Content], *, what: str, quarantine: Path) -> Content | None:
    """What `read` makes of `path`; None if there is no such file, or a bad one, which is moved into `quarantine`.

    Args:
        read: raises PlanError for a bad file.
        what: the kind of file, for messages.
    """
    if not path.exists():
        return None
    try:
        return read(path)
    except PlanError:
        pass  # decided below: a writer may be replacing it just now
    try:
        with locked(path, what=what):
            if not path.exists():
                return None
            try:
                return read(path)
            except PlanError as error:
                quarantine.mkdir(parents=True, exist_ok=True)
                target = quarantine / f"{path.name}.{time.time_ns()}"
                path.replace(target)
                _log.warning("a %s is not used and was moved to %s: %s", what, target, error)
    except (OSError, OutputError) as error:
        _log.warning("%s %s is bad and cannot be moved away, it is not used: %s", what, path, error)
    return None


@contextmanager
def locked(path: Path, *, what: str) -> Iterator[None]:
    """Hold the lock beside the file `path`.

    Raises:
        OutputError: the folder cannot be written, or another process holds the lock for 30 seconds.
    """
    with ExitStack() as held:
        try:
            held.enter_context(cache_lock(Path(f"{path}.lock"), timeout=LOCK_SECONDS))
        except TimeoutError as error:
            raise OutputError(
                f"the {what} {path} is locked", got=f"no answer in {LOCK_SECONDS:.0f} s",
                fix="end the process that holds it",
            ) from error  # fmt: skip
        yield


@contextmanager
def cache_lock(path: Path, *, timeout: float = -1) -> Iterator[None]:
    """Hold the lock file `path` under the cache folder, which is created where it is missing.

    Args:
        timeout: seconds to wait for another holder; negative waits for ever.

    Raises:
        TimeoutError: another process holds it.
        OutputError: the folder cannot be written.
    """
    import filelock

    lock = filelock.FileLock(path, timeout=timeout)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout as error:
        raise TimeoutError(str(path)) from error
    except OSError as error:
        raise OutputError(
            f"cannot lock {path}", got=error.strerror or str(error),
            fix="set FASTFT_CACHE_DIR to a folder that you may write to",
        ) from error  # fmt: skip
    try:
        yield
    finally:
        lock.release()


def _depth(text: str) -> int:
    """The deepest nesting of arrays and objects, brackets inside strings not counted."""
    depth = deepest = 0
    for match in _STRINGS_AND_BRACKETS.finditer(text):
        if match[0] in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif match[0] in "]}":
            depth -= 1
    return deepest
