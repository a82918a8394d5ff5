"""PlanStore: the cache folder that keeps plans, one canonical JSON file a key.

    <cache>/plans/<key digest>.json        a plan;  <key digest>.json.lock guards it
    <cache>/plans/quarantine/              files that were corrupt or held a plan for another key

A reader never sees half a file, a bad file never ends a run (it is moved away with one warning, and the
default is used), and the name of a file comes from the key alone, never from what the file says.
"""

import re
import time
import unicodedata
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

from fastft.cache import cache_folder, locked, read_json_text, read_or_quarantine
from fastft.config import RunConfig
from fastft.errors import OutputError, PlanError
from fastft.files import unfinished_writes, write_atomically
from fastft.kernels.launches import read_launches
from fastft.plan import Plan, PlanKey

MAX_PLAN_BYTES = 4 * 2**20
MAX_DEPTH = 32
"""Nesting of a plan's JSON; a real one has 6."""
PLAN_BACKENDS = tuple(name for name in get_args(RunConfig.model_fields["backend"].annotation) if name != "auto")
MAX_QUOTED_LETTERS = 200
"""Of a bad file, in a message."""


def read_plan(path: Path) -> Plan:
    """Read and validate one plan file.

    Raises:
        PlanError: it cannot be read, is larger than 4 MiB, nests too deeply, is no plan of this schema, or fails
            its checksum, or its kernels' launches are not declared in `fastft.kernels.launches`.
    """
    text = read_json_text(path, what="plan", most_bytes=MAX_PLAN_BYTES, most_depth=MAX_DEPTH)
    try:
        plan = Plan.from_json(text, where=str(path))
        for choices in (plan.choices, *(trial.choices for trial in plan.evidence.trials)):
            read_launches(choices.kernels)
    except PlanError as error:
        raise PlanError(error.what, got=_shortened(error.got), allowed=error.allowed, fix=error.fix) from error
    except (ValueError, RecursionError, OverflowError) as error:
        # A number of thousands of digits is a ValueError, but no JSONDecodeError.
        raise PlanError(
            f"plan {path} cannot be parsed", got=str(error)[:120], fix="remove it and run `fastft tune` again"
        ) from error
    return plan


def read_foreign_plan(path: Path) -> Plan:
    """`read_plan` for a file that came from elsewhere, labelled `imported`.

    Its text is shown in a terminal and its names select code, so it may hold known names and no control
    characters only.

    Raises:
        PlanError: as `read_plan`, or for such a name or character.
    """
    plan = read_plan(path)
    choices = [plan.choices, *(trial.choices for trial in plan.evidence.trials)]
    fix = "take another file, or run `fastft tune`"
    for choice in choices:
        if choice.backend not in PLAN_BACKENDS:
            raise PlanError(
                f"plan {path} names an unknown backend",
                got=_shortened(repr(choice.backend)),
                allowed=PLAN_BACKENDS,
                fix=fix,
            )
        if re.fullmatch(r"[a-z0-9_]{1,40}", choice.attention) is None:
            raise PlanError(f"plan {path} names an unknown attention", got=_shortened(repr(choice.attention)), fix=fix)
    if any(unicodedata.category(letter) == "Cc" for text in _strings(plan.model_dump()) for letter in text
           if letter not in "\n\t"):  # fmt: skip
        raise PlanError(f"plan {path} holds control characters", fix=fix)
    return plan.model_copy(update={"origin": "imported"})


