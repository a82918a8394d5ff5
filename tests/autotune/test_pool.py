import json
import time
from pathlib import Path

import pytest

from autotune.journal import MAX_AGE_SECONDS, Journal
from autotune.probe import ProbeRequest
from fastft.config import RunConfig
from fastft.errors import OutputError
from fastft.plan import Choices, Trial


def request(micro_batch: int = 4) -> ProbeRequest:
    choices = Choices(backend="eager", micro_batch=micro_batch, accumulation=16 // micro_batch, placement=["light"])
    return ProbeRequest(config=RunConfig(), choices=choices)


def trial(of: ProbeRequest, milliseconds: float = 1.0, verdict: str = "ok") -> Trial:
    return Trial.model_validate({"choices": of.choices, "verdict": verdict, "step_time_ms": [milliseconds]})


def test_trials_are_taken_once_and_in_order(tmp_path: Path) -> None:
    first = Journal(tmp_path / "j" / "x.jsonl")
    assert first.take(request()) is None
    first.add(request(), trial(request(), 1.0))
    first.add(request(8), trial(request(8), 5.0))
    first.add(request(), trial(request(), 2.0))
    assert first.take(request()) is None, "what this tuner measured itself is no memory"
    for _ in range(2):
        again = Journal(first.path)
        assert [t.step_time_ms for t in (again.take(request()), again.take(request())) if t] == [[1.0], [2.0]]
        assert again.take(request()) is None
        assert again.take(request(8)) == trial(request(8), 5.0)
        assert again.take(request(2)) is None
    again.remove()
    assert Journal(first.path).take(request()) is None


@pytest.mark.parametrize("verdict", ["failed", "timeout"])
def test_crashes_are_tried_again(verdict: str, tmp_path: Path) -> None:
    Journal(tmp_path / "x").add(request(), trial(request(), verdict=verdict))
    assert Journal(tmp_path / "x").take(request()) is None


def test_a_torn_line_loses_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "x"
    Journal(path).add(request(), trial(request()))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 2])
    Journal(path).add(request(8), trial(request(8)))
    again = Journal(path)
    assert again.take(request()) is not None
    assert again.take(request()) is None
    assert again.take(request(8)) is not None


@pytest.mark.parametrize("garbage", [b"\xff\n\x00", b"[]\n{}\nnull\n", b'{"at": "x", "trial": {}}', b"[" * 10000])
def test_garbage_is_ignored(garbage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(garbage)
    Journal(path).add(request(), trial(request()))
    assert Journal(path).take(request()) is not None


def test_old_trials_are_not_compared_with_new_ones(tmp_path: Path) -> None:
    path = tmp_path / "x"
    Journal(path).add(request(), trial(request()))
    entry = json.loads(path.read_text())
    path.write_text(json.dumps(entry | {"at": time.time() - MAX_AGE_SECONDS - 1}))
    assert Journal(path).take(request()) is None


def test_a_journal_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        Journal(tmp_path / "file" / "x").add(request(), trial(request()))
