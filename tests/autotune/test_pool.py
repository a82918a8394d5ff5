import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.pool import TrialPool
from autotune.probe import ProbeRequest
from fastft.config import RunConfig
from fastft.errors import OutputError
from fastft.hardware import Device
from fastft.models.shapes import SHAPES
from fastft.plan import Choices, Trial
from fastft.planning import plan_key

GPU = Device("cuda", "H", "9.0", 132, 140 * 2**30, 8, bus_id="0000:01:00.0")
SIZES = (1, 2, 4, 8, 16)


def request(micro_batch: int = 4, cap: str | None = None, **more: Any) -> ProbeRequest:
    choices = Choices(backend="eager", micro_batch=micro_batch, accumulation=16 // micro_batch, placement=["light"])
    return ProbeRequest(config=RunConfig(memory_cap=cap), choices=choices, **more)


def trial(of: ProbeRequest, milliseconds: float = 1.0, verdict: str = "ok", peak: int | None = 100) -> Trial:
    return Trial.model_validate(
        {"choices": of.choices, "verdict": verdict, "step_time_ms": [milliseconds], "peak_bytes": peak}
    )


def pool(folder: Path, tuning: str = "a") -> TrialPool:
    return TrialPool(folder / "x.jsonl", tuning)


def test_an_interrupted_tuning_finds_its_trials_turn_by_turn(tmp_path: Path) -> None:
    first = pool(tmp_path)
    assert first.take(request()) is None
    first.add(request(), trial(request(), 1.0), 9.0)
    first.add(request(8), trial(request(8), 5.0), 9.0)
    first.add(request(), trial(request(), 2.0), 9.0, turn=1)
    assert first.take(request()) is None, "what this tuning measured itself is no memory"
    for _ in range(2):
        again = pool(tmp_path)
        assert [t.step_time_ms for turn in (0, 1) if (t := again.take(request(), turn))] == [[1.0], [2.0]]
        assert again.take(request(), 2) is None
        assert again.take(request(8)) == trial(request(8), 5.0)
        assert again.take(request(2)) is None
        assert again.others(request()) == []
        assert again.probe_seconds() == [9.0] * 3
    again.forget()
    assert pool(tmp_path).take(request()) is None


def test_another_tuning_gets_first_measurements_only_and_marked(tmp_path: Path) -> None:
    first, other = pool(tmp_path, "a"), pool(tmp_path, "b")
    first.add(request(), trial(request(), 1.0), 9.0)
    first.add(request(), trial(request(), 2.0), 9.0, turn=1)
    other = pool(tmp_path, "b")
    assert other.take(request()) is None
    assert other.take(request(), 1) is None
    assert other.others(request()) == [trial(request(), 1.0).model_copy(update={"reused": True})]
    assert other.others(request(timed_steps=8)) == [], "measured otherwise"
    assert other.others(request(seed=1)) == []


def test_a_tuning_that_ended_is_another_one(tmp_path: Path) -> None:
    first = pool(tmp_path)
    first.end()
    assert not first.path.exists(), "nothing was measured"
    first.add(request(), trial(request(), 1.0), 9.0)
    first.add(request(), trial(request(), 2.0), 9.0, turn=1)
    first.end()
    again = pool(tmp_path)
    assert (again.take(request()), again.take(request(), 1)) == (None, None)
    assert [t.step_time_ms for t in again.others(request())] == [[1.0]]


@settings(max_examples=60, deadline=None)
@given(
    measured=st.lists(st.tuples(st.sampled_from(SIZES), st.integers(1, 99), st.sampled_from("abc")), max_size=12),
    cap=st.none() | st.integers(1, 99),
    before=st.none() | st.integers(1, 99),
)
def test_a_pool_judges_the_latest_trial_of_each_by_the_cap_that_asks(
    measured: list[tuple[int, int, str]], cap: int | None, before: int | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Against the definition: a trial under a cap is the one without, with its peak judged."""
    folder = tmp_path_factory.mktemp("pool")
    latest: dict[int, int] = {}
    for size, peak, tuning in measured:
        of = request(size, None if before is None else f"{before}")
        verdict = "over_cap" if before is not None and peak > before else "ok"
        pool(folder, tuning).add(of, trial(of, 1.0, verdict, peak), 1.0)
        latest[size] = peak
    found = pool(folder, "new").others(request(cap=None if cap is None else f"{cap}"))
    assert {t.choices.micro_batch: t.peak_bytes for t in found} == latest
    assert len(found) == len(latest)
    assert all(t.reused for t in found)
    assert all((t.verdict == "ok") == (cap is None or (t.peak_bytes or 0) <= cap) for t in found)


def test_caps_share_a_pool_and_nothing_else_does() -> None:
    shape, cache = SHAPES["toy-llama"], Path("cache")

    def path(device: Device = GPU, **change: Any) -> Path:
        config = RunConfig(model="toy-llama", **change)
        return TrialPool.of(cache, plan_key(config, shape, device), device, "quick").path

    assert path() == path(memory_cap="8GiB")
    assert len({path(), path(sequence_tokens=64), path(packing=True), path(batch_size=4), path(dtype="fp32")}) == 5
    assert path() != path(Device("cuda", "H", "9.0", 132, 140 * 2**30, 8, bus_id="0000:02:00.0"))


@pytest.mark.parametrize("verdict", ["failed", "timeout"])
def test_crashes_are_tried_again(verdict: str, tmp_path: Path) -> None:
    pool(tmp_path).add(request(), trial(request(), verdict=verdict), 1.0)
    assert pool(tmp_path).take(request()) is None
    assert pool(tmp_path, "b").others(request()) == []


@pytest.mark.parametrize("verdict", ["out_of_memory", "allocator_retry"])
def test_what_no_cap_decides_no_cap_changes(verdict: str, tmp_path: Path) -> None:
    pool(tmp_path).add(request(), trial(request(), verdict=verdict), 1.0)
    for cap in (None, "50", "200"):
        assert [t.verdict for t in pool(tmp_path, "b").others(request(cap=cap))] == [verdict]


def test_a_torn_line_loses_only_itself(tmp_path: Path) -> None:
    pool(tmp_path).add(request(), trial(request()), 1.0)
    path = pool(tmp_path).path
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 2])
    pool(tmp_path).add(request(8), trial(request(8)), 1.0)
    again = pool(tmp_path)
    assert again.take(request()) is not None
    assert again.take(request(8)) is not None
    assert again.take(request(2)) is None


@pytest.mark.parametrize(
    "garbage", [b"\xff\n\x00", b"[]\n{}\nnull\n", b'{"at": "x", "trial": {}}', b"[" * 10000, b'{"ended": []}']
)
def test_garbage_is_ignored(garbage: bytes, tmp_path: Path) -> None:
    pool(tmp_path).path.write_bytes(garbage)
    pool(tmp_path).add(request(), trial(request()), 1.0)
    assert pool(tmp_path).take(request()) is not None


def test_old_trials_are_not_compared_with_new_ones(tmp_path: Path) -> None:
    pool(tmp_path).add(request(), trial(request()), 1.0)
    path = pool(tmp_path).path
    entry = json.loads(path.read_text())
    for hours, remembered in ((23, True), (25, False)):
        path.write_text(json.dumps(entry | {"at": time.time() - 3600 * hours}))
        assert (pool(tmp_path).take(request()) is not None) == remembered
        assert (pool(tmp_path, "b").others(request()) != []) == remembered


def test_a_pool_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        TrialPool(tmp_path / "file" / "x", "a").add(request(), trial(request()), 1.0)


def test_pools_without_a_trial_of_the_last_day_are_removed(tmp_path: Path) -> None:
    (tmp_path / "trials").mkdir()
    old, new = tmp_path / "trials" / "old.jsonl", tmp_path / "trials" / "new.jsonl"
    for path in (old, new):
        path.write_text("{}\n", encoding="utf-8")
    for path, hours in ((old, 25), (new, 23)):
        past = time.time() - 3600 * hours
        os.utime(path, (past, past))
    TrialPool.remove_outdated(tmp_path)
    assert (old.exists(), new.exists()) == (False, True)
    TrialPool.remove_outdated(tmp_path / "nothing here")
