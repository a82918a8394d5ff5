"""How good the tuned plans are (`python -m bench regret`, `python -m bench repeats`) → tables."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from reports.numbers import NOTHING, clean, number, plural, points
from reports.results import read_result, result_files, run_in_words
from reports.tables import Cell, Table

REGRET, REPEATS = "regret.json", "repeats.json"

MEDIAN_TARGET, WORST_TARGET = 0.02, 0.05
"""Of the regret, over all caps."""
SLOWER_TARGET = 0.01
"""By how much a tuned plan may be slower than the default."""
UNIFORM_TARGET = 0.08
"""By how much it is to be faster than the best uniform placement that fits."""

_GIB = 2.0**30
_NONE = Cell(NOTHING, tone="muted")

HOW_TO_READ = (
    (
        "Regret",
        "1 − the tuned plan's tokens/s over those of the fastest configuration under the same memory cap, of all that "
        "the grid has. The grid is every combination of its axes, measured; whatever is compared was measured again, "
        "in turns in one process. Below zero the plan is faster than everything in the grid. Targets: "
        f"{100 * MEDIAN_TARGET:.0f} % in the median, {100 * WORST_TARGET:.0f} % at worst.",
    ),
    (
        "Over default, over uniform",
        "By how much the tuned plan is faster than what fastft does without a plan under the cap (target: never more "
        f"than {100 * SLOWER_TARGET:.0f} % slower; no ratio where the default, which only estimates, exceeds the cap), "
        "and than the fastest configuration of the grid under the cap that has one policy for all layers (target: "
        f"{100 * UNIFORM_TARGET:.0f} %).",
    ),
)


def regret_files(inputs: Sequence[Path]) -> list[Path]:
    """The results that lie beside the records, in order."""
    return result_files(inputs, REGRET, REPEATS)


def regret_tables(files: Sequence[Path]) -> tuple[Table, ...]:
    """Regret under each cap with a last row for all, and the repeated tunings; none without files.

    Raises:
        DataError: a file is no such result.
    """
    regrets = [read_result(file, "python -m bench regret", _regret_of) for file in files if file.name == REGRET]
    repeats = [read_result(file, "python -m bench repeats", _repeats_of) for file in files if file.name == REPEATS]
    tables = []
    if regrets:
        columns = (
            "Run and cap", "Tuned, tokens/s", "Default", "Best of the grid", "Best uniform", "Peak, GiB", "Regret",
            "Over default", "Over uniform",
        )  # fmt: skip
        rows = [row for found in regrets for row in found["rows"]]
        rows.append(_all_caps([one for found in regrets for one in found["regrets"]]))
        tables.append(Table(f"Tuned plans under memory caps{_devices(regrets)}", columns, tuple(rows)))
    if repeats:
        rows = [found["row"] for found in repeats]
        title, columns_of_repeats = f"Repeated tunings{_devices(repeats)}", ("Run", "Same choice", "Usual", "Others")
        tables.append(Table(title, columns_of_repeats, tuple(rows), prose=True))
    return tuple(tables)


def _regret_of(result: dict[str, Any]) -> dict[str, Any]:
    """The rows of one file, a row a cap, and the regrets as numbers (None where there is none)."""
    run, grid = run_in_words(result["config"]), _grid(result)
    return {
        "device": str(result["device"]["name"]),
        "rows": [_cap_row(run, grid, one) for one in result["caps"]],
        "regrets": [None if one["over_cap"] else one["regret"] for one in result["caps"]],
    }


def _cap_row(run: str, grid: Cell, one: dict[str, Any]) -> tuple[Cell, ...]:
    cap = f"{one['cap_bytes'] / _GIB:.2f} GiB"
    tuned = one["tuned"]
    if tuned is None or tuned["tokens_per_second"] is None:
        failure = Cell("not measured", clean(one["problem"], 300), "bad", columns=8)
        return Cell(f"{run}, {cap}", grid.text, grid.tone), failure
    peak = Cell(f"{tuned['peak_bytes'] / _GIB:.2f}")
    if one["over_cap"]:
        peak = Cell(peak.text, "over the cap", "bad")
    return (
        Cell(f"{run}, {cap}", grid.text, grid.tone),
        _speed(tuned),
        _speed(one["default"]),
        _speed(one["best"]),
        _speed(one["best_uniform"]),
        peak,
        _against(one["regret"], lambda regret: regret <= WORST_TARGET, f"over {100 * WORST_TARGET:.0f} %"),
        _over_the_cap(one["default"], one["cap_bytes"])
        or _against(
            one["gain_over_default"], lambda gain: gain >= -SLOWER_TARGET,
            f"more than {100 * SLOWER_TARGET:.0f} % slower",
        ),
        _against(
            one["gain_over_uniform"], lambda gain: gain >= UNIFORM_TARGET, f"under {100 * UNIFORM_TARGET:.0f} %"
        ),
    )  # fmt: skip


def _all_caps(regrets: Sequence[float | None]) -> tuple[Cell, ...]:
    """The last row: the median regret and the worst against their targets; what failed is no regret at all."""
    known = [regret for regret in regrets if regret is not None]
    missing = len(regrets) - len(known)
    name = Cell("All", f"{plural(len(regrets), 'cap')}{f', {missing} without a regret' if missing else ''}")
    if not known:
        return name, *[_NONE] * 5, Cell("not measured", tone="bad"), _NONE, _NONE
    middle, worst = median(known), max(known)
    missed = [
        f"{which} over {100 * target:.0f} %"
        for which, value, target in (("median", middle, MEDIAN_TARGET), ("worst", worst, WORST_TARGET))
        if value > target
    ]
    detail = "; ".join([f"median; worst {_percent(worst)}", *missed])
    return name, *[_NONE] * 5, Cell(_percent(middle), detail, "bad" if missed or missing else ""), _NONE, _NONE


def _speed(found: dict[str, Any] | None) -> Cell:
    if found is None or found["tokens_per_second"] is None:
        return _NONE
    return Cell(number(found["tokens_per_second"]), clean(found["summary"], 160))


def _over_the_cap(default: dict[str, Any] | None, cap_bytes: int) -> Cell | None:
    """What stands where a default that does not keep to the cap is compared with nothing."""
    if default is None or default["peak_bytes"] is None or default["peak_bytes"] <= cap_bytes:
        return None
    return Cell("no ratio", f"the default takes {default['peak_bytes'] / _GIB:.2f} GiB", "muted")


def _against(value: float | None, reached: Callable[[float], bool], missed: str) -> Cell:
    """A share with its sign, marked where it misses its target."""
    if value is None:
        return Cell("not measured", tone="muted")
    return Cell(_percent(value)) if reached(value) else Cell(_percent(value), missed, "bad")


def _percent(value: float) -> str:
    return f"{points(float(value))} %"


def _grid(result: dict[str, Any]) -> Cell:
    done, total = int(result["grid_trials"]), int(result["grid_total"])
    if done == total:
        return Cell(f"grid of {total:,}")
    return Cell(f"grid of {done:,} of {total:,}", tone="warn")


def _repeats_of(result: dict[str, Any]) -> dict[str, Any]:
    verdicts = [str(one["verdict"]) for one in result["repetitions"]]
    others = [one for one in result["repetitions"] if one["verdict"] != "same"]
    count = sum(verdict != "other" for verdict in verdicts)
    ties = verdicts.count("tie")
    same = f"{count} of {len(verdicts)}"
    note = f"{plural(ties, 'tie')} within {100 * float(result['noise']):.0f} %" if ties else ""
    text = "; ".join(f"{clean(one['summary'], 160)} ({one['verdict']})" for one in others)
    cap = result["config"]["memory_cap"]
    run = f"{run_in_words(result['config'])}{f', cap {clean(cap, 40)}' if cap else ''}"
    return {
        "device": str(result["device"]["name"]),
        "row": (
            Cell(run),
            Cell(same, note, "" if count == len(verdicts) else "bad"),
            Cell(clean(result["usual"], 160)),
            Cell(text or NOTHING, tone="" if text else "muted"),
        ),
    }


def _devices(results: Sequence[dict[str, Any]]) -> str:
    return f" on {', '.join(dict.fromkeys(clean(found['device'], 60) for found in results))}"
