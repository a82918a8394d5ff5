"""`python -m bench`: how good is what the tuner chooses, what does memory cost, and how do others do?

    python -m bench regret qwen2-1.5b --seq-len 2048 --batch-size 8 --output runs/regret-qwen2-1.5b

    grid       every configuration of a run, measured
    regret     the grid, the tuned plans under some memory caps, and both measured against each other
    repeats    the same run tuned several times
    measures   each measure against memory, alone and all together
    loop       `fastft train` against a plain loop on the same rows
    peers      Unsloth and stock PEFT against fastft, each in a plain loop of its own

All but the last two go on where they were cut short, by --max-minutes or otherwise: the output folder is the memory.
"""

import functools
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from autotune.ranking import NOISE
from bench import tables
from bench.flags import FolderFlag, MinutesFlag, ModelArgument, NewFolderFlag, axes_flags, parse_caps, steps_flags
from bench.grid import Axes, Grid, measure_grid
from bench.loop import LOOP, compare_loops
from bench.measures import MEASURES_FILE, compare_measures
from bench.peer_loop import IMPLEMENTATIONS
from bench.peers import PEERS, Recomputation, compare_peers
from bench.regret import CAPS, REGRET, STORE, capped, compare, peaks_between, plan_of, spread_caps, tuned_plan
from bench.repeats import REPEATS, repeat_tuning
from bench.trials import Deadline, Steps
from fastft.commands.flags import KEY_FLAGS, Verb, run_flags
from fastft.config import RunConfig
from fastft.console import keeping, print_line, report_error, say, set_up_logging
from fastft.errors import FastftError, PlanError
from fastft.hardware import detect_device
from fastft.plan import Plan
from fastft.plan_store import PlanStore, read_foreign_plan
from fastft.planning import describe_difference, model_shape, plan_key
from fastft.units import gib

