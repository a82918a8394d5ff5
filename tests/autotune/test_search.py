import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import filelock
import pytest

from autotune.phases import Progress
from autotune.probe import ProbeRequest
from autotune.search import _spares, dry_run, tune
from autotune.space import EFFORTS, default_candidate, uniform_policy
from devices import CPU, GPU
from fake_gpu import CONFIG, GIB, SHAPE, FakeGpu, capped, run
from fastft.config import RunConfig
from fastft.errors import ConfigError, MeasureError
from fastft.hardware import Device
from fastft.plan import Trial
from fastft.plan_store import PlanStore
from fastft.planning import resolve


def test_the_fastest_wins_and_is_stored_with_all_evidence(store: PlanStore) -> None:
    gpu = FakeGpu()
    result = run(store, gpu)
    assert not result.cached
    plan = result.plan
    assert (plan.choices.micro_batch, uniform_policy(plan.choices)) == (8, "keep")
    assert store.load(plan.key) == plan
    evidence = plan.evidence
    assert [trial.choices for trial in evidence.trials] == gpu.probed()
    assert evidence.trials[0].choices == default_candidate(CONFIG, SHAPE, GPU)
    assert evidence.best_tokens_per_second is not None
    assert evidence.default_tokens_per_second is not None
    assert evidence.best_tokens_per_second > evidence.default_tokens_per_second
    assert evidence.best_tokens_per_second == pytest.approx(16 * 1024 * 1000 / gpu.time_ms(plan.choices), rel=0.01)
    assert evidence.command == "fastft tune llama-3.2-1b --effort quick"
    assert evidence.created_at.endswith("+00:00")
    assert evidence.versions["python"]


def test_a_cached_plan_is_returned_without_a_probe(store: PlanStore) -> None:
    plan = run(store, FakeGpu()).plan
    gpu = FakeGpu()
    result = run(store, gpu)
    assert result.cached
    assert result.plan == plan
    assert gpu.requests == []
    assert not run(store, gpu, force=True).cached
    assert gpu.requests


