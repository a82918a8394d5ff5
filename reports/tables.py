"""Scenarios → the document: tables of text cells, sentences, commands; no markup, no rounding elsewhere.

`html` and `markdown` render the same `Document`, so the two reports cannot disagree.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import ValidationError

from fastft.plan import Choices
from fastft.record import Record
from reports.checks import flatten
from reports.comparison import (
    Arm,
    Scenario,
    accuracy_after,
    compare_arms,
    memory_above_model,
    peak_memory,
    reserved_memory,
)
from reports.figures import Figure
from reports.numbers import DASH, NOTHING, byte_unit, clean, interval, number, percent, points, ratio, span
from reports.statistics import Estimate, Spread, mean_sd, process_rate, process_step_time

Tone = Literal["", "bad", "warn", "muted"]
Reading = Callable[[Record], float | None]

DEFAULT = "+default"
"""Ends the name of an arm that follows no plan; what stands before is the arm that does."""
LEAST_TUNED_RATIO = 0.99
"""A tuned plan that is slower than the default by more misses its target."""


@dataclass(frozen=True)
class Cell:
    """One cell: the value, and what belongs to it in smaller type (a range, an interval, a reason)."""

    text: str
    detail: str = ""
    tone: Tone = ""
    columns: int = 1
    """How many columns it spans."""


@dataclass(frozen=True)
class Table:
    """A table; the first column names the row, the others hold figures unless `prose` is set."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    prose: bool = False


@dataclass(frozen=True)
class Section:
    """One scenario."""

    heading: str
    slug: str
    summary: str
    key_figures: tuple[Cell, ...]
    warnings: tuple[str, ...]
    tables: tuple[Table, ...]
    figures: tuple[Figure, ...]
    environment: Table
    commands: tuple[tuple[str, tuple[str, ...]], ...]
    """Arm → its commands, without repetition."""
    provenance: Table


@dataclass(frozen=True)
class ResultTables:
    """The tables of one kind of result."""

    heading: str
    slug: str
    tables: tuple[Table, ...]


@dataclass(frozen=True)
class Document:
    """A whole report."""

    title: str
    facts: str
    sections: tuple[Section, ...]
    results: tuple[ResultTables, ...]
    """What was measured beside the records, in this order."""
    kernels: Table | None
    """Micro-benchmarks of kernels, where there are some."""
    how_to_read: tuple[tuple[str, str], ...]
    """Term → explanation."""
    sources: Table


def display_name(arm: str) -> str:
    """What a sentence calls an arm."""
    return "stock PEFT" if arm == "peft" else arm


def headline(scenario: Scenario) -> str:
    """The scenario in one clause: its fastest arm against the baseline, or why there is no ratio."""
    best = scenario.fastest
    if best is None:
        parts = []
        for arm in scenario.arms:
            rate = arm.spread(process_rate)
            speed_alone = "measured no speed" if rate is None else f"trains {number(rate.median)} tokens/s"
            parts.append(f"{arm.name} {arm.obstacle or speed_alone}")
        return f"{'; '.join(parts)}; no baseline to compare with"
    if best.withheld:
        return f"no ratio for {best.arm}: {best.withheld[0]}"
    base = display_name(best.baseline)
    speed = best.tokens_per_second
    parts = []
    if speed is not None:
        parts.append(f"{ratio(speed.value)} {base} in tokens/s ({interval(speed)})")
    if best.memory_above_model is not None:
        parts.append(f"{ratio(best.memory_above_model.value)} its memory above the model")
    mine, theirs = _accuracy(scenario.arm(best.arm)), _accuracy(scenario.arm(best.baseline))
    if mine is not None and theirs is not None:
        parts.append(f"{_metric(scenario)} {percent(mine[0])} vs {percent(theirs[0])}")
    return f"{best.arm} is {', '.join(parts)}" if parts else f"{best.arm} and {base} measured nothing"


