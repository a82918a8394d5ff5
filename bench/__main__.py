"""`python -m bench`: how good is what the tuner chooses, what does memory cost, and what does the real loop cost?

    python -m bench regret qwen2-1.5b --seq-len 2048 --batch-size 8 --output runs/regret-qwen2-1.5b

    grid       every configuration of a run, measured
    regret     the grid, the tuned plans under some memory caps, and both measured against each other
    repeats    the same run tuned several times
    measures   each measure against memory, alone and all together
    loop       `fastft train` against a plain loop on the same rows

All but the last go on where they were cut short, by --max-minutes or otherwise: the output folder is the memory.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from autotune.ranking import NOISE
from bench.grid import Axes, Grid, measure_grid
from bench.loop import LOOP, TARGET, compare_loops
from bench.measures import MEASURES_FILE, MeasureResult, Measures, compare_measures
from bench.regret import (
    CAPS,
    REGRET,
    STORE,
    CapResult,
    Measured,
    Regret,
    capped,
    compare,
    fitting,
    peaks_between,
    plan_of,
    spread_caps,
    tuned_plan,
)
from bench.repeats import REPEATS, repeat_tuning
from bench.trials import Deadline, Steps
from fastft.commands.flags import KEY_FLAGS, run_flags
from fastft.config import RunConfig, parse_bytes
from fastft.console import keeping, print_line, print_table, report_error, say, set_up_logging
from fastft.errors import ConfigError, FastftError, PlanError
from fastft.hardware import detect_device
from fastft.plan import Plan, Trial
from fastft.plan_store import PlanStore, read_foreign_plan
from fastft.planning import describe_difference, model_shape, plan_key
from fastft.units import gib

app = typer.Typer(
    add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip

LOOP_FLAGS = (*KEY_FLAGS, "data", "steps", "learning_rate", "plan", "save_steps", "log_steps", "seed")
GRID_FLAGS = tuple(name for name in KEY_FLAGS if name != "memory_cap")
KEPT = "what was measured is kept, and the same command goes on from there"

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A local folder, a shipped shape, or tiny.")]
FolderFlag = Annotated[Path, typer.Option("--output", help="The folder for what this writes; a second call goes on.")]
MinutesFlag = Annotated[float | None, typer.Option(help="Begin nothing that would not end by then.")]
MicroBatchFlag = Annotated[int | None, typer.Option(help="The largest micro-batch of the grid.")]
PartsFlag = Annotated[int, typer.Option(help="Mixed placements change after each 1/PARTS of the layers.")]
LossFlag = Annotated[str, typer.Option(metavar="N,…", help="Rows of logits at a time.")]
MlpFlag = Annotated[str, typer.Option(metavar="N,…", help="Tokens of an MLP at a time; all is the whole.")]
GraphsFlag = Annotated[str, typer.Option(metavar="auto,off", help="Whether small steps are replayed as CUDA graphs.")]
DenseFlag = Annotated[int, typer.Option(help="Quantized weights stay dense in steps of 1/PARTS of the layers.")]
WarmupFlag = Annotated[int, typer.Option("--warmup-steps", min=1, help="Least steps before the timed ones.")]
StepsFlag = Annotated[int, typer.Option("--steps", min=3, help="Timed optimizer steps a configuration.")]


@app.callback()
def program() -> None:
    """How good is what the tuner chooses, what does memory cost, and what does the real loop cost?"""
    set_up_logging()


@app.command()
@run_flags(*GRID_FLAGS)
def grid(
    model: ModelArgument,
    output: FolderFlag,
    max_minutes: MinutesFlag = None,
    most_micro_batch: MicroBatchFlag = None,
    parts: PartsFlag = 4,
    loss_chunks: LossFlag = "2048,512",
    mlp_chunks: MlpFlag = "all,2048",
    graphs: GraphsFlag = "auto",
    dense_parts: DenseFlag = 2,
    warmup_steps: WarmupFlag = 1,
    steps: StepsFlag = 3,
    **run: Any,
) -> None:
    """Measure every configuration of a run."""
    with _reporting():
        config = RunConfig.load(model=model, **run)
        axes = _axes(most_micro_batch, parts, loss_chunks, mlp_chunks, graphs, dense_parts)
        found = measure_grid(
            config, output, axes=axes, steps=Steps(warmup=warmup_steps, timed=steps),
            deadline=Deadline.after(max_minutes), say=say,
        )  # fmt: skip
        _show_grid(found)


@app.command()
@run_flags(*GRID_FLAGS)
def regret(
    model: ModelArgument,
    output: FolderFlag,
    max_minutes: MinutesFlag = None,
    caps: Annotated[
        str, typer.Option(metavar="N|SIZE,…", help="So many caps between the smallest plan and the free one, or sizes.")
    ] = str(CAPS),
    plan: Annotated[
        list[Path] | None, typer.Option(help="A tuned plan's file; its cap is compared, and nothing is tuned.")
    ] = None,
    turns: Annotated[int, typer.Option(min=1, help="How often each finalist is measured.")] = 3,
    most_micro_batch: MicroBatchFlag = None,
    parts: PartsFlag = 4,
    loss_chunks: LossFlag = "2048,512",
    mlp_chunks: MlpFlag = "all,2048",
    graphs: GraphsFlag = "auto",
    dense_parts: DenseFlag = 2,
    warmup_steps: WarmupFlag = 1,
    steps: StepsFlag = 3,
    **run: Any,
) -> None:
    """Compare tuned plans with the best of a grid, under memory caps."""
    with _reporting():
        config, deadline = RunConfig.load(model=model, **run), Deadline.after(max_minutes)
        axes = _axes(most_micro_batch, parts, loss_chunks, mlp_chunks, graphs, dense_parts)
        counted = Steps(warmup=warmup_steps, timed=steps)
        plans: dict[int, Plan | FastftError] = dict(_plan_with_cap(file, config) for file in plan or [])
        sizes = _sizes(caps)
        found = measure_grid(config, output, axes=axes, steps=counted, deadline=deadline, say=say)
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
        result = compare(
            config, found, plans, output, turns=turns, steps=counted, deadline=deadline, say=say
        )  # fmt: skip
        if result is None:
            _say_time_is_up("the comparison is not complete")
            return
        _show_regret(result)
        print_line(f"kept in {output / REGRET}; `fastft report` shows it with the records beside it")


@app.command()
@run_flags(*KEY_FLAGS)
def repeats(
    model: ModelArgument,
    output: FolderFlag,
    times: Annotated[int, typer.Option(min=2, help="How often the run is tuned.")] = 5,
    max_minutes: MinutesFlag = None,
    **run: Any,
) -> None:
    """Tune the same run several times and compare what is chosen."""
    with _reporting():
        config = RunConfig.load(model=model, **run)
        result = repeat_tuning(config, output, times=times, deadline=Deadline.after(max_minutes), say=say)
        if result is None:
            _say_time_is_up("not all tunings are done")
            return
        rows = [
            [str(number), one.verdict, _rate(one.tokens_per_second), one.summary]
            for number, one in enumerate(result.repetitions, 1)
        ]
        print_table(["Tuning", "Choice", "Tokens/s", "What"], rows)
        agreeing = f"{result.agreeing} of {len(result.repetitions)}"
        print_line(f"{agreeing} chose the same, ties within {100 * result.noise:.0f} % counted")
        print_line(f"kept in {output / REPEATS}")


@app.command()
@run_flags(*GRID_FLAGS)
def measures(
    model: ModelArgument,
    output: FolderFlag,
    max_minutes: MinutesFlag = None,
    turns: Annotated[int, typer.Option(min=1, help="How often each measure is measured.")] = 3,
    warmup_steps: WarmupFlag = 1,
    steps: StepsFlag = 3,
    **run: Any,
) -> None:
    """Measure what each measure against memory saves, and costs."""
    with _reporting():
        result = compare_measures(
            RunConfig.load(model=model, **run), output, turns=turns,
            steps=Steps(warmup=warmup_steps, timed=steps), deadline=Deadline.after(max_minutes), say=say,
        )  # fmt: skip
        if result is None:
            _say_time_is_up("not all measures are measured")
            return
        _show_measures(result)
        if not result.complete:
            _say_time_is_up("some measures had fewer turns")
        print_line(f"kept in {output / MEASURES_FILE}; `fastft report {output}` shows it")


@app.command()
@run_flags(*LOOP_FLAGS)
def loop(
    model: ModelArgument,
    output: FolderFlag,
    warmup: Annotated[int, typer.Option("--uncounted-steps", min=1, help="Steps before the timed ones.")] = 20,
    **run: Any,
) -> None:
    """Compare `fastft train` with a plain loop on the same rows."""
    with _reporting():
        result = compare_loops(RunConfig.load(model=model, **run), output, warmup=warmup, say=say)
        rows = [
            [name, _rate(timed.tokens_per_second), f"{median(timed.step_ms):.1f}", f"{max(timed.step_ms):.1f}"]
            for name, timed in (("plain loop", result.plain), ("fastft train", result.trained))
        ]
        print_table(["Loop", "Tokens/s", "Median step, ms", "Longest"], rows)
        print_line(f"{100 * result.overhead:+.1f} % a token, {100 * (TARGET - 1):.0f} % allowed")
        print_line(f"kept in {output / LOOP}")


@contextmanager
def _reporting() -> Iterator[None]:
    """An error becomes one line and its exit code."""
    try:
        with keeping(KEPT):
            yield
    except typer.Exit:
        raise
    except BaseException as error:
        raise typer.Exit(report_error(error)) from error


def _axes(
    most_micro_batch: int | None, parts: int, loss_chunks: str, mlp_chunks: str, graphs: str, dense_parts: int
) -> Axes:
    losses = tuple(_chunk("--loss-chunks", word) for word in loss_chunks.split(","))
    mlps = tuple(None if word.strip() == "all" else _chunk("--mlp-chunks", word) for word in mlp_chunks.split(","))
    return Axes(
        most_micro_batch=most_micro_batch, parts=parts, loss_chunks=losses, mlp_chunks=mlps,
        graphs=tuple(word.strip() for word in graphs.split(",")), dense_parts=dense_parts,
    )  # fmt: skip


def _chunk(flag: str, word: str) -> int:
    if not word.strip().isdecimal():
        raise ConfigError(f"{flag} is not valid", got=word, allowed="numbers of tokens", fix="write it like 2048,512")
    return int(word)


def _sizes(caps: str) -> int | list[int]:
    """How many caps are wanted, or which, in bytes."""
    if caps.isdecimal() and int(caps) < 100:  # nothing trains in so few bytes
        return max(1, int(caps))
    return [parse_bytes(word) for word in caps.split(",")]


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


def _show_grid(found: Grid) -> None:
    if not found.complete:
        _say_time_is_up(f"{len(found.trials)} of {found.total} configurations are measured")
    ranked = fitting(found.trials)
    rows = [_grid_row(trial) for trial in ranked[:5]]
    smallest = min(ranked, key=lambda trial: trial.peak_bytes or 0, default=None)
    if smallest is not None:
        rows.append(_grid_row(smallest))
    print_table(["Tokens/s", "Peak", "Configuration: the fastest, and the smallest"], rows)
    print_line(f"{len(ranked)} of {found.total} ran")


def _grid_row(trial: Trial) -> list[str]:
    return [_rate(trial.tokens_per_second), gib(trial.peak_bytes or 0), trial.choices.summary()]


def _show_regret(result: Regret) -> None:
    speeds = ["Tuned", "Default", "Best of grid", "Best uniform"]
    print_table(
        ["Cap", *speeds, "Peak", "Regret", "Over default", "Over uniform"], [_regret_row(one) for one in result.caps]
    )
    for one in result.caps:
        if one.over_cap or one.problem:
            say(f"warning: under {gib(one.cap_bytes)}: {one.problem or 'the tuned plan exceeds the cap'}")
    print_line(f"grid: {result.grid_trials} of {result.grid_total} configurations; tokens/s, {result.turns} turns each")


def _regret_row(one: CapResult) -> Sequence[str]:
    def speed(found: Measured | None) -> str:
        return _rate(found.tokens_per_second if found is not None else None)

    def share(value: float | None) -> str:
        return "none" if value is None else f"{100 * value:+.1f} %"

    peak = gib(one.tuned.peak_bytes) if one.tuned is not None and one.tuned.peak_bytes is not None else "none"
    return [
        gib(one.cap_bytes), speed(one.tuned), speed(one.default), speed(one.best), speed(one.best_uniform),
        f"{peak}{', over the cap' if one.over_cap else ''}",
        share(one.regret), share(one.gain_over_default), share(one.gain_over_uniform),
    ]  # fmt: skip


def _show_measures(result: Measures) -> None:
    baseline, rows = result.results[0], []
    for one in result.results:
        outcome = [one.verdict.replace("_", " "), "none", "none", "none"]
        if one.verdict == "ok":
            saved = "none" if baseline.verdict != "ok" else gib((baseline.peak_bytes or 0) - (one.peak_bytes or 0))
            outcome = [_rate(one.tokens_per_second), _times(one, baseline), gib(one.peak_bytes or 0), saved]
        rows.append([one.name, *outcome, gib(one.predicted_peak_bytes), one.description])
    print_table(["Measure", "Tokens/s", f"Over {baseline.name}", "Peak", "Saved", "Predicted", "What it does"], rows)


def _times(one: MeasureResult, baseline: MeasureResult) -> str:
    if baseline.verdict != "ok" or not one.tokens_per_second or not baseline.tokens_per_second:
        return "none"
    return f"{one.tokens_per_second / baseline.tokens_per_second:.3f}×"


def _rate(value: float | None) -> str:
    return "none" if value is None else f"{value:,.0f}"


if __name__ == "__main__":
    app()
