"""The journal of a tuning that is not finished: calling `tune` again resumes it.

One line a finished probe, in `<cache>/journals/<key digest>.jsonl`.  A torn last line, as a power cut leaves
it, is ignored.  Only the tuner that holds the device's lock writes it.
"""

import json
import os
import time
from pathlib import Path

from pydantic import ValidationError

from autotune.probe import ProbeRequest
from fastft.errors import OutputError
from fastft.files import canonical_json
from fastft.plan import Trial

MAX_AGE_SECONDS = 24 * 3600
"""Older timings are not compared with new ones: the machine may have been in another state."""

_REPEATABLE = ("ok", "over_cap", "out_of_memory", "allocator_retry")
"""Verdicts worth remembering.  A crash or a timeout may have been the machine's fault: it is tried again."""


class Journal:
    """Trials of one tuning, by what was asked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._remembered: dict[str, list[Trial]] = {}
        for line in self._lines():
            try:
                entry = json.loads(line)
                if time.time() - float(entry["at"]) <= MAX_AGE_SECONDS:
                    trial = Trial.model_validate(entry["trial"])
                    self._remembered.setdefault(str(entry["request"]), []).append(trial)
            except (ValueError, TypeError, KeyError, RecursionError, ValidationError):
                continue

    def take(self, request: ProbeRequest) -> Trial | None:
        """The result of this request from an interrupted tuning, each once: a repetition is measured anew."""
        remembered = self._remembered.get(_name(request))
        return remembered.pop(0) if remembered else None

    def add(self, request: ProbeRequest, trial: Trial) -> None:
        """Keep a finished trial.

        Raises:
            OutputError: it cannot be written.
        """
        if trial.verdict not in _REPEATABLE:
            return
        entry = {"at": time.time(), "request": _name(request), "trial": trial.model_dump()}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as stream:
                # A torn line must not swallow this one: every entry starts on its own line.
                stream.write(("\n" + canonical_json(entry) + "\n").encode())
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise OutputError(
                f"cannot write the tuning journal {self.path}", got=error.strerror or str(error),
                fix="free some space or set FASTFT_CACHE_DIR to a folder that you may write to",
            ) from error  # fmt: skip

    def remove(self) -> None:
        """Forget everything."""
        self._remembered.clear()
        self.path.unlink(missing_ok=True)

    def _lines(self) -> list[str]:
        try:
            # Not `splitlines`: JSON leaves letters as they are that end a line for it, as U+2028.
            return self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        except OSError:
            return []


def _name(request: ProbeRequest) -> str:
    return canonical_json(request.model_dump(mode="json"))