def key_figures(scenario: Scenario) -> tuple[Cell, ...]:
    """The three numbers of the fastest arm; nothing where the ratio is withheld."""
    best = scenario.fastest
    if best is None or best.withheld:
        return ()
    cells = []
    if best.tokens_per_second is not None:
        cells.append(_ratio_cell(best.tokens_per_second, f"tokens/s of {best.arm} over {display_name(best.baseline)}"))
    if best.memory_above_model is not None:
        cells.append(_ratio_cell(best.memory_above_model, "memory above the loaded model"))
    mine, theirs = _accuracy(scenario.arm(best.arm)), _accuracy(scenario.arm(best.baseline))
    if mine is not None and theirs is not None:
        detail = f"{_metric(scenario)} after training; {display_name(best.baseline)} {percent(theirs[0])}"
        cells.append(Cell(percent(mine[0]), detail))
    return tuple(cells)


def ratio_table(scenario: Scenario) -> Table:
    """Every arm against the baseline, or the reason why it has no ratio."""
    rows: list[tuple[Cell, ...]] = []
    for one in scenario.comparisons:
        if one.withheld:
            reason = Cell("no ratio", "; ".join(one.withheld[:3]), "bad", columns=5)
            rows.append((Cell(one.arm, f"n = {one.processes}"), reason))
            continue
        deviation = one.loss_deviation
        rows.append(
            (
                Cell(one.arm, f"n = {one.processes}"),
                _estimate_cell(one.tokens_per_second, ratio),
                _estimate_cell(one.memory_above_model, ratio),
                _estimate_cell(one.peak_memory, ratio),
                _estimate_cell(one.accuracy, lambda value: f"{points(value)} points"),
                Cell(number(deviation.value, 2), f"step {deviation.step}, seed {deviation.seed}")
                if deviation
                else _NONE,
            )
        )
    columns = ("Arm", "Tokens/s", "Memory above model", "Peak memory", "Accuracy", "Largest loss deviation")
    return Table(f"Against {display_name(scenario.baseline)}", columns, tuple(rows))


def measured_table(scenario: Scenario) -> Table:
    """Speed and memory of every arm."""
    peaks = [value for arm in scenario.arms for value in arm.values(peak_memory)]
    unit, scale = byte_unit(peaks)
    memory: list[tuple[str, Reading]] = [("Peak", peak_memory), ("Above model", memory_above_model)]
    if any(arm.values(reserved_memory) for arm in scenario.arms):
        memory.append(("Reserved", reserved_memory))
    columns = ("Arm", "Tokens/s", "Step time, ms", *(f"{name}, {unit}" for name, _ in memory))
    rows = []
    for arm in scenario.arms:
        cells = [_spread_cell(arm.spread(process_rate)), _spread_cell(arm.spread(process_step_time))]
        cells += [_spread_cell(arm.spread(read), scale) for _, read in memory]
        rows.append(_arm_row(arm, cells))
    return Table("Speed and memory", columns, tuple(rows))


def quality_table(scenario: Scenario) -> Table:
    """Accuracy, loss and the parity gate of every arm."""
    rows = []
    for arm in scenario.arms:
        final = arm.spread(lambda record: record.loss[-1] if record.loss else None)
        before = _accuracy(arm, before=True)
        cells = [_mean_cell(before), _mean_cell(_accuracy(arm)), _spread_cell(final)]
        rows.append((*_arm_row(arm, cells), *_parity_cells(arm)))
    metric = _metric(scenario).capitalize()
    columns = ("Arm", f"{metric} before", f"{metric} after", "Final loss", "Gradient error", "Tolerance")
    return Table("Quality", columns, tuple(rows))


def plan_table(scenario: Scenario) -> Table:
    """What each arm did."""
    rows = []
    for arm in scenario.arms:
        plans = dict.fromkeys((_choices(r), r.plan_id or "default", _ledger(r)) for r in (arm.ok or arm.records))
        for choices, plan, ledger in plans:
            rows.append((Cell(arm.name), Cell(choices), Cell(plan), Cell(ledger)))
    return Table("What each arm did", ("Arm", "Choices", "Plan", "Paths taken"), tuple(rows), prose=True)


