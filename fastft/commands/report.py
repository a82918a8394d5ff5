"""`fastft report`: records → a page, without torch."""

from pathlib import Path
from typing import Annotated

import typer

from fastft.commands.flags import JsonFlag, OutputFlag
from fastft.console import print_json, print_line
from fastft.siblings import import_sibling


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUNS", help="Folders of `fastft bench` or `python -m bench`, or .jsonl files of records."
        ),
    ],
    output: OutputFlag = None,
    title: Annotated[str | None, typer.Option(help="The page's title; the scenarios' names by default.")] = None,
    baseline: Annotated[str, typer.Option(help="The arm that all others are compared with.")] = "peft",
    force: Annotated[bool, typer.Option("--force", help="Write into a folder that holds a report already.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Make a page of benches: HTML, Markdown, figures.

    Everything is derived from the records in RUNS.  Without --output the page goes into a folder `report` in the
    first of them.
    """
    first = runs[0] if runs[0].is_dir() else runs[0].parent
    built = import_sibling("reports").build_report(
        runs, output or first / "report", title=title, baseline=baseline, overwrite=force
    )
    if as_json:
        print_json({
            "html": str(built.html), "markdown": str(built.markdown), "figures": [str(path) for path in built.figures],
            "headline": built.headline,
        })  # fmt: skip
        return
    print_line(f"report in {built.html}: {built.headline}")
