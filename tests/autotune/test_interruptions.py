"""Tuning that is killed or interrupted anywhere, and started again until it ends.

The tuner runs in forked processes; what it measures is a deterministic fake that takes milliseconds.
"""

import multiprocessing
import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import filelock
import pytest

from autotune.phases import Progress
from autotune.pool import TrialPool
from autotune.probe import ProbeRequest, judge
from autotune.search import tune
from fastft.config import RunConfig
from fastft.files import write_atomically
from fastft.hardware import Device
from fastft.models.shapes import SHAPES
from fastft.plan import Choices, Plan, Policy, Trial
from fastft.plan_store import PlanStore
from fastft.record import Memory

FORK = multiprocessing.get_context("fork")
GIB = 2**30
RUNS: dict[str, dict[str, Any]] = {
    # Under this cap all phases have something to measure.
    "long": {
        "config": RunConfig(model="llama-3.2-1b", sequence_tokens=1024, memory_cap="5GiB"),
        "shape": replace(SHAPES["llama-3.2-1b"], family="qwen3"),
        "device": Device("cuda", "H", "9.0", 132, 140 * GIB, 8),
    },
    "short": {
        "config": RunConfig(model="toy-llama", sequence_tokens=64, batch_size=2),
        "shape": SHAPES["toy-llama"],
        "device": Device("cpu", "C", None, None, 2**35, 2),
    },
}
PROBE_SECONDS = 0.004
PRICE_MS: dict[Policy, float] = {"keep": 0.0, "light": 0.2, "mlp": 2.0, "full": 3.0, "offload_mlp": 3.5, "offload": 4.5}
SAVED_MIB: dict[Policy, int] = {"keep": 90, "light": 60, "mlp": 25, "full": 5, "offload_mlp": 1, "offload": 0}
INTERRUPTED = 130
Signal = signal.Signals


def answer(request: ProbeRequest) -> Trial:
    """What the fake device measures: small micro-batches, recomputation and stock PEFT are slower."""
    choices = request.choices
    stock = choices.backend == "peft"
    milliseconds = 200.0 + 20.0 * choices.accumulation + sum(PRICE_MS[policy] for policy in choices.placement)
    milliseconds *= 1.5 if stock else 1.0
    saved = sum(SAVED_MIB[policy] for policy in choices.placement) * 2**20 * choices.micro_batch
    memory = Memory(kind="cuda_allocated", model_bytes=3 * GIB, peak_bytes=3 * GIB + saved * (3 if stock else 1))
    verdict, detail = judge(memory, request.config.memory_cap_bytes)
    return Trial(
        choices=choices, verdict=verdict, step_time_ms=[milliseconds] * 3, peak_bytes=memory.peak_bytes,
        model_bytes=memory.model_bytes, tokens_per_second=16 * 1024 * 1000 / milliseconds, detail=detail,
    )  # fmt: skip


def timeless(plan: Plan) -> Plan:
    """`plan` without what differs between two tunings that measured the same."""
    return plan.model_copy(update={"evidence": plan.evidence.model_copy(update={"created_at": "", "seconds": 0.0})})


class Tuning:
    """One tuning in `folder`, in as many processes as it takes."""

    def __init__(self, folder: Path, run: str) -> None:
        self.run = run
        self.store = PlanStore(folder / "cache")
        self.seconds = 0.0
        """How long it took, where that was measured."""
        self._log = folder / "probes"
        folder.mkdir(parents=True)
        self._log.touch()

    def start(self, prepare: Callable[[], None] = lambda: None) -> Any:
        """A process that tunes, and has begun to; `prepare` runs in it before."""
        begun = FORK.Event()
        process = FORK.Process(target=self._tune, args=(prepare, begun))
        process.start()
        assert begun.wait(60)
        return process

    def probes(self) -> list[str]:
        """What was measured, or at least begun to be, by all processes."""
        return self._log.read_text().splitlines()

    def plan(self) -> Plan:
        """The only one in the store."""
        (plan,) = self.store.entries()
        return plan

    def leftovers(self) -> list[Path]:
        """Files of writes that did not end."""
        return list(self.store.cache.rglob(".*"))

    def _tune(self, prepare: Callable[[], None], begun: Any) -> None:
        """Ends with 0, with INTERRUPTED after an interrupt that left no lock held, else with 1."""
        code = 0
        try:
            begun.set()
            prepare()
            tune(**RUNS[self.run], run_probe=self._probe, store=self.store, on_progress=self._progress)
        except KeyboardInterrupt:
            code = INTERRUPTED
        except BaseException:
            traceback.print_exc()
            code = 1
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            for path in self.store.cache.rglob("*.lock"):
                with filelock.FileLock(path, timeout=0):
                    pass
        except filelock.Timeout:
            code = 1
        os._exit(code)

    def _probe(self, request: ProbeRequest) -> Trial:
        with self._log.open("a") as stream:
            stream.write(request.choices.model_dump_json() + "\n")
        time.sleep(PROBE_SECONDS)
        return answer(request)

    def _progress(self, progress: Progress) -> None:
        assert progress.phase != "waiting", "a lock outlived its process"


