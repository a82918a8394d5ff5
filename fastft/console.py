"""What the command line prints: data on stdout; logs, progress and errors on stderr.

A bar is drawn on a terminal only; anywhere else the same progress is plain lines.
"""

import errno
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from fastft.errors import FastftError, OutputError

LOGGERS = ("fastft", "autotune", "bench", "reports")

UNEXPECTED, INTERRUPTED, BROKEN_PIPE = 1, 130, 141
"""Exit codes beside those of `fastft.errors`; the last two are a shell's for SIGINT and SIGPIPE."""

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)


def set_up_logging(*, debug: bool = False) -> None:
    """Send the loggers of fastft and its siblings to stderr: warnings and notes, with `debug` everything."""
    handler = _StderrHandler()
    handler.setFormatter(_Formatter())
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(logging.DEBUG if debug else logging.INFO)
    if not debug:
        # What libraries tell their own developers; their errors still come through.
        warnings.simplefilter("ignore", FutureWarning)
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def on_terminal() -> bool:
    """Whether stderr is a terminal that can draw a bar."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def say(text: str) -> None:
    """One line on stderr."""
    print(printable(text), file=sys.stderr, flush=True)


def print_line(text: str) -> None:
    """One line of data on stdout."""
    print(printable(text), flush=True)


def print_json(value: Any) -> None:
    """`value` as indented JSON on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False), flush=True)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table of plain text on stdout, columns aligned; without lines, so that it can be piped."""
    lines = [[printable(cell) for cell in row] for row in (columns, *rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    sys.stdout.flush()


def printable(text: str) -> str:
    """`text` as one line: what files say may hold line breaks and codes that a terminal would obey."""
    return "".join(letter if letter.isprintable() else " " if letter.isspace() else ascii(letter)[1:-1]
                   for letter in text)  # fmt: skip


class Meter:
    """The progress of one task; see `progress`."""

    def __init__(self, bar: Any = None) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=None) if bar is not None else None

    def update(self, text: str, done: float | None = None, total: float | None = None) -> None:
        """What is happening now.  Seen on a terminal only."""
        if self._bar is not None:
            self._bar.update(self._task, description=printable(text), completed=done, total=total)

    def line(self, text: str) -> None:
        """A line that stays."""
        if self._bar is not None:
            self._bar.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)
        else:
            say(text)


@contextmanager
def progress() -> Iterator[Meter]:
    """A meter: a bar on a terminal, which vanishes at the end, and plain lines elsewhere."""
    if not on_terminal():
        yield Meter()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    )
    # Redirected, stdout would end up on stderr, and a pipe would get nothing.
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as bar:
        yield Meter(bar)


@contextmanager
def keeping(what: str | Callable[[], str]) -> Iterator[None]:
    """Say after Ctrl-C what of the work inside is kept; a function is asked only then."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        said = [str(interrupt), what if isinstance(what, str) else what()]
        raise KeyboardInterrupt("; ".join(filter(None, said))) from None


def report_error(error: BaseException, *, debug: bool = False) -> int:
    """Print `error` as one line on stderr, with `debug` after its traceback; return the exit code."""
    if isinstance(error, BrokenPipeError):
        _forget_stdout()
        return BROKEN_PIPE
    if debug:
        traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, KeyboardInterrupt):
        kept = str(error)
        say(f"interrupted; {kept}" if kept else "interrupted; nothing was left half-written")
        return INTERRUPTED
    known = as_fastft_error(error)
    if known is not None:
        say(f"error: {known}")
        return known.exit_code
    first_line = (str(error).strip().splitlines() or ["no message"])[0]
    say(f"error: unexpected {type(error).__name__}: {first_line}; fix: run again with --debug and report the traceback")
    return UNEXPECTED


def as_fastft_error(error: BaseException) -> FastftError | None:
    """`error`, if it is fastft's own or one whose cause is plain: no space, no permission, no memory."""
    if isinstance(error, FastftError):
        return error
    if isinstance(error, OSError) and error.errno in (*_DISK_FULL, *_REFUSED):
        fix = "free some space" if error.errno in _DISK_FULL else "choose a folder that you may write to"
        return OutputError(f"cannot use {error.filename or 'a file'}", got=error.strerror, fix=fix)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return FastftError(
            "memory ran out",
            got=(str(error).strip().splitlines() or ["no details"])[0],
            fix="set --memory-cap, run `fastft tune`, or lower --micro-batch or --sequence-tokens",
        )
    return None


def _forget_stdout() -> None:
    """Let what is still buffered go nowhere, or the interpreter would complain about it at its end."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what `sys.stderr` is at that moment: a bar puts itself there."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        return prefix + printable(record.getMessage())