def test_a_cached_plan_is_returned_quickly_and_without_torch(tmp_path: Path) -> None:
    config = RunConfig(model="toy-llama", sequence_tokens=64, device="cpu")
    tune(config, run_probe=FakeGpu(), store=PlanStore(tmp_path), device=CPU)
    code = """
import sys, time
started = time.perf_counter()
from pathlib import Path
from autotune.search import tune
from fastft.config import RunConfig
from fastft.hardware import Device
from fastft.plan_store import PlanStore
config = RunConfig(model="toy-llama", sequence_tokens=64, device="cpu")
assert tune(config, store=PlanStore(Path(sys.argv[1])), device=Device("cpu", "C", None, None, 2**35, 2)).cached
assert not {"torch", "transformers"} & set(sys.modules)
print(time.perf_counter() - started)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True, cwd=root
    )
    assert float(done.stdout) < 2.0


def test_after_a_lack_of_memory_the_next_attempt_measures_anew(store: PlanStore) -> None:
    full, free = FakeGpu(memory_bytes=3 * GIB), FakeGpu()
    with pytest.raises(MeasureError):
        run(store, full)
    assert list((store.cache / "trials").glob("*")) == []
    assert run(store, free).plan.choices in free.probed()


# Interruptions, limits, others


def test_an_interrupted_tuning_is_resumed(store: PlanStore) -> None:
    whole = FakeGpu()
    expected = run(PlanStore(store.cache / "other"), whole).plan.choices
    first, second = FakeGpu(), FakeGpu()

    def interrupted(request: ProbeRequest) -> Trial:
        if len(first.requests) == 3:
            raise KeyboardInterrupt
        return first(request)

    with pytest.raises(KeyboardInterrupt):
        run(store, interrupted)
    assert store.entries() == []
    plan = run(store, second).plan
    assert plan.choices == expected
    assert first.probed() + second.probed() == whole.probed()
    assert len(plan.evidence.trials) == len(whole.requests)


def test_force_forgets_an_interrupted_tuning(store: PlanStore) -> None:
    first, whole, forced = FakeGpu(), FakeGpu(), FakeGpu()

    def interrupted(request: ProbeRequest) -> Trial:
        if len(first.requests) == 3:
            raise KeyboardInterrupt
        return first(request)

    with pytest.raises(KeyboardInterrupt):
        run(store, interrupted)
    run(PlanStore(store.cache / "other"), whole)
    run(store, forced, force=True)
    assert forced.probed() == whole.probed()


def test_what_the_run_sets_itself_does_not_narrow_the_plan(store: PlanStore) -> None:
    pinned = CONFIG.model_copy(update={"micro_batch": 1, "placement": "full", "backend": "peft"})
    free = run(PlanStore(store.cache / "other"), FakeGpu()).plan
    plan = run(store, FakeGpu(), pinned).plan
    assert plan.key == free.key
    assert plan.choices == free.choices
    assert resolve(pinned, SHAPE, GPU, store).choices.micro_batch == 1


def test_another_tuner_of_the_device_is_waited_for_and_its_plan_taken(store: PlanStore) -> None:
    plan = run(PlanStore(store.cache / "other"), FakeGpu()).plan
    run(store, FakeGpu(), CONFIG.model_copy(update={"batch_size": 4}))  # makes the lock file
    lock_file = next((store.cache / "locks").iterdir())
    waiting = threading.Event()
    results: list[Any] = []
    gpu = FakeGpu()

    def report(progress: Progress) -> None:
        if progress.phase == "waiting":
            waiting.set()

    lock = filelock.FileLock(lock_file)
    with lock:
        second = threading.Thread(target=lambda: results.append(run(store, gpu, on_progress=report)))
        second.start()
        assert waiting.wait(10)
        store.save(plan)
    second.join(10)
    assert results[0].cached
    assert gpu.requests == []


def test_an_unknown_effort(store: PlanStore) -> None:
    with pytest.raises(ConfigError, match="did you mean 'quick'"):
        run(store, FakeGpu(), effort="quik")


def test_dry_run_lists_what_might_be_probed(store: PlanStore) -> None:
    dry = dry_run(CONFIG, shape=SHAPE, device=GPU, store=store)
    assert not store.cache.joinpath("trials").exists()
    gpu, phases = FakeGpu(), list[str]()
    run(store, gpu, on_progress=lambda progress: phases.append(progress.phase) if progress.trial else None)
    assert dry.candidates[0] == default_candidate(CONFIG, SHAPE, GPU)
    uniform = [choices for choices, phase in zip(gpu.probed(), phases, strict=True) if phase == "uniform"]
    assert all(choices in dry.candidates for choices in uniform)
    assert dry.probes is not None
    assert len(gpu.requests) <= dry.probes
    assert (dry.probe_seconds, dry.probe_seconds_measured) == (15.0, False)
    assert dry.minutes == pytest.approx((20 + 15 * dry.probes + 25) / 60)


def test_a_dry_run_knows_how_long_probes_took(store: PlanStore) -> None:
    def slow(request: ProbeRequest) -> Trial:
        time.sleep(0.05)
        return FakeGpu()(request)

    run(store, slow)
    dry = dry_run(CONFIG.model_copy(update={"memory_cap": "9GiB"}), shape=SHAPE, device=GPU, store=store)
    assert dry.probe_seconds_measured
    assert 0.05 <= dry.probe_seconds < 5
    everything = dry_run(CONFIG, effort="exhaustive", shape=SHAPE, device=GPU, store=store)
    assert (everything.probes, everything.minutes) == (None, None)


@pytest.mark.parametrize(("first_cap", "second_cap"), [(None, 9.0), (9.0, None), (5.0, 7.5), (7.5, 5.0)])
def test_under_another_cap_only_what_is_new_is_probed(
    first_cap: float | None, second_cap: float | None, store: PlanStore
) -> None:
    first, second = FakeGpu(), FakeGpu()
    run(store, first, capped(first_cap))
    phases: list[str] = []
    plan = run(
        store, second, capped(second_cap), on_progress=lambda p: phases.append(p.phase) if p.trial else None
    ).plan
    known = [choices.model_dump_json() for choices in first.probed()]
    searched = [c.model_dump_json() for c, p in zip(second.probed(), phases, strict=True) if p != "finalists"]
    assert not set(searched) & set(known)
    reused = [trial for trial in plan.evidence.trials if trial.reused]
    assert {trial.choices.model_dump_json() for trial in reused} == set(known)
    cap = None if second_cap is None else second_cap * GIB
    assert all((t.verdict == "ok") == (cap is None or (t.peak_bytes or 0) <= cap) for t in reused)
    # The finalists, the winner among them, are measured now, each as often as the others.
    fresh = [trial.choices for trial in plan.evidence.trials if not trial.reused]
    assert plan.choices in fresh
    finalists = [c for c, phase in zip(second.probed(), phases, strict=True) if phase == "finalists"]
    if finalists:  # none where nothing is close to a winner that was measured now
        (times,) = {fresh.count(choices) for choices in finalists}
        assert times >= 2
    assert finalists or second_cap == 5.0
    assert len(second.requests) <= EFFORTS["quick"].most_probes
    assert second.peak(plan.choices) <= (cap or second.memory_bytes)
    alone = run(PlanStore(store.cache / "alone"), FakeGpu(), capped(second_cap)).plan
    assert second.time_ms(plan.choices) <= 1.01 * second.time_ms(alone.choices)


def test_a_plan_rests_on_what_is_measured_now(store: PlanStore) -> None:
    """The device became half as fast since the first tuning."""
    run(store, FakeGpu(), capped(None))
    slow = FakeGpu(speed=lambda choices: 0.5)
    evidence = run(store, slow, capped(20.0)).plan.evidence
    plan = next(iter(PlanStore(store.cache).entries()))
    assert evidence.best_tokens_per_second == pytest.approx(16 * 1024 * 1000 / slow.time_ms(plan.choices), rel=0.01)
    assert evidence.default_tokens_per_second is not None
    assert evidence.default_tokens_per_second <= 16 * 1024 * 1000 / 200


def test_force_measures_all_of_another_cap_too(store: PlanStore) -> None:
    run(store, FakeGpu(), capped(None))
    gpu, alone = FakeGpu(), FakeGpu()
    plan = run(store, gpu, capped(9.0), force=True).plan
    run(PlanStore(store.cache / "alone"), alone, capped(9.0))
    assert gpu.probed() == alone.probed()
    assert not any(trial.reused for trial in plan.evidence.trials)


# Limits


@pytest.mark.parametrize(
    ("device", "count"),
    [
        (replace(GPU, cores=16, host_memory_bytes=125 * GIB), 11),  # all of quick's
        (replace(GPU, cores=8, host_memory_bytes=125 * GIB), 6),
        (replace(GPU, cores=16, host_memory_bytes=16 * GIB), 4),
        (replace(GPU, cores=2), 1),
        (replace(CPU, cores=64), 1),  # it would import beside a measurement
    ],
)
def test_as_many_probes_import_ahead_as_the_host_has_room_for(device: Device, count: int) -> None:
    assert _spares(device) == count
