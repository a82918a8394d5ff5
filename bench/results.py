"""Results: what a series of measurements came to, as one JSON file that says of what it is and where it comes from."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from bench.provenance import provenance, utc_now
from bench.trial_file import Header
from fastft.config import RunConfig
from fastft.files import canonical_json, write_atomically
from fastft.hardware import Device, software_versions


class Result(BaseModel):
    """What every result says of itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: RunConfig
    device: dict[str, Any]
    """`fastft.hardware.Device`."""
    versions: dict[str, str]
    git_commit: str | None
    command: str
    started_at: str
    """ISO 8601, UTC."""

    def write(self, path: Path) -> None:
        """Write it whole, or not at all.

        Raises:
            OutputError: it cannot be written.
        """
        write_atomically(path, canonical_json(self.model_dump(mode="json")) + "\n")


def facts(config: RunConfig, device: Device, header: Header | None = None) -> dict[str, Any]:
    """The fields of `Result` for trials that `header` began, or for what this process measured."""
    made = header or provenance()
    return {
        "config": config,
        "device": asdict(device),
        "versions": software_versions(),
        "git_commit": made.git_commit,
        "command": made.command,
        "started_at": utc_now() if header is None else header.started_at,
    }