def tuned_table(scenarios: Sequence[Scenario], seed: int) -> Table | None:
    """Each arm that follows a plan against the same one without, over all scenarios that have both."""
    rows: list[tuple[Cell, ...]] = []
    for scenario in scenarios:
        arms = {arm.name: arm for arm in scenario.arms}
        for name, default in arms.items():
            tuned = arms.get(name.removesuffix(DEFAULT))
            if not name.endswith(DEFAULT) or tuned is None:
                continue
            one = compare_arms(scenario.name, tuned, default, seed)
            row = Cell(scenario.name, f"{tuned.name}, n = {one.processes}")
            if one.withheld:
                rows.append((row, Cell("no ratio", "; ".join(one.withheld[:3]), "bad", columns=5)))
                continue
            peaks = [Cell(*span(arm.spread(peak_memory), scale=2.0**30)) for arm in (default, tuned)]
            gain = _estimate_cell(one.tokens_per_second, ratio)
            if one.tokens_per_second is not None and one.tokens_per_second.value < LEAST_TUNED_RATIO:
                gain = Cell(gain.text, f"{gain.detail}; more than 1 % slower", "bad")
            speeds = [_spread_cell(arm.spread(process_rate)) for arm in (default, tuned)]
            rows.append((row, *speeds, gain, *peaks))
    columns = ("Scenario", "Default, tokens/s", "Tuned, tokens/s", "Ratio", "Default's peak, GiB", "Tuned peak, GiB")
    return Table("Tuned against default", columns, tuple(rows)) if rows else None


def environment_table(scenario: Scenario) -> Table:
    """Device, software, model, settings, seeds and clocks, a row each; where values differ all are shown."""
    groups: list[tuple[str, Callable[[Record], dict[str, object]]]] = [
        ("Device", lambda r: flatten(r.device)),
        ("Software", lambda r: dict(r.versions)),
        ("Model", lambda r: flatten(r.model)),
        ("LoRA", lambda r: flatten(r.lora)),
        ("Training", lambda r: flatten(r.training)),
        ("Seeds", lambda r: {"": r.seed}),
        ("Warm-up steps", lambda r: {"": r.warmup_steps}),
        ("Git commit", lambda r: {"": r.git_commit} if r.git_commit else {}),
    ]
    rows = []
    for group, read in groups:
        values: dict[str, dict[str, None]] = {}
        for record in scenario.records:
            for key, value in read(record).items():
                values.setdefault(key, {})[_setting(key, value)] = None
        parts = [f"{_words(key)} {' / '.join(found)}".strip() for key, found in sorted(values.items(), key=_name_first)]
        if parts:
            rows.append((Cell(group), Cell(clean(" · ".join(parts), 2000))))
    for arm in scenario.arms:
        clocks = _clocks(arm.records)
        if clocks:
            rows.append((Cell(f"Clocks, {arm.name}"), Cell(clocks)))
    return Table("Environment", ("What", "Value"), tuple(rows), prose=True)


