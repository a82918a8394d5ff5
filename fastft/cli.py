"""The command line: `fastft VERB`.  Each verb is a module of `fastft.commands`; here they are put together.

Data go to stdout, everything else to stderr.  An error is one line there, and its class is the exit code.
"""

import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from fastft import __version__
from fastft.commands import plan
from fastft.commands.bench import bench
from fastft.commands.demo import demo
from fastft.commands.doctor import doctor
from fastft.commands.env import env
from fastft.commands.report import report
from fastft.commands.train import train
from fastft.commands.tune import tune
from fastft.console import report_error, say, set_up_logging

EXIT_CODES = """\b
Exit codes:
  0 done          1 unexpected error, or a check of doctor failed
  2 configuration or usage    3 data      4 model     5 backend or device
  6 plan          7 output    8 measurement           130 interrupted"""

_ClickException: type[Exception] = typer.BadParameter.__mro__[2]
"""The base of every error of usage; newer versions of typer bring their own click."""

_USAGE = 2


class Program(TyperGroup):
    """The verbs, with fastft's way to report errors around them."""

    def invoke(self, ctx: Any) -> Any:
        """Run the verb; an error becomes one line and an exit code."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except (typer.Exit, typer.Abort, _ClickException):
            raise
        except BaseException as error:
            raise typer.Exit(report_error(error, debug=ctx.params["debug"])) from error

    def main(self, args: Sequence[str] | None = None, *positional: Any, **options: Any) -> NoReturn:
        """Parse `args`, run the verb and exit."""
        words = list(sys.argv[1:] if args is None else args)
        if "--debug" in words:  # wherever it stands
            words = ["--debug", *(word for word in words if word != "--debug")]
        options["standalone_mode"] = False
        options["prog_name"] = "fastft"
        try:
            code = super().main(words, *positional, **options)
        except _ClickException as error:
            code = _report_usage(error)
        except typer.Abort:
            code = _USAGE
        sys.exit(code if isinstance(code, int) else 0)


def _report_usage(error: Any) -> int:
    """One line for a command line that cannot be understood."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "fastft"
    option = getattr(error, "option_name", None)
    if getattr(error, "possibilities", None):
        message, fix = f"no such option: {option}", f"did you mean {' or '.join(error.possibilities)}?"
    else:
        message, _, meant = " ".join(error.format_message().split()).rstrip(".").partition(". Did you mean ")
        fix = f"did you mean {meant}" if meant else f"see `{command} --help`"
    say(f"error: {message[:1].lower()}{message[1:]}; fix: {fix}")
    return _USAGE


def _examples(*lines: str, about: str = "") -> str:
    """The end of a verb's help."""
    return "\n".join([f"{about}\n\n\b" if about else "\b", "Examples:", *(f"  {line}" for line in lines)])


app = typer.Typer(
    cls=Program, name="fastft", epilog=EXIT_CODES, add_completion=False, rich_markup_mode=None,
    pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fastft {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def program(
    context: typer.Context,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks and every log line; goes with any verb.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """LoRA and QLoRA fine-tuning as fast and as small as the GPU allows, with proof.

    `fastft tune` measures this device once and keeps a plan, `fastft train` follows it, `fastft bench` proves what it
    brings, `fastft report` shows that.  `fastft demo` does it all in a few minutes.
    """
    set_up_logging(debug=debug)
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), nl=False)


app.command(epilog=_examples("fastft env", "fastft env --json"))(env)
app.command(epilog=_examples("fastft doctor", "python -m fastft"))(doctor)
app.command(
    epilog=_examples(
        "fastft tune tiny",
        "fastft tune path/to/model --quantization nf4 --seq-len 2048 --memory-cap 7.8GiB",
        "fastft tune llama-3-8b --batch-size 4 --dry-run",
    )
)(tune)
app.command(
    epilog=_examples(
        "fastft train run.toml",
        "fastft train --model path/to/model --data rows.jsonl --output adapter --rank 8",
        "fastft train run.toml --learning-rate 1e-4 --output second",
        "fastft train --method dpo --settings beta=0.05 --eval-data embedded --output preferred",
    )
)(train)
app.command(
    epilog=_examples(
        "fastft bench embedded",
        "fastft bench embedded-quick --arms peft,eager --output runs/mine",
        "fastft bench mine.toml --repetitions 6",
        about="Scenarios: embedded, embedded-quick, llama-3-8b, llama-3-8b-nf4, llama-3-8b-short, llama-3-8b-long, "
        "qwen2-1.5b, qwen2-1.5b-small-batch",
    )
)(bench)
app.command(epilog=_examples("fastft report runs/mine", "fastft report runs/a runs/b --output page"))(report)
app.command(epilog=_examples("fastft demo", "fastft demo --minutes 3 --output first-look"))(demo)

plans = typer.Typer(rich_markup_mode=None)


@plans.callback(invoke_without_command=True)
def plan_verb(context: typer.Context) -> None:
    """Look at the plans that `fastft tune` made, share them, clean up."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), nl=False)


plans.command("list", epilog=_examples("fastft plan list"))(plan.list_)
plans.command("show", epilog=_examples("fastft plan show 3f2a"))(plan.show)
plans.command("diff", epilog=_examples("fastft plan diff 3f2a 9c01", "fastft plan diff theirs.json"))(plan.diff)
plans.command("export", epilog=_examples("fastft plan export 3f2a ours.json"))(plan.export)
plans.command("import", epilog=_examples("fastft plan import theirs.json"))(plan.import_)
plans.command("verify", epilog=_examples("fastft plan verify"))(plan.verify)
plans.command("prune", epilog=_examples("fastft plan prune --stale", "fastft plan prune --older-than 90"))(plan.prune)
app.add_typer(plans, name="plan")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit; `arguments` are the process's by default."""
    # Ended politely, it ends its workers as after Ctrl-C; by default they would go on alone.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # A closed pipe that nobody reads any more is no reason for a traceback.
    with suppress(BrokenPipeError):
        app(arguments)
    sys.exit(0)
