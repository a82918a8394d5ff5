"""A file of trials: one JSON object a line, appended as they are measured, after a header that says of what.

What a crash or a time limit leaves behind is whole lines and at most one torn one, which is not counted; so whoever
measures goes on from there.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from fastft.config import RunConfig
from fastft.errors import ConfigError, DataError
from fastft.files import append_line, canonical_json
from fastft.plan import PlanKey, Trial
from fastft.planning import describe_difference

SCHEMA = 1


class Header(BaseModel):
    """Of what the trials are, and what made them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    trial_file: int = SCHEMA
    key: PlanKey
    """Device, software, sizes and settings; trials under another key are not comparable."""
    config: RunConfig
    settings: dict[str, Any] = {}
    """What else tells this measurement from others: steps, the axes of a grid."""
    git_commit: str | None = None
    command: str = ""
    started_at: str = ""
    """ISO 8601, UTC."""


class TrialFile:
    """The file at `path`, which may not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, header: Header) -> Header:
        """Write `header` as the first line, or check that the file has an equal one.

        Returns:
            The file's header: that of the first call.

        Raises:
            ConfigError: the file is of another run, machine or version, or has other settings.
            DataError: it is no file of trials.
            OutputError: it cannot be written.
        """
        if not self.path.exists() or not self.path.read_bytes().strip():
            self.append(header)
            return header
        there = self.header()
        differences = describe_difference(there.key, header.key)
        if there.settings != header.settings:
            differences.append("settings: " + ", ".join(
                f"{name} {there.settings.get(name)} there, {header.settings.get(name)} here"
                for name in sorted({*there.settings, *header.settings})
                if there.settings.get(name) != header.settings.get(name)
            ))  # fmt: skip
        if differences:
            raise ConfigError(
                f"{self.path} holds trials of another run", got="; ".join(differences),
                fix="choose another output folder, or remove the file",
            )  # fmt: skip
        return there

    def append(self, line: Header | Trial) -> None:
        """Add one line, on disk when this returns.

        Raises:
            OutputError: it cannot be written.
        """
        append_line(self.path, canonical_json(line.model_dump(mode="json")))

    def header(self) -> Header:
        """The first line.

        Raises:
            DataError: there is no such file, or it does not begin with a header.
        """
        try:
            return Header.model_validate_json(self._lines()[0])
        except (OSError, ValidationError) as error:
            raise DataError(
                f"{self.path} is no file of trials", got=str(error).splitlines()[0], allowed="what the bench wrote",
                fix="remove it and measure again",
            ) from error  # fmt: skip

    def trials(self) -> list[Trial]:
        """Every whole trial, in the order of measuring; none of a file that does not exist."""
        if not self.path.exists():
            return []
        found = []
        for line in self._lines()[1:]:
            try:
                found.append(Trial.model_validate(json.loads(line)))
            except (ValueError, ValidationError):
                continue
        return found

    def _lines(self) -> list[str]:
        # Not `splitlines`: JSON leaves letters as they are that end a line for it, as U+2028.
        return self.path.read_text(encoding="utf-8", errors="replace").split("\n")
