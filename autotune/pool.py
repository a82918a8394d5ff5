"""The trial pool: what was measured on this device, for this tuning and for later ones under other memory caps.

A probe does not depend on the memory cap, which only judges its peak.  So there is one file for all caps of an
otherwise equal key, `<cache>/trials/<digest>.jsonl`, one line a finished probe:

    a tuning that was interrupted    goes on from its own lines (`take`), the repetitions of its finalists among them
    a tuning under another cap       starts with what others measured (`others`), judged by its cap; repetitions are not
                                     among it, because finalists are compared by what is measured now, side by side

A torn last line, as a power cut leaves it, is ignored.  Only the tuner that holds the device's lock writes the file.
"""

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from autotune.probe import ProbeRequest, judge_again
from fastft.files import append_line, canonical_json, sha256_of
from fastft.hardware import Device
from fastft.plan import PlanKey, Trial

MAX_AGE_SECONDS = 24 * 3600
"""Older timings are not compared with new ones: the machine may have been in another state."""

_REPEATABLE = ("ok", "over_cap", "out_of_memory", "allocator_retry")
"""Verdicts worth remembering.  A crash or a timeout may have been the machine's fault: it is tried again."""

FIRST = 0
"""The turn of a candidate's first measurement; its repetitions as a finalist have the turns from 1."""


class _Remembered(NamedTuple):
    trial: Trial
    seconds: float
    """How long its probe took."""
    at: float
    """When it ended, in seconds since 1970."""


class TrialPool:
    """Trials of one key but for its memory cap, by what was asked; `tuning` names the one that adds to them."""

    def __init__(self, path: Path, tuning: str) -> None:
        self.path, self.tuning = path, tuning
        self._own: dict[tuple[str, int], _Remembered] = {}
        self._others: dict[str, _Remembered] = {}
        for line in self._lines():
            try:
                self._read(json.loads(line))
            except (ValueError, TypeError, KeyError, RecursionError, ValidationError):
                continue

    @classmethod
    def of(cls, cache: Path, key: PlanKey, device: Device, effort: str) -> "TrialPool":
        """The pool of a tuning for `key`.  Equal GPUs of one machine differ in speed: each has its own."""
        shared = [key.model_dump(exclude={"memory_cap_bytes"}), device.bus_id]
        return cls(cache / "trials" / f"{sha256_of(shared)[:16]}.jsonl", f"{key.digest}-{effort}")

    @staticmethod
    def remove_outdated(cache: Path) -> None:
        """Remove the files of all pools in `cache` to which nothing was added for so long that no trial counts."""
        for path in (cache / "trials").glob("*.jsonl"):
            with suppress(OSError):  # another tuner removed it, or it is not ours to remove
                if time.time() - path.stat().st_mtime > MAX_AGE_SECONDS:
                    path.unlink()

    def take(self, request: ProbeRequest, turn: int = FIRST) -> Trial | None:
        """What this tuning measured for `request` in this turn before it was interrupted."""
        found = self._own.get((_name(request), turn))
        return None if found is None else found.trial

    def others(self, like: ProbeRequest) -> list[Trial]:
        """The latest trials of other tunings that measured as `like` does, whatever the choices: judged by its cap, and
        marked `reused`."""
        cap = like.config.memory_cap_bytes
        return [
            judge_again(trial, cap).model_copy(update={"reused": True})
            for name, (trial, _, _) in self._others.items()
            if name == _name(like.model_copy(update={"choices": trial.choices}))
        ]

    def add(self, request: ProbeRequest, trial: Trial, seconds: float, turn: int = FIRST) -> None:
        """Keep a finished trial, whose probe took `seconds`.

        Raises:
            OutputError: it cannot be written.
        """
        if trial.verdict in _REPEATABLE:
            entry = {"at": time.time(), "tuning": self.tuning, "request": _name(request), "turn": turn}
            self._append({**entry, "seconds": round(seconds, 3), "trial": trial.model_dump()})

    def end(self) -> None:
        """This tuning has its plan: its repetitions are forgotten, its trials stay for other caps.

        Raises:
            OutputError: it cannot be written.
        """
        if self.path.exists():
            self._append({"ended": self.tuning})

    def forget(self) -> None:
        """Forget everything."""
        self._own.clear()
        self._others.clear()
        self.path.unlink(missing_ok=True)

    def probe_seconds(self) -> list[float]:
        """How long the probes took that are remembered."""
        return [remembered.seconds for remembered in (*self._own.values(), *self._others.values())]

    def _read(self, entry: dict[str, Any]) -> None:
        if "ended" in entry:
            if entry["ended"] == self.tuning:
                firsts = [(name, kept) for (name, turn), kept in self._own.items() if turn == FIRST]
                self._own.clear()
                for name, kept in firsts:
                    if name not in self._others or self._others[name].at <= kept.at:
                        self._others[name] = kept
            return
        at = float(entry["at"])
        if time.time() - at > MAX_AGE_SECONDS:
            return
        remembered = _Remembered(Trial.model_validate(entry["trial"]), float(entry["seconds"]), at)
        name, turn = str(entry["request"]), int(entry["turn"])
        if entry["tuning"] == self.tuning:
            self._own[name, turn] = remembered
        elif turn == FIRST:
            self._others[name] = remembered

    def _append(self, entry: dict[str, Any]) -> None:
        append_line(
            self.path, canonical_json(entry), name=f"the trial pool {self.path}",
            fix="free some space or set FASTFT_CACHE_DIR to a folder that you may write to",
        )  # fmt: skip

    def _lines(self) -> list[str]:
        try:
            # Not `splitlines`: JSON leaves letters as they are that end a line for it, as U+2028.
            return self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        except OSError:
            return []


def _name(request: ProbeRequest) -> str:
    """What is measured, and how; the file's key says of what run."""
    return canonical_json(request.model_dump(mode="json", exclude={"config"}))