def undisturbed(folder: Path, run: str) -> Tuning:
    tuning = Tuning(folder, run)
    started = time.monotonic()
    process = tuning.start()
    process.join(60)
    tuning.seconds = time.monotonic() - started
    assert process.exitcode == 0
    return tuning


def ends_like(tuning: Tuning, whole: Tuning, deaths: int) -> None:
    """Lets `tuning` end, and compares it with one that was not disturbed."""
    process = tuning.start()
    process.join(60)
    assert process.exitcode == 0
    assert timeless(tuning.plan()) == timeless(whole.plan())
    assert set(tuning.probes()) == set(whole.probes())
    assert len(whole.probes()) <= len(tuning.probes()) <= len(whole.probes()) + deaths, "measured again"
    assert not tuning.store.quarantine.exists()
    assert all(problem is None for _, problem in tuning.store.verify())


@pytest.mark.parametrize(
    ("sent", "times"), [pytest.param(Signal.SIGKILL, 50, marks=pytest.mark.slow), (Signal.SIGINT, 20)]
)
def test_signals_at_random_places_lose_nothing(sent: Signal, times: int, tmp_path: Path) -> None:
    rng = random.Random(int(sent))
    whole = undisturbed(tmp_path / "whole", "long")
    assert any(len(set(trial.choices.placement)) > 1 for trial in whole.plan().evidence.trials), "mixed ones too"
    deaths = 0
    for number in count():
        tuning, deaths_here = Tuning(tmp_path / str(number), "long"), 0
        while True:
            process = tuning.start()
            # Longer each time, so that it also ends on a machine that is slower now.
            time.sleep(rng.uniform(0.0, whole.seconds * (1 + deaths_here / 10)))
            os.kill(process.pid, sent)
            process.join(60)
            if process.exitcode == 0:
                break  # it was done before
            assert process.exitcode == (-sent if sent is Signal.SIGKILL else INTERRUPTED)
            deaths_here += 1
        ends_like(tuning, whole, deaths_here)
        deaths += deaths_here
        if deaths >= times:
            return


def die_at(place: int, sent: Signal) -> None:
    """Send `sent` to this process at the `place`-th of the places before and after each change of a file."""
    places = count()

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        def around(*args: Any, **options: Any) -> Any:
            if next(places) == place:
                signal.raise_signal(sent)
            result = call(*args, **options)
            if next(places) == place:
                signal.raise_signal(sent)
            return result

        return around

    os.fsync, os.fdopen = watched(os.fsync), watched(os.fdopen)
    for name in ("replace", "unlink", "mkdir"):
        setattr(Path, name, watched(getattr(Path, name)))


@pytest.mark.parametrize("sent", [Signal.SIGKILL, Signal.SIGINT])
def test_a_signal_before_and_after_every_change_of_a_file_loses_nothing(sent: Signal, tmp_path: Path) -> None:
    whole = undisturbed(tmp_path / "whole", "short")
    for place in count():
        tuning = Tuning(tmp_path / str(place), "short")
        process = tuning.start(partial(die_at, place, sent))
        process.join(60)
        if process.exitcode == 0:
            break  # there are no more places
        assert process.exitcode == (-sent if sent is Signal.SIGKILL else INTERRUPTED)
        if sent is Signal.SIGINT:
            assert tuning.leftovers() == []
        ends_like(tuning, whole, 1)
        tuning.store.prune()
        assert tuning.leftovers() == [], "pruning removes what a killed process left"
    assert place > 4 * len(whole.probes()), "each line of the pool has four places, and there is more"


def test_an_interrupted_write_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(handle: int) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "x"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, "new")
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("x", "old")]


@pytest.mark.parametrize("letter", ["\x85", "\u2028", "\u2029"])
def test_a_line_of_the_pool_may_hold_letters_that_end_lines_elsewhere(letter: str, tmp_path: Path) -> None:
    """JSON does not escape them, and `str.splitlines` splits at them."""
    choices = Choices(backend="eager", micro_batch=1, accumulation=1, placement=["light"])
    request = ProbeRequest(config=RunConfig(model=f"a{letter}b"), choices=choices)
    trial = Trial(choices=choices, verdict="out_of_memory", detail=f"no{letter}memory")
    TrialPool(tmp_path / "x", "a").add(request, trial, 1.0)
    assert TrialPool(tmp_path / "x", "a").take(request) == trial
