"""Unsloth, stock PEFT and fastft on the same work (`python -m bench peers`) → tables."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from reports.numbers import DASH, NOTHING, clean, number, ratio
from reports.results import read_result, result_files, run_in_words
from reports.tables import Cell, Table

PEERS = "peers.json"
_OURS = "fastft"
_GIB = 2**30

HOW_TO_READ = (
    "Peers",
    "Each implementation in processes of its own, in a plain loop around the model as its documentation writes it: the "
    "same weights, adapter, optimizer and token ids. Speed is by the median step of all turns, with the range of the "
    "turns; the peak is the highest that the allocator handed out. Either nobody recomputes, or each checkpoints in "
    "its own way; fastft then has the cap beside its peak, a peer's peak unless one was given, and none where no peer "
    "ran. Batches, the number of trained parameters, the loaded model's size and the first loss, which depends on the "
    "frozen weights alone, must be those of fastft's runs; what differs is said.",
)
"""What a reader is told about the tables."""

_NONE = Cell(NOTHING, tone="muted")


def peers_files(inputs: Sequence[Path]) -> list[Path]:
    """The results that lie beside the records, in order."""
    return result_files(inputs, PEERS)


def peers_tables(files: Sequence[Path]) -> tuple[Table, ...]:
    """A table a file, a row an implementation.

    Raises:
        DataError: a file is no such result.
    """
    return tuple(read_result(file, "python -m bench peers", _table) for file in files)


def _table(result: dict[str, Any]) -> Table:
    tokens = result["config"]["batch_size"] * result["config"]["sequence_tokens"]
    names = list(dict.fromkeys(str(run["implementation"]) for run in result["runs"]))
    runs = {name: [run for run in result["runs"] if run["implementation"] == name] for name in names}
    ours = _speed(runs.get(_OURS, []), tokens)
    how = {"none": "no recomputation", "own": "each one's own checkpointing"}[result["recomputation"]]
    title = f"{run_in_words(result['config'])}, {how}, on {clean(result['device']['name'], 60)}"
    columns = ("Implementation", "Tokens/s", "Peak, GiB", f"{_OURS} is", "First loss")
    return Table(title, columns, tuple(_row(name, of_name, tokens, ours) for name, of_name in runs.items()))


def _row(name: str, runs: Sequence[dict[str, Any]], tokens: int, ours: float | None) -> tuple[Cell, ...]:
    speed, problem = _speed(runs, tokens), next((clean(run["problem"], 300) for run in runs if run["problem"]), "")
    if speed is None:
        return Cell(clean(name, 40)), Cell("failed", problem, "bad", columns=4)
    answers = _answers(runs)
    of_turns = [1000.0 * tokens / median(answer["step_time_ms"]) for answer in answers]
    low, high = number(min(of_turns)), number(max(of_turns))
    peaks = [answer["peak_bytes"] for answer in answers if answer["peak_bytes"] is not None]
    cap = next((run["memory_cap_bytes"] for run in runs if run["memory_cap_bytes"] is not None), None)
    peak = Cell(f"{max(peaks) / _GIB:.2f}", "" if cap is None else f"cap {cap / _GIB:.2f}") if peaks else _NONE
    return (
        Cell(f"{clean(name, 40)} {clean(answers[0]['version'], 40)}", problem, "bad" if problem else ""),
        Cell(number(speed), "" if low == high else f"{low}{DASH}{high}"),
        peak,
        Cell(ratio(ours / speed)) if ours is not None and name != _OURS else _NONE,
        Cell(f"{answers[0]['loss'][0]:.4f}"),
    )


def _answers(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [run["answer"] for run in runs if run["answer"] is not None]


def _speed(runs: Sequence[dict[str, Any]], tokens: int) -> float | None:
    times = [time for answer in _answers(runs) for time in answer["step_time_ms"]]
    return 1000.0 * tokens / median(times) if times else None
