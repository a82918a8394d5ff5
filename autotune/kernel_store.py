"""What the kernel search measured, kept for other models with the same shapes.

    <cache>/kernels/<digest>.json        the trials of all buckets on one machine; <digest>.json.lock guards it
    <cache>/kernels/quarantine/          files that were corrupt or for another machine

A machine is a device with its software, the kernels' source and a dtype.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from fastft.cache import locked, read_json_text, read_or_quarantine
from fastft.errors import PlanError
from fastft.files import canonical_json, sha256_of, write_atomically
from fastft.kernels.launches import read_launches
from fastft.plan import KernelTrial, PlanKey

SCHEMA = 1
WHAT = "file of kernel timings"
_MACHINE = (
    "device", "compute_capability", "multiprocessors", "device_memory_bytes", "versions", "kernels_sha256", "dtype",
)  # fmt: skip
_MAX_BYTES = 16 * 2**20
_MAX_DEPTH = 8

Trials = dict[str, list[KernelTrial]]
"""Bucket → its trials, the default's first."""


class _Timings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = SCHEMA
    machine: dict[str, Any]
    buckets: Trials


class KernelStore:
    """The timings of the machine that `key` is for."""

    def __init__(self, cache: Path, key: PlanKey) -> None:
        self.machine = key.model_dump(include=set(_MACHINE))
        self.folder = cache / "kernels"
        self.path = self.folder / f"{sha256_of(self.machine)[:16]}.json"

    def load(self) -> Trials:
        """All buckets; none if there is no file, or only a bad one, which is moved to quarantine."""
        timings = read_or_quarantine(self.path, self._read, what=WHAT, quarantine=self.folder / "quarantine")
        return timings.buckets if timings is not None else {}

    def add(self, trials: Mapping[str, Sequence[KernelTrial]]) -> None:
        """Keep these buckets beside those that are there, replacing the same ones.

        Raises:
            OutputError: the folder cannot be written, or another process holds the lock for 30 seconds.
        """
        self.load()  # moves a bad file away, which needs the lock too
        with locked(self.path, what=WHAT):
            present = self._read(self.path).buckets if self.path.exists() else {}
            merged = _Timings(machine=self.machine, buckets={**present, **{b: list(t) for b, t in trials.items()}})
            body = merged.model_dump()
            write_atomically(self.path, canonical_json({**body, "checksum": sha256_of(body)}) + "\n")

    def _read(self, path: Path) -> _Timings:
        """The timings in a file.

        Raises:
            PlanError: it is no such file, was changed, or is for another machine.
        """
        text = read_json_text(path, what=WHAT, most_bytes=_MAX_BYTES, most_depth=_MAX_DEPTH)
        try:
            body = json.loads(text)
            checksum = body.pop("checksum", None)
            if checksum != sha256_of(body):
                raise ValueError("a wrong checksum")
            timings = _Timings.model_validate(body)
            if (timings.schema_version, timings.machine) != (SCHEMA, self.machine):
                raise ValueError("another schema or machine")
        except (ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise PlanError(
                f"{WHAT} {path} is bad", got=str(error)[:120], fix="nothing: it is measured again"
            ) from error
        for trial in (trial for trials in timings.buckets.values() for trial in trials):
            read_launches({trial.bucket: trial.launch})
        return timings
