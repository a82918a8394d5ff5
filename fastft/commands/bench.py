"""`fastft bench`: a scenario's arms against each other, parity first."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastft.commands.flags import KEY_FLAGS, JsonFlag, OutputFlag, run_flags
from fastft.config import RunConfig
from fastft.console import keeping, print_json, print_line, print_table, progress, say
from fastft.data.formats import load_rows
from fastft.errors import MeasureError, ModelError
from fastft.planning import model_shape
from fastft.record import Record
from fastft.siblings import import_sibling

if TYPE_CHECKING:
    from reports.comparison import Comparison
    from reports.tables import Table


@run_flags("model", "data", *KEY_FLAGS, "plan", "micro_batch", defaults=False)
def bench(
    scenario: Annotated[str, typer.Argument(metavar="SCENARIO", help="One of those below, or a TOML file.")],
    arms: Annotated[
        str | None,
        typer.Option(metavar="A,B,…", help="Which arms to run; by default the scenario's that can run here."),
    ] = None,
    repetitions: Annotated[int | None, typer.Option(help="Processes an arm; 6 and more give a full interval.")] = None,
    output: OutputFlag = None,
    as_json: JsonFlag = False,
    **run: Any,
) -> None:
    """Compare ways to train, stock PEFT first.

    Every arm gets the same model, adapter and batches, every repetition a process of its own.  Before anything is
    timed, the gradients of every arm are compared with an fp32 reference.  The records go to a new folder,
    runs/SCENARIO-TIME by default; `fastft report` makes a page of them.
    """
    folder = output or Path("runs") / f"{Path(scenario).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = None if arms is None else [word.strip() for word in arms.split(",") if word.strip()]
    chosen = import_sibling("bench.scenarios").load_scenario(scenario)
    chosen = chosen.changed(config={name: value for name, value in run.items() if value is not None})
    _require_inputs(chosen.config, chosen.data == "rows")
    runner = import_sibling("bench.runner")
    with progress() as meter, keeping(f"the records so far are in {folder}"):

        def show(event: Any) -> None:
            meter.update(event.text, event.done, event.total)
            meter.line(f"[{event.done}/{event.total}] {event.text}")

        records: list[Record] = runner.run_bench(
            chosen, arms=names, repetitions=repetitions, output=folder, on_progress=show
        )
    file = folder / runner.RECORDS
    _show_comparison(records, file, as_json)
    require_measured(records)


def _require_inputs(config: RunConfig, reads_rows: bool) -> None:
    """Check model and data before a folder is made: in the workers their absence would be a failed record each.

    Raises:
        ModelError: the model is not found.
        DataError: the data file cannot be used.
    """
    try:
        model_shape(config)
    except ModelError:
        # A family without plans is fine for stock PEFT; a model that is not there raises here as well.
        from fastft.models.loading import resolve_model

        resolve_model(config.model, offline=config.offline, trust_remote_code=config.trust_remote_code)
    if reads_rows and config.data != "embedded":
        load_rows(Path(config.data))


def require_measured(records: Sequence[Record]) -> None:
    """Check that every arm has a finished repetition.

    Raises:
        MeasureError: an arm has none; the message has its reason.
    """
    for arm in dict.fromkeys(record.arm for record in records):
        own = [record for record in records if record.arm == arm]
        if all(record.status != "ok" for record in own):
            raise MeasureError(f"arm {arm} was not measured", got=own[0].error, fix="see the logs beside the records")


def _show_comparison(records: list[Record], file: Path, as_json: bool) -> None:
    comparison, tables = import_sibling("reports.comparison"), import_sibling("reports.tables")
    arms = [record.arm for record in records]
    (compared,) = comparison.compare(records, baseline="peft" if "peft" in arms else arms[0])
    headline = tables.headline(compared)
    if as_json:
        shown = [_as_json(one) for one in compared.comparisons]
        print_json({"records": str(file), "headline": headline, "comparisons": shown})
        return
    shown_tables = [tables.ratio_table(compared)] if compared.comparisons else []
    for table in [*shown_tables, tables.measured_table(compared), tables.quality_table(compared)]:
        _print(table)
    for warning in compared.warnings:
        say(f"warning: {warning}")
    print_line(f"{compared.name}: {headline}")
    print_line(f"records: {file}; a page of them: fastft report {file.parent}")


def _as_json(one: "Comparison") -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(one)


def _print(table: "Table") -> None:
    print_line(f"{table.title}:")
    rows = []
    for row in table.rows:
        cells = [f"{cell.text} ({cell.detail})" if cell.detail else cell.text for cell in row]
        rows.append([f"  {cells[0]}", *cells[1:], *[""] * (len(table.columns) - len(cells))])
    print_table([f"  {table.columns[0]}", *table.columns[1:]], rows)
    print_line("")
