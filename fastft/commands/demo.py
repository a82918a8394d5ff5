"""`fastft demo`: the main job on the embedded model, in minutes."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fastft.commands.flags import JsonFlag, OutputFlag
from fastft.console import print_json, print_line


def demo(
    output: OutputFlag = None,
    minutes: Annotated[float, typer.Option(help="About how long it may take.")] = 6.0,
    as_json: JsonFlag = False,
) -> None:
    """Tune, train, bench and report an embedded model.

    Takes at most 6 minutes on 2 CPU cores.  Everything goes into a new folder, runs/demo-TIME by default; the plan
    stays in the cache.  The last line says where the report is and what it found.
    """
    from fastft.demo import run_demo

    folder = output or Path("runs") / f"demo-{time.strftime('%Y%m%d-%H%M%S')}"
    result = run_demo(folder, minutes=minutes)
    if as_json:
        print_json({name: str(v) if isinstance(v, Path) else v for name, v in asdict(result).items()})
        return
    print_line(f"report in {result.html}: {result.headline}")
