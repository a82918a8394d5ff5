"""Micro-benchmarks of kernels (`pytest bench/kernels --benchmark-json kernels.json`) → a table."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastft.errors import DataError
from reports.numbers import clean, number
from reports.results import result_files
from reports.tables import Cell, Table

FILE = "kernels.json"
SHARE = (
    "Of a copy's bandwidth",
    "A kernel's bandwidth, counting each byte that it cannot avoid reading or writing once, over that of a "
    "device-to-device copy of as many bytes, measured the same way.",
)
"""What a reader is told about the last column."""
_FACTS: dict[str, Callable[[Any], Any]] = {
    "what": str, "device": str, "bytes": float, "gigabytes_per_second": float, "share": float, "target_share": float,
}  # fmt: skip


def kernel_files(inputs: Sequence[Path]) -> list[Path]:
    """The benchmarks that lie beside the records, in order."""
    return result_files(inputs, FILE)


def kernel_table(files: Sequence[Path]) -> Table | None:
    """A row a kernel: its time, its bandwidth, and how much that is of a copy's; None without files.

    Raises:
        DataError: a file is no such benchmark.
    """
    found = [facts for file in files for facts in _read(file)]
    if not found:
        return None
    devices = ", ".join(dict.fromkeys(clean(facts["device"], 60) for facts in found))
    rows = tuple(
        (
            Cell(clean(facts["what"], 100)),
            Cell(number(facts["microseconds"])),
            Cell(number(facts["gigabytes_per_second"])),
            _share(facts),
        )
        for facts in found
    )
    return Table(f"Kernels on {devices}", ("Kernel", "µs", "GB/s", SHARE[0]), rows)


def _share(facts: dict[str, Any]) -> Cell:
    text = f"{100 * facts['share']:.0f} %"
    if " reference " in facts["what"]:
        return Cell(text, tone="muted")
    if facts["share"] >= facts["target_share"]:
        return Cell(text)
    return Cell(text, detail=f"under {100 * facts['target_share']:.0f} %", tone="warn")


def _read(file: Path) -> list[dict[str, Any]]:
    try:
        benchmarks = json.loads(file.read_text(encoding="utf-8"))["benchmarks"]
        found = [{name: of(benchmark["extra_info"][name]) for name, of in _FACTS.items()} for benchmark in benchmarks]
        for facts in found:
            facts["microseconds"] = facts["bytes"] / facts["gigabytes_per_second"] / 1e3
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise DataError(
            f"cannot read {file}", got=f"{type(error).__name__}: {error}",
            allowed="what `pytest bench/kernels --benchmark-json kernels.json` writes on a GPU",
            fix="run it again, or take the file away",
        ) from error  # fmt: skip
    return found