app = typer.Typer(
    add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip

LOOP_FLAGS = (*KEY_FLAGS, "data", "steps", "learning_rate", "plan", "save_steps", "log_steps", "seed")
PEER_FLAGS = (*(name for name in KEY_FLAGS if name not in ("packing", "trust_remote_code", "offline")), "seed")
GRID_FLAGS = tuple(name for name in KEY_FLAGS if name != "memory_cap")
KEPT = "what was measured is kept, and the same command goes on from there"


@app.callback()
def program() -> None:
    """How good is what the tuner chooses, what does memory cost, and how do others do?"""
    # Ended politely, it ends its workers as after Ctrl-C; by default they would go on alone.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    set_up_logging()


def _reporting(verb: Verb) -> Verb:
    """An error becomes one line and its exit code."""

    @functools.wraps(verb)
    def command(**given: Any) -> None:
        try:
            with keeping(KEPT):
                verb(**given)
        except typer.Exit:
            raise
        except BaseException as error:
            raise typer.Exit(report_error(error)) from error

    return command  # type: ignore[return-value]


@app.command()
@run_flags(*GRID_FLAGS)
@_reporting
@axes_flags
@steps_flags
def grid(
    model: ModelArgument, output: FolderFlag, axes: Axes, steps: Steps, max_minutes: MinutesFlag = None, **run: Any
) -> None:
    """Measure every configuration of a run."""
    found = measure_grid(
        RunConfig.load(model=model, **run), output, axes=axes, steps=steps, deadline=Deadline.after(max_minutes),
        say=say,
    )  # fmt: skip
    _show_grid(found)


@app.command()
@run_flags(*GRID_FLAGS)
@_reporting
@axes_flags
@steps_flags
def regret(
    model: ModelArgument,
    output: FolderFlag,
    axes: Axes,
    steps: Steps,
    max_minutes: MinutesFlag = None,
    caps: Annotated[
        str, typer.Option(metavar="N|SIZE,…", help="So many caps between the smallest plan and the free one, or sizes.")
    ] = str(CAPS),
    plan: Annotated[
        list[Path] | None, typer.Option(help="A tuned plan's file; its cap is compared, and nothing is tuned.")
    ] = None,
    turns: Annotated[int, typer.Option(min=1, help="How often each finalist is measured.")] = 3,
    **run: Any,
) -> None:
    """Compare tuned plans with the best of a grid, under memory caps."""
    config, deadline = RunConfig.load(model=model, **run), Deadline.after(max_minutes)
    plans: dict[int, Plan | FastftError] = dict(_plan_with_cap(file, config) for file in plan or [])
    sizes = parse_caps(caps)
    found = measure_grid(config, output, axes=axes, steps=steps, deadline=deadline, say=say)
    if not found.complete:
        _show_grid(found)
        return
    if not plans:
        store = PlanStore(output / STORE)
        for cap in _caps_between(found, sizes) if isinstance(sizes, int) else sizes:
            expected = max((p.evidence.seconds for p in plans.values() if isinstance(p, Plan)), default=0.0)
            known = plan_of(config, cap, store)
            if known is None and deadline.passed(expected):
                _say_time_is_up(f"{len(plans)} plans are tuned")
                return
            if known is None:
                say(f"tuning under {gib(cap)}")
            plans[cap] = known or tuned_plan(config, cap, store, say)
    result = compare(config, found, plans, output, turns=turns, steps=steps, deadline=deadline, say=say)
    if result is None:
        _say_time_is_up("the comparison is not complete")
        return
    tables.show_regret(result)
    print_line(f"kept in {output / REGRET}; `fastft report` shows it with the records beside it")


@app.command()
@run_flags(*KEY_FLAGS)
@_reporting
def repeats(
    model: ModelArgument,
    output: FolderFlag,
    times: Annotated[int, typer.Option(min=2, help="How often the run is tuned.")] = 5,
    max_minutes: MinutesFlag = None,
    **run: Any,
) -> None:
    """Tune the same run several times and compare what is chosen."""
    config = RunConfig.load(model=model, **run)
    result = repeat_tuning(config, output, times=times, deadline=Deadline.after(max_minutes), say=say)
    if result is None:
        _say_time_is_up("not all tunings are done")
        return
    tables.show_repeats(result)
    print_line(f"kept in {output / REPEATS}")


@app.command()
@run_flags(*GRID_FLAGS)
@_reporting
@steps_flags
def measures(
    model: ModelArgument,
    output: FolderFlag,
    steps: Steps,
    max_minutes: MinutesFlag = None,
    turns: Annotated[int, typer.Option(min=1, help="How often each measure is measured.")] = 3,
    **run: Any,
) -> None:
    """Measure what each measure against memory saves, and costs."""
    result = compare_measures(
        RunConfig.load(model=model, **run), output, turns=turns, steps=steps, deadline=Deadline.after(max_minutes),
        say=say,
    )  # fmt: skip
    if result is None:
        _say_time_is_up("not all measures are measured")
        return
    tables.show_measures(result)
    if not result.complete:
        _say_time_is_up("some measures had fewer turns")
    print_line(f"kept in {output / MEASURES_FILE}; `fastft report {output}` shows it")


@app.command()
@run_flags(*LOOP_FLAGS)
@_reporting
def loop(
    model: ModelArgument,
    output: NewFolderFlag,
    warmup: Annotated[int, typer.Option("--uncounted-steps", min=1, help="Steps before the timed ones.")] = 20,
    **run: Any,
) -> None:
    """Compare `fastft train` with a plain loop on the same rows."""
    tables.show_loops(compare_loops(RunConfig.load(model=model, **run), output, warmup=warmup, say=say))
    print_line(f"kept in {output / LOOP}")


@app.command()
@run_flags(*PEER_FLAGS)
@_reporting
@steps_flags
def peers(
    model: ModelArgument,
    output: NewFolderFlag,
    steps: Steps,
    implementations: Annotated[str, typer.Option(metavar="A,B,…", help="Whom to run.")] = ",".join(IMPLEMENTATIONS),
    recomputation: Annotated[
        Recomputation, typer.Option(help="Nobody's, or each one's own checkpointing; fastft then gets a peer's memory.")
    ] = "own",
    unsloth_python: Annotated[
        str, typer.Option(metavar="FILE", help="The interpreter of an environment that has Unsloth.")
    ] = sys.executable,
    turns: Annotated[int, typer.Option(min=1, help="How often each one runs.")] = 1,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for one run.")] = 900.0,
    **run: Any,
) -> None:
    """Compare Unsloth, stock PEFT and fastft, each in a plain loop of its own."""
    result = compare_peers(
        RunConfig.load(model=model, **run), output, implementations=[w.strip() for w in implementations.split(",")],
        recomputation=recomputation, unsloth_python=unsloth_python, steps=steps, turns=turns, timeout_seconds=timeout,
        say=say,
    )  # fmt: skip
    tables.show_peers(result)
    print_line(f"kept in {output / PEERS}; `fastft report {output}` shows it")


def _show_grid(found: Grid) -> None:
    if not found.complete:
        _say_time_is_up(f"{len(found.trials)} of {found.total} configurations are measured")
    tables.show_grid(found)


def _caps_between(found: Grid, count: int) -> list[int]:
    """`count` caps between the smallest plan of the grid and the free one."""
    noise = NOISE[detect_device(found.header.config.device).kind]
    return spread_caps(*peaks_between(found.trials, noise), count=count)


def _plan_with_cap(path: Path, config: RunConfig) -> tuple[int, Plan]:
    """The plan in a file, by its cap.

    Raises:
        PlanError: it cannot be read, is for another run, or knows no cap.
    """
    plan = read_foreign_plan(path)
    cap = plan.key.memory_cap_bytes
    if cap is None:
        raise PlanError(
            f"plan {plan.id} has no memory cap", got=str(path), fix="tune it with --memory-cap: regret is under one"
        )
    run = capped(config, cap)
    if differences := describe_difference(plan.key, plan_key(run, model_shape(run), detect_device(run.device))):
        raise PlanError(f"plan {plan.id} is for another run", got="; ".join(differences), fix="give that run's flags")
    return cap, plan


def _say_time_is_up(what: str) -> None:
    say(f"the time is up: {what}; {KEPT}")


if __name__ == "__main__":
    app()
