"""Results beside the records: files of one JSON object each, by `python -m bench` and the kernels' benchmarks."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fastft.errors import DataError
from reports.numbers import clean

TRIALS = {"regret.json": ("grid.jsonl", "finalists.jsonl"), "measures.json": ("measures.jsonl",)}
"""By result, the files of trials that it is derived from."""
_TUNER_CACHE = "tuner-cache"

T = TypeVar("T")


def result_files(inputs: Sequence[Path], *names: str) -> list[Path]:
    """The files of these names that lie beside the records, in order."""
    folders = dict.fromkeys(path if path.is_dir() else path.parent for path in inputs)
    return list(dict.fromkeys(file for folder in folders for name in names for file in sorted(folder.rglob(name))))


def are_trials(file: Path) -> bool:
    """Whether a JSONL file beside the records holds trials: those of a result, or of the tuner's cache folder."""
    return any(file.name in names for names in TRIALS.values()) or _TUNER_CACHE in file.parts


def trial_files(results: Sequence[Path]) -> list[Path]:
    """The trials that these results are derived from, in order."""
    found = [file.with_name(name) for file in results for name in TRIALS.get(file.name, ())]
    return [file for file in found if file.is_file()]


def read_result(file: Path, command: str, read: Callable[[dict[str, Any]], T]) -> T:
    """What `read` makes of the file's object.

    Raises:
        DataError: it is not what `command` writes.
    """
    try:
        return read(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, ArithmeticError) as error:
        raise DataError(
            f"cannot read {file}", got=f"{type(error).__name__}: {error}", allowed=f"what `{command}` writes",
            fix="run it again, or take the file away",
        ) from error  # fmt: skip


def run_in_words(config: dict[str, Any]) -> str:
    """`qwen2-1.5b in nf4, 8 × 2,048 tokens`."""
    quantization = "" if config["quantization"] == "none" else f" in {clean(config['quantization'], 20)}"
    size = f"{int(config['batch_size']):,} × {int(config['sequence_tokens']):,} tokens"
    return f"{clean(config['model'], 60)}{quantization}, {size}"
