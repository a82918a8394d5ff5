"""`fastft train`: train an adapter by the cached plan, or the default."""

import os
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastft.commands.flags import JsonFlag, all_flags, run_flags
from fastft.config import RunConfig
from fastft.console import keeping, on_terminal, print_json, print_line, say

if TYPE_CHECKING:
    from fastft.training.trainer import TrainResult


@run_flags(*all_flags())
def train(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="A TOML file with the keys of the flags.")
    ] = None,
    as_json: JsonFlag = False,
    **run: Any,
) -> None:
    """Train an adapter, the fastest way known for this device.

    Flags win over the file, the file over the defaults.  A plan that `fastft tune` found for the same run is
    followed; without one the default is, and one line says how to tune.  The adapter is PEFT's own format.
    """
    result = train_quietly(RunConfig.load(config, **run))
    if as_json:
        print_json({**asdict(result), "output": str(result.output)})
    else:
        print_line(result.message)


def train_quietly(config: RunConfig) -> "TrainResult":
    """`training.trainer.train` with everything that libraries print on stderr, and no bars but on a terminal.

    Raises:
        FastftError: as `training.trainer.train`.
    """
    if config.offline:
        # Read when the hub client is imported: a model that is not here then fails at once, without a request.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with redirect_stdout(sys.stderr), keeping(lambda: _kept(Path(config.output))):
        from transformers.utils import logging as transformers_logging

        from fastft.training.trainer import train as run

        # TRL warns of ORPO's place in it.
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
        if not on_terminal():
            transformers_logging.disable_progress_bar()
            if config.method != "sft":
                from datasets.utils.logging import disable_progress_bar

                disable_progress_bar()
        return run(config, on_event=say)


def _kept(output: Path) -> str:
    """What an interrupted run leaves behind."""
    saved = sorted(output.glob("checkpoint-*"))
    if not saved:
        return "no checkpoint was saved yet (--save-steps saves some)"
    return f"{len(saved)} checkpoints are kept in {output}; go on with --resume"
