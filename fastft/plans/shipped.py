"""Shipped plans: looked up for runs of which the user's cache knows nothing.

A shipped plan was tuned with the release's own kernels and with the versions of one machine.  Its choices are good
ones for other versions too, only unproven there, so it is followed and then checked (`fastft.plans.verification`).
"""

import logging
import re
from pathlib import Path

from fastft.errors import PlanError
from fastft.files import sha256_of, write_atomically
from fastft.models.shapes import SHAPES
from fastft.plan import Choices, Plan, PlanKey
from fastft.plan_store import read_foreign_plan, read_plan

FOLDER = Path(__file__).parent
MAY_DIFFER = frozenset({"versions", "kernels_sha256"})
"""Fields of the key that may differ for a shipped plan: they change how fast its choices are, and a little what they
need, which the first steps check.  All others say which device, which work, or what the choices mean."""

_log = logging.getLogger(__name__)


class ShippedPlans:
    """The plans of a folder that nothing but `add` writes to."""

    def __init__(self, folder: Path | None = None) -> None:
        """`folder` holds the plans; None takes the one in this package."""
        self.folder = folder if folder is not None else FOLDER

    def load(self, key: PlanKey) -> Plan | None:
        """The plan for `key`, `MAY_DIFFER` aside; a bad file is named in a warning and not used."""
        for path in self.folder.glob(f"*-{_work_digest(key)}.json"):
            plan = self._read(path)
            if plan is not None and set(plan.key.difference(key)) <= MAY_DIFFER:
                return plan
        return None

    def entries(self) -> list[Plan]:
        """Every plan, by the name of its file; bad files are left out with a warning."""
        return [plan for path in sorted(self.folder.glob("*.json")) if (plan := self._read(path)) is not None]

    def path(self, plan: Plan) -> Path:
        """Where `plan` is kept: `llama-3-8b-0123456789abcdef.json`; the digits name the key without `MAY_DIFFER`."""
        model = re.sub(r"[^a-z0-9.]+", "-", plan.model_name.lower())
        return self.folder / f"{model}-{_work_digest(plan.key)}.json"

    def add(self, path: Path) -> Path:
        """Put an exported plan into the folder, in the place of one for the same device and work.

        Raises:
            PlanError: the file is no plan, or one that may not be shipped: not tuned by the tool itself, cut short, for
                no shipped shape, or without the measured peak that its verification needs.
        """
        plan = read_foreign_plan(path)
        origin = read_plan(path).origin
        if origin != "tuned":
            raise PlanError(
                "only a plan that was tuned can be shipped", got=origin, fix="export it where `fastft tune` made it"
            )
        if plan.model_name not in SHAPES or SHAPES[plan.model_name].sizes() != plan.key.model_shape:
            raise PlanError("plans are shipped for shipped shapes only", got=plan.model_name or "no name",
                            allowed=list(SHAPES), fix="tune one of them")  # fmt: skip
        if plan.evidence.out_of_time:
            raise PlanError("the tuning ended before everything was tried", fix="tune again with --max-minutes")
        if measured_peak_bytes(plan) is None:
            raise PlanError("the plan's own choices have no measured peak", fix="tune again with --force")
        target = self.path(plan)
        write_atomically(target, path.read_bytes())
        return target

    def verify(self) -> list[tuple[Path, str | None]]:
        """Each file with what is wrong with it, or None."""
        report: list[tuple[Path, str | None]] = []
        for path in sorted(self.folder.glob("*.json")):
            try:
                plan = read_plan(path)
                named = path.stem.endswith(f"-{_work_digest(plan.key)}")
                report.append((path, None if named else f"its name does not end in {_work_digest(plan.key)}"))
            except PlanError as error:
                report.append((path, str(error)))
        return report

    def _read(self, path: Path) -> Plan | None:
        try:
            return read_plan(path).model_copy(update={"origin": "shipped"})
        except PlanError as error:
            _log.warning("a shipped plan is not used: %s", error)
            return None


def launches_hold(theirs: PlanKey, mine: PlanKey) -> bool:
    """Whether launches of kernels that were timed for one key say anything about the other: same code, same compiler,
    same device."""
    return (theirs.device, theirs.kernels_sha256, theirs.versions.get("triton")) == (
        mine.device, mine.kernels_sha256, mine.versions.get("triton")
    )  # fmt: skip


def choices_here(plan: Plan, key: PlanKey) -> Choices:
    """What a run of `key` follows of a shipped plan: all of it, or all but launches of other kernels."""
    return plan.choices if launches_hold(plan.key, key) else plan.choices.model_copy(update={"kernels": {}})


def measured_peak_bytes(plan: Plan) -> int | None:
    """The largest peak that the tuner measured with the plan's choices; launches change no memory."""
    wanted = _without_launches(plan.choices)
    return max(
        (trial.peak_bytes for trial in plan.evidence.trials
         if trial.verdict == "ok" and trial.peak_bytes is not None and _without_launches(trial.choices) == wanted),
        default=None,
    )  # fmt: skip


def _without_launches(choices: Choices) -> Choices:
    return choices.model_copy(update={"kernels": {}})


def _work_digest(key: PlanKey) -> str:
    return sha256_of(key.model_dump(exclude=set(MAY_DIFFER)))[:16]