def commands(scenario: Scenario) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The distinct commands of each arm, in order of repetition."""
    found = []
    for arm in scenario.arms:
        lines = tuple(dict.fromkeys(clean(r.command, 2000) for r in arm.records if r.command.strip()))
        if lines:
            found.append((arm.name, lines))
    return tuple(found)


def provenance_table(scenario: Scenario) -> Table:
    """One row a record."""
    columns = ("Arm", "Repetition", "Seed", "Status", "Steps", "Tokens/s", "Started, UTC", "Run", "Commit")
    rows = []
    for arm in scenario.arms:
        for record in arm.records:
            rate = process_rate(record)
            rows.append(
                (
                    Cell(arm.name),
                    Cell(str(record.repetition)),
                    Cell(str(record.seed)),
                    Cell(record.status.replace("_", " "), tone="" if record.status == "ok" else "bad"),
                    Cell(f"{len(record.step_time_ms):,}"),
                    Cell(number(rate)) if rate is not None else _NONE,
                    Cell(clean(record.started_at[:19].replace("T", " "), 40) or NOTHING),
                    Cell(clean(record.run_id, 40)),
                    Cell(clean((record.git_commit or NOTHING)[:10])),
                )
            )
    return Table("Records", columns, tuple(rows))


def slug(name: str, taken: Iterable[str] = ()) -> str:
    """A file name and anchor of a to z, 0 to 9 and hyphens that is not `taken`."""
    base = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:48].strip("-") or "scenario"
    found, number_ = base, 2
    while found in taken:
        found, number_ = f"{base}-{number_}", number_ + 1
    return found


_NONE = Cell(NOTHING, tone="muted")


def _arm_row(arm: Arm, cells: Sequence[Cell]) -> tuple[Cell, ...]:
    if arm.ok and arm.gate_error is None:
        return Cell(arm.name, _processes(arm)), *cells
    obstacle = Cell("gate failed" if arm.gate_error else "failed", _reason(arm), "bad", columns=len(cells))
    return Cell(arm.name, _processes(arm)), obstacle


def _reason(arm: Arm) -> str:
    return arm.gate_error or arm.failures[0]


def _processes(arm: Arm) -> str:
    total = len(arm.records)
    return f"n = {total}" if len(arm.ok) == total else f"{len(arm.ok)} of {total} ok"


def _spread_cell(spread: Spread | None, scale: float = 1.0) -> Cell:
    return _NONE if spread is None else Cell(*span(spread, scale=scale))


def _mean_cell(found: tuple[float, float | None] | None) -> Cell:
    if found is None:
        return _NONE
    mean, deviation = found
    return Cell(percent(mean), f"± {100 * deviation:.1f}" if deviation is not None else "")


def _estimate_cell(estimate: Estimate | None, show: Callable[[float], str]) -> Cell:
    if estimate is None:
        return Cell("not measured", tone="muted")
    unsure = estimate.verdict in ("ambiguous", "too few processes")
    return Cell(show(estimate.value), interval(estimate), "warn" if unsure else "")


def _ratio_cell(estimate: Estimate, label: str) -> Cell:
    return Cell(ratio(estimate.value), f"{label}; {interval(estimate)}")


def _accuracy(arm: Arm, *, before: bool = False) -> tuple[float, float | None] | None:
    values = arm.values(lambda r: r.accuracy.before if r.accuracy else None) if before else arm.values(accuracy_after)
    return mean_sd(values) if values else None


def _metric(scenario: Scenario) -> str:
    names = dict.fromkeys(clean(r.accuracy.metric, 40).replace("_", " ") for r in scenario.records if r.accuracy)
    return " / ".join(names) or "accuracy"


def _parity_cells(arm: Arm) -> list[Cell]:
    parities = [record.parity for record in arm.records if record.parity]
    if not parities:
        return [Cell("not checked", tone="warn"), _NONE]
    worst = max(parities, key=lambda parity: parity.max_relative_error)
    stock = f"stock {number(worst.stock_max_relative_error, 3)}"
    return [Cell(number(worst.max_relative_error, 3), stock), Cell(f"< {number(worst.tolerance, 3)}")]


def _choices(record: Record) -> str:
    """The choices as a phrase for people; those of another version, field by field."""
    try:
        return clean(Choices.model_validate(record.choices).summary())
    except ValidationError:
        fields = sorted(record.choices.items())
        return clean(", ".join(f"{_words(key)} {value}" for key, value in fields)) or "nothing recorded"


def _name_first(item: tuple[str, object]) -> tuple[bool, str]:
    return item[0] != "name", item[0]


def _words(key: str) -> str:
    return clean(key.removesuffix("_bytes").replace("_", " "), 60)


def _setting(key: str, value: object) -> str:
    """A recorded setting as text; bytes in the unit that people use."""
    if key.endswith("_bytes") and isinstance(value, int):
        unit, scale = byte_unit([value])
        return f"{number(value / scale, 3)} {unit}"
    return clean(value, 120)


def _ledger(record: Record) -> str:
    return clean(", ".join(f"{count}× {path}" for path, count in sorted(record.ledger.items()))) or NOTHING


def _clocks(records: Iterable[Record]) -> str:
    """`power w 512 · sm mhz 1,905–1,980`: the range of each numeric value over the processes."""
    values: dict[str, list[float]] = {}
    for record in records:
        for key, value in flatten(record.clocks).items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                values.setdefault(key, []).append(float(value))
    parts = []
    for key, found in sorted(values.items()):
        low, high = number(min(found)), number(max(found))
        parts.append(f"{_words(key)} {low}" if low == high else f"{_words(key)} {low}{DASH}{high}")
    return clean(" · ".join(parts))