class PlanStore:
    """Plans below a cache folder.  Any number of processes may read and write it at the same time."""

    def __init__(self, folder: Path | None = None) -> None:
        """`folder` is the cache folder; None takes `cache_folder()`.  Nothing is created before the first save."""
        self.cache = Path(folder) if folder is not None else cache_folder()
        self.folder = self.cache / "plans"
        self.quarantine = self.folder / "quarantine"

    def path(self, key: PlanKey) -> Path:
        """Where the plan for `key` is kept."""
        return self.folder / f"{key.digest}.json"

    def load(self, key: PlanKey) -> Plan | None:
        """The plan for `key`; None if there is none, or only a bad file (which is moved to quarantine)."""
        plan = self._read_or_quarantine(self.path(key))
        # The digest has 64 bits: a collision is not expected, but it would give a wrong plan.
        return plan if plan is not None and plan.key == key else None

    def save(self, plan: Plan) -> Path:
        """Keep `plan`, replacing one for the same key.

        Raises:
            OutputError: the folder cannot be written, or another process holds the lock for 30 seconds.
        """
        path = self.path(plan.key)
        with locked(path, what="plan"):
            write_atomically(path, plan.to_json())
        return path

    def entries(self) -> list[Plan]:
        """Every plan, the newest first; bad files are moved to quarantine."""
        plans = [plan for path in self._files() if (plan := self._read_or_quarantine(path)) is not None]
        return sorted(plans, key=lambda plan: (plan.evidence.created_at, plan.id), reverse=True)

    def find(self, prefix: str) -> Plan:
        """The one stored plan whose id starts with `prefix`; see `find_plan`."""
        return find_plan(self.entries(), prefix)

    def import_file(self, path: Path, *, force: bool = False) -> Plan:
        """Validate a plan file and keep it, labelled `imported`.

        Raises:
            PlanError: the file is no valid plan (see `read_foreign_plan`).
            OutputError: another plan for the same key is here and `force` is false.
        """
        plan = read_foreign_plan(path)
        present = self.load(plan.key)
        if present is not None and present != plan and not force:
            raise OutputError(
                "a plan for the same key is here already", got=present.id, fix="export it first, or import with --force"
            )
        self.save(plan)
        return plan

    def export(self, plan: Plan, path: Path, *, force: bool = False) -> None:
        """Write `plan` to the file `path`, for `import_file` elsewhere.

        Raises:
            OutputError: the file exists and `force` is false, or it cannot be written.
        """
        if path.exists() and not force:
            raise OutputError("the file exists already", got=str(path), fix="choose another name, or use --force")
        write_atomically(path, plan.to_json())

    def prune(self, older_than_days: float | None = None, stale: Callable[[Plan], bool] | None = None) -> list[Plan]:
        """Remove plans older than `older_than_days`, and those that `stale` names; return what was removed.

        A plan without a readable date has the age of its file.  Without arguments no plan is removed.  Temporary
        files that killed writers left are removed in any case.
        """
        for temporary, path in unfinished_writes(self.folder):
            with locked(path, what="plan"):  # nobody writes this plan now, so the file is nobody's
                temporary.unlink(missing_ok=True)
        removed = []
        for path in self._files():
            with locked(path, what="plan"):
                try:
                    plan = _examine(path)
                    old = older_than_days is not None and _age_seconds(plan, path) > older_than_days * 86400
                except (PlanError, OSError):
                    continue
                if old or (stale is not None and stale(plan)):
                    path.unlink(missing_ok=True)
                    removed.append(plan)
        return removed

    def verify(self) -> list[tuple[Path, str | None]]:
        """Each file with what is wrong with it, or None; nothing is moved."""
        report: list[tuple[Path, str | None]] = []
        for path in self._files():
            try:
                _examine(path)
                report.append((path, None))
            except PlanError as error:
                if not isinstance(error.__cause__, FileNotFoundError):  # it was pruned meanwhile
                    report.append((path, str(error)))
        return report

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.json"))

    def _read_or_quarantine(self, path: Path) -> Plan | None:
        return read_or_quarantine(path, lambda path: _examine(path), what="plan", quarantine=self.quarantine)


def find_plan(plans: list[Plan], prefix: str) -> Plan:
    """The one of `plans` whose id starts with `prefix`.

    Raises:
        PlanError: none or several do; the message lists the ids.
    """
    found = [plan for plan in plans if prefix and plan.id.startswith(prefix)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise PlanError(
            "no plan has this id", got=prefix or "an empty id",
            allowed=[plan.id for plan in plans] or "none is stored",
            fix="choose one of these" if plans else "run `fastft tune` first",
        )  # fmt: skip
    raise PlanError(
        "several plans start with this id", got=prefix, allowed=[plan.id for plan in found], fix="type more of it"
    )


def _examine(path: Path) -> Plan:
    """The plan in a file of the store.

    Raises:
        PlanError: as `read_plan`, or the file is named after another key.
    """
    plan = read_plan(path)
    if path.stem != plan.key.digest:
        raise PlanError(
            f"plan {path} is for another key",
            got=plan.key.digest,
            allowed=path.stem,
            fix="import it instead of copying it",
        )
    return plan


def _age_seconds(plan: Plan, path: Path) -> float:
    try:
        created = datetime.fromisoformat(plan.evidence.created_at)
    except ValueError:
        return time.time() - path.stat().st_mtime
    return (datetime.now(UTC) - (created if created.tzinfo else created.replace(tzinfo=UTC))).total_seconds()


def _shortened(got: object) -> object:
    """`got` as it is, or the beginning of its text."""
    text = got if isinstance(got, str) else repr(got)
    return got if len(text) <= MAX_QUOTED_LETTERS else f"{text[:MAX_QUOTED_LETTERS]}…"


def _strings(value: Any) -> Iterator[str]:
    """Every string in a JSON-like value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _strings(name)
            yield from _strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)
