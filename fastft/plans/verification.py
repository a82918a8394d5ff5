"""What became of shipped plans on this machine.

    <cache>/verifications/<key digest>.json     the last verdict on the shipped plan that runs of this key follow

They lie beside the store and are no plans: what `fastft tune` finds in the store is always a plan of the user's own.
The digest is that of the run's whole key, so with other software or kernels a plan is unverified again.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from fastft.cache import cache_folder, locked, read_json_text, read_or_quarantine
from fastft.errors import PlanError
from fastft.files import canonical_json, write_atomically
from fastft.plan import Plan, PlanKey
from fastft.plans.shipped import measured_peak_bytes
from fastft.units import gib

PEAK_ALLOWANCE = 1.02
"""By how much a run may need more than the tuner measured: the allocator rounds by the order of its requests."""
_WHAT = "verification"


class Verification(BaseModel):
    """One verdict on one plan."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    plan_id: str
    verdict: Literal["verified", "rejected"]
    detail: str
    """What was compared, for people."""
    created_at: str
    """ISO 8601, UTC."""


class Verifications:
    """The verdicts below a cache folder.  Any number of processes may read and write them at the same time."""

    def __init__(self, cache: Path | None = None) -> None:
        """`cache` is the cache folder; None takes `cache_folder()`."""
        self.folder = (cache if cache is not None else cache_folder()) / "verifications"

    def load(self, key: PlanKey, plan: Plan) -> Verification | None:
        """The verdict on `plan` for runs of `key` on this machine, if there is one."""
        found = read_or_quarantine(self._path(key), _read, what=_WHAT, quarantine=self.folder / "quarantine")
        return found if found is not None and found.plan_id == plan.id else None

    def save(self, key: PlanKey, verification: Verification) -> None:
        """Keep a verdict, in the place of an earlier one.

        Raises:
            OutputError: the folder cannot be written.
        """
        path = self._path(key)
        with locked(path, what=_WHAT):
            write_atomically(path, canonical_json(verification.model_dump()) + "\n")

    def _path(self, key: PlanKey) -> Path:
        return self.folder / f"{key.digest}.json"


def judge(plan: Plan, *, peak_bytes: int, allocator_retries: int) -> Verification | None:
    """The verdict on `plan` after optimizer steps that it was followed in; None where its evidence has no peak.

    Speed is no part of it: the tuner's rows are full and a run's are not.

    Args:
        peak_bytes: of the allocator, over these steps, the model included.
        allocator_retries: how often the allocator had to give cached blocks back to find memory.
    """
    expected = measured_peak_bytes(plan)
    if expected is None:
        return None
    figures = f"peak {gib(peak_bytes)}, {gib(expected)} when it was made"
    if allocator_retries:
        return rejected(plan, f"the allocator ran short {allocator_retries} times; {figures}")
    if peak_bytes > PEAK_ALLOWANCE * expected:
        return rejected(plan, figures)
    return Verification(plan_id=plan.id, verdict="verified", detail=figures, created_at=_now())


def rejected(plan: Plan, why: str) -> Verification:
    """The verdict that `plan` is not to be followed any more."""
    return Verification(plan_id=plan.id, verdict="rejected", detail=why, created_at=_now())


def _read(path: Path) -> Verification:
    text = read_json_text(path, what=_WHAT, most_bytes=2**16, most_depth=4)
    try:
        return Verification.model_validate_json(text)
    except ValidationError as error:
        raise PlanError(f"{_WHAT} {path} is invalid", got=str(error.errors()[0]["msg"]), fix="remove it") from error


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
