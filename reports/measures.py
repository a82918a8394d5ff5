"""What each measure against memory saves and costs (`python -m bench measures`) → tables."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reports.numbers import DASH, MINUS, NOTHING, byte_unit, clean, number, points, ratio
from reports.results import read_result, result_files, run_in_words
from reports.tables import Cell, Table

MEASURES = "measures.json"
MOST_OVER, MOST_UNDER = 0.05, 0.02
"""Of the measured peak, by how much the predicted one may miss it on a GPU: under is worse, what fits must fit."""

HOW_TO_READ = (
    "Memory measures",
    "Each measure alone, and “smallest” all together that are predicted to save memory, in turns on one loaded model "
    "that stands still; all must give the same losses and gradients. Speed is by the median step of all turns, with "
    "the range of the turns; the peak is their highest. The ratio and what is saved are against the first row, the "
    "default without plan and cap; below zero a measure spends memory. Predicted is what fastft reckons from the "
    "model's shape alone, with the share by which that differs from the measured peak: on a GPU at most "
    f"{100 * MOST_OVER:.0f} % over and {100 * MOST_UNDER:.0f} % under it; on a CPU, where the peak is the whole "
    "process's, it is rough.",
)
"""What a reader is told about the tables."""

_NONE = Cell(NOTHING, tone="muted")


def measures_files(inputs: Sequence[Path]) -> list[Path]:
    """The results that lie beside the records, in order."""
    return result_files(inputs, MEASURES)


def measures_tables(files: Sequence[Path]) -> tuple[Table, ...]:
    """A table a file, a row a measure, the baseline first.

    Raises:
        DataError: a file is no such result.
    """
    return tuple(read_result(file, "python -m bench measures", _table) for file in files)


def _table(result: dict[str, Any]) -> Table:
    found = result["results"]
    baseline = found[0]
    unit, scale = byte_unit([one["peak_bytes"] or one["predicted_peak_bytes"] for one in found])
    on_gpu = result["device"]["kind"] == "cuda"
    columns = (
        "Measure", "Tokens/s", f"× {clean(baseline['name'], 40)}", f"Peak, {unit}", f"Saved, {unit}",
        f"Predicted, {unit}",
    )  # fmt: skip
    title = f"{run_in_words(result['config'])}, on {clean(result['device']['name'], 60)}"
    return Table(title, columns, tuple(_row(one, baseline, scale, on_gpu) for one in found))


def _row(one: dict[str, Any], baseline: dict[str, Any], scale: float, on_gpu: bool) -> tuple[Cell, ...]:
    name, predicted = Cell(clean(one["name"], 40), clean(one["description"], 160)), float(one["predicted_peak_bytes"])
    if one["verdict"] != "ok":
        problem = Cell(clean(one["verdict"], 40).replace("_", " "), clean(one["detail"], 300), "bad", columns=4)
        return name, problem, Cell(_amount(predicted, scale))
    speed, peak = float(one["tokens_per_second"]), float(one["peak_bytes"])
    times, saved = _NONE, _NONE
    if baseline["verdict"] == "ok":
        times = Cell(ratio(speed / float(baseline["tokens_per_second"])))
        saved = Cell(_amount(float(baseline["peak_bytes"]) - peak, scale))
    prediction = _prediction(predicted, peak, scale, on_gpu)
    return (
        name,
        Cell(number(speed), _range(one["turn_tokens_per_second"])),
        times,
        Cell(_amount(peak, scale)),
        saved,
        prediction,
    )


def _range(speeds: Sequence[float]) -> str:
    """`15,900–16,100`, over the turns; nothing where they are equal."""
    low, high = number(min(speeds)), number(max(speeds))
    return "" if low == high else f"{low}{DASH}{high}"


def _prediction(predicted: float, peak: float, scale: float, on_gpu: bool) -> Cell:
    error = predicted / peak - 1
    missed = ""
    if on_gpu and not -MOST_UNDER <= error <= MOST_OVER:
        missed = f", over {100 * MOST_OVER:.0f} %" if error > 0 else f", more than {100 * MOST_UNDER:.0f} % under"
    return Cell(_amount(predicted, scale), f"{points(error)} %{missed}", "warn" if missed else "")


def _amount(count: float, scale: float) -> str:
    """Bytes in the table's unit; all of a column to the same place, as they are compared."""
    return f"{count / scale:.2f}".replace("-", MINUS).replace(f"{MINUS}0.00", "0.00")
