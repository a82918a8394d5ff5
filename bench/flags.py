"""The flags of `python -m bench`, and what is made of them: axes of a grid, counts of steps, memory caps."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.grid import Axes
from bench.trials import Steps
from fastft.commands.flags import Verb
from fastft.config import parse_bytes
from fastft.errors import ConfigError

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A local folder, a shipped shape, or tiny.")]
FolderFlag = Annotated[Path, typer.Option("--output", help="The folder for what this writes; a second call goes on.")]
NewFolderFlag = Annotated[Path, typer.Option("--output", help="The new folder for what this writes.")]
MinutesFlag = Annotated[float | None, typer.Option(help="Begin nothing that would not end by then.")]

_MicroBatchFlag = Annotated[int | None, typer.Option(help="The largest micro-batch of the grid.")]
_PartsFlag = Annotated[int, typer.Option(help="Mixed placements change after each 1/PARTS of the layers.")]
_LossFlag = Annotated[str, typer.Option(metavar="N,…", help="Rows of logits at a time.")]
_MlpFlag = Annotated[str, typer.Option(metavar="N,…", help="Tokens of an MLP at a time; all is the whole.")]
_GraphsFlag = Annotated[str, typer.Option(metavar="auto,off", help="Whether small steps are replayed as CUDA graphs.")]
_DenseFlag = Annotated[int, typer.Option(help="Quantized weights stay dense in steps of 1/PARTS of the layers.")]
_WarmupFlag = Annotated[int, typer.Option("--warmup-steps", min=1, help="Least steps before the timed ones.")]
_StepsFlag = Annotated[int, typer.Option("--steps", min=3, help="Timed optimizer steps a configuration.")]


def steps_flags(verb: Verb) -> Verb:
    """Give a verb that takes `steps: Steps` the flags for it."""

    def make(warmup_steps: _WarmupFlag = 1, timed_steps: _StepsFlag = 3) -> Steps:
        return Steps(warmup=warmup_steps, timed=timed_steps)

    return _made_of_flags(verb, "steps", make)


def axes_flags(verb: Verb) -> Verb:
    """Give a verb that takes `axes: Axes` the flags for it."""

    def make(
        most_micro_batch: _MicroBatchFlag = None,
        parts: _PartsFlag = 4,
        loss_chunks: _LossFlag = "2048,512",
        mlp_chunks: _MlpFlag = "all,2048",
        graphs: _GraphsFlag = "auto",
        dense_parts: _DenseFlag = 2,
    ) -> Axes:
        losses = tuple(_chunk("--loss-chunks", word) for word in loss_chunks.split(","))
        mlps = tuple(None if word.strip() == "all" else _chunk("--mlp-chunks", word) for word in mlp_chunks.split(","))
        return Axes(
            most_micro_batch=most_micro_batch, parts=parts, loss_chunks=losses, mlp_chunks=mlps,
            graphs=tuple(word.strip() for word in graphs.split(",")), dense_parts=dense_parts,
        )  # fmt: skip

    return _made_of_flags(verb, "axes", make)


def parse_caps(text: str) -> int | list[int]:
    """How many caps are wanted, or which, in bytes.

    Raises:
        ConfigError: a size that is none.
    """
    if text.isdecimal() and int(text) < 100:  # nothing trains in so few bytes
        return max(1, int(text))
    return [parse_bytes(word) for word in text.split(",")]


def _made_of_flags(verb: Verb, name: str, make: Callable[..., Any]) -> Verb:
    """`verb` with the parameters of `make` in the place of `name`, which is what `make` returns."""
    flags = inspect.signature(make).parameters

    @functools.wraps(verb)
    def command(**given: Any) -> None:
        made = make(**{flag: given.pop(flag) for flag in flags})
        verb(**given, **{name: made})

    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(verb).parameters.values():
        parameters += flags.values() if parameter.name == name else [parameter]
    keywords = [
        parameter if parameter.kind is parameter.VAR_KEYWORD else parameter.replace(kind=parameter.KEYWORD_ONLY)
        for parameter in parameters
    ]
    command.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
    return command  # type: ignore[return-value]


def _chunk(flag: str, word: str) -> int:
    if not word.strip().isdecimal():
        raise ConfigError(f"{flag} is not valid", got=word, allowed="numbers of tokens", fix="write it like 2048,512")
    return int(word)
