"""PlanStore: the cache folder that keeps plans, one canonical JSON file a key.

    <cache>/plans/<key digest>.json        a plan;  <key digest>.json.lock guards it
    <cache>/plans/quarantine/              files that were corrupt or held a plan for another key

A reader never sees half a file, a bad file never ends a run (it is moved away with one warning, and the
default is used), and the name of a file comes from the key alone, never from what the file says.
"""

import logging
import os
import re
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

from fastft.config import RunConfig
from fastft.errors import OutputError, PlanError
from fastft.files import write_atomically
from fastft.plan import Plan, PlanKey

MAX_PLAN_BYTES = 4 * 2**20
MAX_DEPTH = 32
"""Nesting of a plan's JSON; a real one has 6."""
PLAN_BACKENDS = tuple(name for name in get_args(RunConfig.model_fields["backend"].annotation) if name != "auto")
LOCK_SECONDS = 30.0

_log = logging.getLogger(__name__)
_STRINGS_AND_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)


def cache_folder() -> Path:
    """`FASTFT_CACHE_DIR`, or the user's cache folder for fastft."""
    folder = os.environ.get("FASTFT_CACHE_DIR")
    if folder:
        return Path(folder).expanduser()
    import platformdirs

    return platformdirs.user_cache_path("fastft")


def read_plan(path: Path) -> Plan:
    """Read and validate one plan file.

    Raises:
        PlanError: it cannot be read, is larger than 4 MiB, nests too deeply, is no plan of this schema, or fails
            its checksum.
    """
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_PLAN_BYTES + 1)
    except OSError as error:
        raise PlanError(
            f"cannot read the plan {path}", got=error.strerror or str(error), fix="check the path"
        ) from error
    if len(raw) > MAX_PLAN_BYTES:
        raise PlanError(
            f"plan {path} is too large", got="more than 4 MiB", fix="a plan has some kilobytes; take another file"
        )
    try:
        text = raw.decode()
        if _depth(text) > MAX_DEPTH:
            raise PlanError(f"plan {path} nests too deeply", allowed=f"{MAX_DEPTH} levels", fix="take another file")
        return Plan.from_json(text, where=str(path))
    except (ValueError, RecursionError, OverflowError) as error:
        # Bytes that are not UTF-8 and numbers of thousands of digits are ValueErrors, but no JSONDecodeError.
        raise PlanError(
            f"plan {path} cannot be parsed", got=str(error)[:120], fix="remove it and run `fastft tune` again"
        ) from error


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
                f"plan {path} names an unknown backend", got=repr(choice.backend), allowed=PLAN_BACKENDS, fix=fix
            )
        if re.fullmatch(r"[a-z0-9_]{1,40}", choice.attention) is None:
            raise PlanError(f"plan {path} names an unknown attention", got=repr(choice.attention), fix=fix)
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
        with self._locked(path):
            write_atomically(path, plan.to_json())
        return path

    def entries(self) -> list[Plan]:
        """Every plan, the newest first; bad files are moved to quarantine."""
        plans = [plan for path in self._files() if (plan := self._read_or_quarantine(path)) is not None]
        return sorted(plans, key=lambda plan: (plan.evidence.created_at, plan.id), reverse=True)

    def find(self, prefix: str) -> Plan:
        """The one plan whose id starts with `prefix`.

        Raises:
            PlanError: none or several do; the message lists the ids.
        """
        plans = self.entries()
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

        A plan without a readable date has the age of its file.  Without arguments nothing is removed.
        """
        removed = []
        for path in self._files():
            with self._locked(path):
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
                report.append((path, str(error)))
        return report

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.json"))

    def _read_or_quarantine(self, path: Path) -> Plan | None:
        if not path.exists():
            return None
        try:
            return _examine(path)
        except PlanError:
            pass  # decided below: a writer may be replacing it just now
        try:
            with self._locked(path):
                if not path.exists():
                    return None
                try:
                    return _examine(path)
                except PlanError as error:
                    self.quarantine.mkdir(parents=True, exist_ok=True)
                    target = self.quarantine / f"{path.name}.{time.time_ns()}"
                    path.replace(target)
                    _log.warning("a plan is not used and was moved to %s: %s", target, error)
        except (OSError, OutputError) as error:
            _log.warning("plan %s is bad and cannot be moved away, it is not used: %s", path, error)
        return None

    @contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        with ExitStack() as held:
            try:
                held.enter_context(cache_lock(Path(f"{path}.lock"), timeout=LOCK_SECONDS))
            except TimeoutError as error:
                raise OutputError(
                    f"the plan {path} is locked",
                    got=f"no answer in {LOCK_SECONDS:.0f} s",
                    fix="end the process that holds it",
                ) from error
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
