"""The tables that `python -m bench` prints."""

from collections.abc import Sequence
from statistics import median

from bench.grid import Grid
from bench.loop import TARGET, Loops
from bench.measures import MeasureResult, Measures
from bench.peers import OURS, Peers
from bench.regret import CapResult, Measured, Regret, fitting
from bench.repeats import Repeats
from fastft.console import print_line, print_table, say
from fastft.plan import Trial
from fastft.units import gib


def show_grid(found: Grid) -> None:
    """The fastest five, and the smallest."""
    ranked = fitting(found.trials)
    rows = [_grid_row(trial) for trial in ranked[:5]]
    smallest = min(ranked, key=lambda trial: trial.peak_bytes or 0, default=None)
    if smallest is not None:
        rows.append(_grid_row(smallest))
    print_table(["Tokens/s", "Peak", "Configuration: the fastest, and the smallest"], rows)
    print_line(f"{len(ranked)} of {found.total} ran")


def _grid_row(trial: Trial) -> list[str]:
    return [_rate(trial.tokens_per_second), gib(trial.peak_bytes or 0), trial.choices.summary()]


def show_regret(result: Regret) -> None:
    """A row a cap; what went wrong on stderr."""
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


def show_repeats(result: Repeats) -> None:
    """A row a tuning, and how many agree."""
    rows = [
        [str(number), one.verdict, _rate(one.tokens_per_second), one.summary]
        for number, one in enumerate(result.repetitions, 1)
    ]
    print_table(["Tuning", "Choice", "Tokens/s", "What"], rows)
    agreeing = f"{result.agreeing} of {len(result.repetitions)}"
    print_line(f"{agreeing} chose the same, ties within {100 * result.noise:.0f} % counted")


def show_loops(result: Loops) -> None:
    """Both loops, and what the real one costs."""
    rows = [
        [name, _rate(timed.tokens_per_second), f"{median(timed.step_ms):.1f}", f"{max(timed.step_ms):.1f}"]
        for name, timed in (("plain loop", result.plain), ("fastft train", result.trained))
    ]
    print_table(["Loop", "Tokens/s", "Median step, ms", "Longest"], rows)
    print_line(f"{100 * result.overhead:+.1f} % a token, {100 * (TARGET - 1):.0f} % allowed")


def show_measures(result: Measures) -> None:
    """A row a measure, beside the first, which is none."""
    baseline, rows = result.results[0], []
    for one in result.results:
        outcome = [one.verdict.replace("_", " "), "none", "none", "none"]
        if one.verdict == "ok":
            saved = "none" if baseline.verdict != "ok" else gib((baseline.peak_bytes or 0) - (one.peak_bytes or 0))
            outcome = [_rate(one.tokens_per_second), _times(one, baseline), gib(one.peak_bytes or 0), saved]
        rows.append([one.name, *outcome, gib(one.predicted_peak_bytes), one.description])
    print_table(["Measure", "Tokens/s", f"Over {baseline.name}", "Peak", "Saved", "Predicted", "What it does"], rows)


def show_peers(result: Peers) -> None:
    """A row an implementation, and by how much fastft is faster; what went wrong on stderr."""
    ours, rows = result.tokens_per_second(OURS), []
    for name in dict.fromkeys(run.implementation for run in result.runs):
        speed, peak = result.tokens_per_second(name), result.peak_bytes(name)
        times = f"{ours / speed:.2f}×" if ours and speed else "none"
        version = next((answer.version for answer in result.of(name)), "")
        rows.append([f"{name} {version}".strip(), _rate(speed), "none" if peak is None else gib(peak), times])
    print_table(["Implementation", "Tokens/s", "Peak", f"{OURS} is"], rows)
    for run in result.runs:
        if run.problem:
            say(f"warning: {run.implementation}, turn {run.turn + 1}: {run.problem}")


def _times(one: MeasureResult, baseline: MeasureResult) -> str:
    if baseline.verdict != "ok" or not one.tokens_per_second or not baseline.tokens_per_second:
        return "none"
    return f"{one.tokens_per_second / baseline.tokens_per_second:.3f}×"


def _rate(value: float | None) -> str:
    return "none" if value is None else f"{value:,.0f}"
