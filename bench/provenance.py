"""Where a record comes from: commit, command line and time."""

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

_HERE = Path(__file__).resolve()


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What ties the records of one run to the code and the command that made them."""

    git_commit: str | None
    """40 hex digits, `+dirty` appended when tracked files differ from it; None outside a checkout."""
    command: str


def provenance() -> Provenance:
    """The commit of this checkout and the command line of this process.

    A copy without its history (a container, say) may be told its commit in `FASTFT_COMMIT`.
    """
    commit = git_commit() or os.environ.get("FASTFT_COMMIT")
    return Provenance(git_commit=commit, command=command_line())


def command_line() -> str:
    """How to run this again: `fastft bench …`, whatever the interpreter and wherever it is installed."""
    program = Path(sys.argv[0])
    if program.stem == "fastft" or program.parts[-2:] == ("fastft", "__main__.py"):
        words = ["fastft"]
    elif program.parts[-2:] == ("bench", "__main__.py"):
        words = ["python", "-m", "bench"]
    else:
        words = [program.name]
    return shlex.join([*words, *sys.argv[1:]])


def utc_now() -> str:
    """The time in ISO 8601, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def git_commit(file: Path = _HERE) -> str | None:
    """The commit of the checkout that tracks `file`, with `+dirty` if tracked files were changed.

    An installed copy may lie inside somebody else's checkout (a virtual environment in a repository), whose
    commit says nothing about this code: so the file has to be tracked.
    """
    if _git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
        return None
    commit = _git(file.parent, "rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _git(file.parent, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+dirty" if changed else commit


def _git(folder: Path, *arguments: str) -> str | None:
    """The output of a git command, or None if it failed or there is no git."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
