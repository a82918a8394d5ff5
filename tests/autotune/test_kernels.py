"""The kernel search: which buckets, from the store or a worker, and what becomes of a worker that dies."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from autotune import kernel_worker, kernels
from autotune.kernel_comparison import Limits
from autotune.kernel_store import KernelStore
from autotune.kernel_worker import MARKER, CudaSubject, KernelAnswer, KernelRequest, answers
from autotune.kernels import DEATHS, search_kernels, step_buckets, winners
from autotune.phases import Progress
from autotune.runner import Ended, run_worker
from autotune.search import tune
from autotune.space import EFFORTS, default_candidate
from devices import CPU, GPU
from fastft.config import LoraConfig, RunConfig
from fastft.files import canonical_json, sha256_of
from fastft.hardware import detect_device, resolve_dtype
from fastft.kernels.launches import MAX_RANK, OPERATIONS, Bucket, Launch
from fastft.models.shapes import SHAPES
from fastft.plan import Choices, KernelTrial, Trial
from fastft.plan_store import PlanStore
from fastft.planning import plan_key

CONFIG = RunConfig(model="llama-3.2-1b", sequence_tokens=1024)
SHAPE = SHAPES["llama-3.2-1b"]
KEY = plan_key(CONFIG, SHAPE, GPU)
BUCKETS = step_buckets(SHAPE, CONFIG, GPU, 8, 2048)


class FakeWorker:
    """Its second launch of every bucket is twice as fast; it dies at the buckets of `deadly`."""

    def __init__(self, deadly: tuple[Bucket, ...] = ()) -> None:
        self.deadly = {bucket.name for bucket in deadly}
        self.requests: list[KernelRequest] = []

    def __call__(self, request: KernelRequest) -> Ended:
        self.requests.append(request)
        lines = []
        for name in request.buckets:
            if name in self.deadly:
                return Ended(lines, -11, False, "the kernel worker was ended by SIGSEGV", "last words")
            bucket = Bucket.parse(name)
            launches = OPERATIONS[bucket.operation].candidates(bucket, request.launches)
            trials = [
                KernelTrial(bucket=name, launch=list(launch), verdict="ok", microseconds=[5.0 if i == 1 else 10.0])
                for i, launch in enumerate(launches)
            ]
            lines.append(KernelAnswer(bucket=name, trials=trials).model_dump_json())
        return Ended(lines, 0, False, "", "")


@pytest.fixture
def store(tmp_path: Path) -> KernelStore:
    return KernelStore(tmp_path, KEY)


def search(store: KernelStore, run: Callable[[KernelRequest], Ended], buckets: list[Bucket] = BUCKETS, **more: Any):
    return search_kernels(buckets, store, **{"dtype": "bf16", "launches": 3, "seconds": 60.0, "run": run, **more})


def seconds_of(buckets: list[Bucket]) -> dict[str, list[int]]:
    """The second launch of each bucket."""
    return {b.name: list(OPERATIONS[b.operation].candidates(b)[1]) for b in buckets}


def test_the_buckets_of_a_llama() -> None:
    assert [bucket.name for bucket in BUCKETS] == [
        "rotate/32x8x64x0/16bit/8192", "rotate/32x8x64x16/16bit/8192", "narrow_gradients/2048x512x512x16/16bit/8192",
        "narrow_gradients/2048x0x0x16/16bit/8192", "activate/2x8192x16/16bit/8192",
        "activate_backward/2x8192x16/16bit/8192", "add/2048x16/16bit/8192", "cross_entropy/128256/16bit/2048",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("toy-llama", ("q_proj", "k_proj", "v_proj")), ("toy-llama", ("q_proj", "down_proj")), ("toy-llama", None),
        ("toy-qwen3", None), ("toy-gemma2", None), ("toy-phi3", None), ("toy-falcon", None),
    ],
)  # fmt: skip
def test_the_buckets_are_those_of_a_step(
    name: str, targets: tuple[str, ...] | None, monkeypatch, device: torch.device
) -> None:
    """Every bucket that a step asks for is searched, and no other."""
    from fastft.data.sources import random_batch
    from fastft.kernels import launches
    from fastft.training.session import build_session

    shape = SHAPES[name]
    config = RunConfig(
        model=name, sequence_tokens=16, batch_size=2, lora=LoraConfig(rank=4, targets=targets), dtype="fp32",
        device=device.type, backend="triton",
    )  # fmt: skip
    asked: dict[Bucket, Launch] = {}
    choose = launches.launch_for

    def spy(
        operation: str, sizes: tuple[int, ...], element_bytes: int, tokens: int, chosen: launches.Launches
    ) -> Launch:
        bucket = launches.bucket_of(operation, sizes, 8 * element_bytes, tokens)
        asked[bucket] = choose(operation, sizes, element_bytes, tokens, chosen)
        return asked[bucket]

    for module in ("adapted", "lora_linear", "cross_entropy"):
        monkeypatch.setattr(f"fastft.kernels.{module}.triton.launch_for", spy)
    buckets = step_buckets(shape, config, detect_device(device.type), 2, 2048)
    choices = Choices(
        backend="triton", micro_batch=2, accumulation=1, placement=["light"] * shape.layers, kernels=seconds_of(buckets)
    )
    session = build_session(config, choices)
    session.step(random_batch(shape.vocabulary, 2, 16, seed=0))
    assert {bucket: list(launch) for bucket, launch in asked.items()} == {
        bucket: choices.kernels[bucket.name] for bucket in buckets
    }, "the session launches as chosen"


def test_a_rank_that_no_kernel_takes_leaves_the_rest() -> None:
    config = CONFIG.model_copy(update={"lora": LoraConfig(rank=2 * MAX_RANK)})
    buckets = step_buckets(SHAPE, config, GPU, 4, 2048)
    assert [bucket.operation for bucket in buckets] == ["rotate", "cross_entropy"]


def test_the_fastest_are_chosen_and_kept(store: KernelStore) -> None:
    worker = FakeWorker()
    trials = search(store, worker)
    assert winners(trials) == seconds_of(BUCKETS)
    [request] = worker.requests
    assert (request.buckets, request.launches, request.dtype) == ([b.name for b in BUCKETS], 3, "bf16")
    assert 59 < request.seconds <= 60
    assert list(dict.fromkeys(trial.bucket for trial in trials)) == [bucket.name for bucket in BUCKETS]
    again = FakeWorker()
    assert search(store, again) == trials
    assert again.requests == []


def test_another_model_with_the_same_shapes_measures_only_what_is_new(tmp_path: Path, store: KernelStore) -> None:
    search(store, FakeWorker())
    shape, config = SHAPES["smollm2-1.7b"], CONFIG.model_copy(update={"model": "smollm2-1.7b"})
    theirs, worker = step_buckets(shape, config, GPU, 8, 2048), FakeWorker()
    trials = search(KernelStore(tmp_path, plan_key(config, shape, GPU)), worker, theirs)
    [request] = worker.requests
    new = [bucket for bucket in theirs if bucket not in BUCKETS]
    assert 0 < len(new) < len(theirs)
    assert request.buckets == [bucket.name for bucket in new]
    assert winners(trials) == seconds_of(theirs)


@pytest.mark.parametrize("field", ["device", "versions", "kernels_sha256", "dtype"])
def test_another_machine_measures_itself(field: str, tmp_path: Path, store: KernelStore) -> None:
    search(store, FakeWorker())
    other = KEY.model_copy(update={field: {"torch": "0"} if field == "versions" else "other"})
    assert KernelStore(tmp_path, other).load() == {}
    assert KernelStore(tmp_path, KEY.model_copy(update={"lora_rank": 99})).load() == store.load() != {}


def test_a_short_list_does_not_stand_for_a_long_one(store: KernelStore) -> None:
    search(store, FakeWorker(), launches=1)
    worker = FakeWorker()
    trials = search(store, worker, launches=None)
    assert worker.requests[0].buckets == [bucket.name for bucket in BUCKETS]
    assert len(trials) == sum(len(OPERATIONS[bucket.operation].launches) for bucket in BUCKETS)
    assert search(store, worker, launches=2) == trials, "a long one does for a short one"
    assert len(worker.requests) == 1


def test_a_worker_that_dies_costs_one_bucket(store: KernelStore, caplog: pytest.LogCaptureFixture) -> None:
    deadly = BUCKETS[2]
    worker = FakeWorker((deadly,))
    trials = search(store, worker)
    assert [len(request.buckets) for request in worker.requests] == [len(BUCKETS), len(BUCKETS) - 3]
    [trial] = [trial for trial in trials if trial.bucket == deadly.name]
    assert (trial.verdict, trial.launch) == ("failed", list(OPERATIONS["narrow_gradients"].default(deadly)))
    assert "SIGSEGV" in trial.detail
    assert "last words" in trial.detail
    assert winners(trials) == seconds_of([bucket for bucket in BUCKETS if bucket != deadly])
    assert deadly.name in caplog.text
    assert deadly.name not in store.load(), "the next tuning tries it again"


def test_a_device_on_which_every_worker_dies_is_left_alone(store: KernelStore) -> None:
    worker = FakeWorker(tuple(BUCKETS))
    trials = search(store, worker)
    assert len(worker.requests) == len(trials) == DEATHS
    assert winners(trials) == {}
    assert not store.path.exists()


def test_answers_that_make_no_sense_are_none(store: KernelStore) -> None:
    trial = KernelTrial(bucket="add/1x16/16bit/256", launch=[1], verdict="failed")
    foreign = KernelAnswer(bucket=trial.bucket, trials=[trial]).model_dump_json()
    empty = canonical_json({"bucket": BUCKETS[0].name, "trials": []})
    assert search(store, lambda request: Ended(["{", "[]", foreign, empty], 0, False, "", "")) == []
    assert not store.path.exists()


def test_a_default_that_failed_is_tried_again(store: KernelStore) -> None:
    [bucket] = BUCKETS[:1]
    default = KernelTrial(bucket=bucket.name, launch=list(OPERATIONS["rotate"].launches[0]), verdict="failed")
    answer = KernelAnswer(bucket=bucket.name, trials=[default]).model_dump_json()
    assert search(store, lambda request: Ended([answer], 0, False, "", ""), [bucket]) == [default]
    assert store.load() == {bucket.name: [default]}
    assert winners([default]) == {}
    assert winners(search(store, FakeWorker(), [bucket])) == seconds_of([bucket])


def test_without_time_nothing_is_asked(store: KernelStore) -> None:
    worker = FakeWorker()
    assert search(store, worker, seconds=0.0) == search(store, worker, seconds=-5.0) == []
    assert worker.requests == []


def _sealed(body: dict[str, Any]) -> str:
    body = {name: value for name, value in body.items() if name != "checksum"}
    return canonical_json({**body, "checksum": sha256_of(body)})


BAD: dict[str, Callable[[dict[str, Any]], str]] = {
    "empty": lambda body: "",
    "cut off": lambda body: canonical_json(body)[:-40],
    "changed": lambda body: canonical_json(body).replace("10.0", "1.0", 1),
    "a list": lambda body: "[]",
    "deep": lambda body: "[" * 10000,
    "large": lambda body: " " * (2**24 + 1),
    "schema": lambda body: _sealed(body | {"schema_version": 2}),
    "machine": lambda body: _sealed(body | {"machine": {}}),
    "launch": lambda body: _sealed(json.loads(canonical_json(body).replace("[64,128,4,4096,3]", "[9,9,9,9,9]"))),
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_a_bad_file_is_moved_away_and_measured_again(
    change, store: KernelStore, caplog: pytest.LogCaptureFixture
) -> None:
    expected = search(store, FakeWorker())
    bad = change(json.loads(store.path.read_text()))
    store.path.write_text(bad)
    worker = FakeWorker()
    assert search(store, worker) == expected
    assert len(worker.requests) == 1
    [moved] = (store.folder / "quarantine").iterdir()
    assert moved.read_text() == bad
    assert len(caplog.records) == 1
    assert search(store, worker) == expected
    assert len(worker.requests) == 1


def test_a_file_has_one_text(store: KernelStore) -> None:
    search(store, FakeWorker())
    text = store.path.read_text()
    assert text == _sealed(json.loads(text)) + "\n"
    assert [path.name for path in store.folder.glob("*.tmp")] == []


def test_the_worker_shares_its_time_among_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    class Slow:
        """Every launch takes a second to compile."""

        def check(self, launch: Launch) -> str:
            clock[0] += 1.0
            return ""

        def microseconds(self, launch: Launch) -> float:
            return 1.0

        def recover(self) -> None:
            pass

    monkeypatch.setattr(kernel_worker.time, "monotonic", lambda: clock[0])
    request = KernelRequest(buckets=[b.name for b in BUCKETS[:3]], launches=None, dtype="bf16", seconds=9.0)
    got = list(answers(request, Limits(2**20, 1024), lambda bucket: Slow()))
    assert [answer.bucket for answer in got] == request.buckets
    assert [len(answer.trials) for answer in got] == [4, 3, 3], "a launch that was begun in time is finished"
    clock[0] = 0.0
    short = request.model_copy(update={"seconds": 1.5})
    assert [len(answer.trials) for answer in answers(short, Limits(2**20, 1024), lambda bucket: Slow())] == [1, 1]


@pytest.mark.skipif(sys.platform != "linux", reason="dies with its parent on Linux")
def test_the_real_worker_dies_cleanly_without_a_gpu(store: KernelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    started = time.monotonic()
    trials = search(store, kernels.run_in_process)
    assert [trial.verdict for trial in trials] == ["failed"] * DEATHS
    assert all("exit code 1" in trial.detail for trial in trials)
    assert time.monotonic() - started < 60


@pytest.mark.gpu
def test_on_a_gpu_every_bucket_gets_an_answer(store: KernelStore) -> None:
    shape = SHAPES["toy-llama"]
    device = detect_device("cuda")
    buckets = step_buckets(shape, CONFIG.model_copy(update={"model": "toy-llama"}), device, 4, 2048)
    trials = search(store, kernels.run_in_process, buckets, dtype=resolve_dtype("auto", device), seconds=120.0)
    assert {trial.bucket for trial in trials} == {bucket.name for bucket in buckets}
    assert {trial.verdict for trial in trials} <= {"ok", "too_large"}, [t for t in trials if t.detail]
    assert all(min(trial.microseconds) > 0 for trial in trials if trial.verdict == "ok")
    assert search(store, FakeWorker(), buckets) == trials


def test_answers_before_a_death_count() -> None:
    code = f"import os; print({MARKER + 'one'!r}); print('noise'); print({MARKER + 'two'!r}, flush=True); os.abort()"
    ended = run_worker("", [sys.executable, "-S", "-c", code], MARKER, 20.0, what="the worker")
    assert ended.answers == ["one", "two"]
    assert (ended.code, ended.timed_out) == (-6, False)
    assert "SIGABRT" in ended.detail


class FakeProbes:
    """Every candidate runs; tuned launches make a step 10 % faster."""

    def __init__(self) -> None:
        self.choices: list[Choices] = []

    def __call__(self, request: Any) -> Trial:
        self.choices.append(request.choices)
        time_ms = 100.0 + 10.0 * request.choices.accumulation - (10.0 if request.choices.kernels else 0.0)
        return Trial(
            choices=request.choices, verdict="ok", step_time_ms=[time_ms] * 3, tokens_per_second=16384e3 / time_ms,
            peak_bytes=2**30, model_bytes=2**29,
        )  # fmt: skip


def tuned(tmp_path: Path, **more: Any) -> tuple[Any, FakeProbes, FakeWorker, list[Progress]]:
    probes, worker, events = FakeProbes(), FakeWorker(), []
    result = tune(
        CONFIG, store=PlanStore(tmp_path), **{"shape": SHAPE, "device": GPU, "run_probe": probes, "run_kernels": worker,
        "on_progress": events.append, **more},
    )  # fmt: skip
    return result, probes, worker, events


def test_the_tuner_tries_tuned_launches_and_writes_down_the_evidence(tmp_path: Path) -> None:
    result, probes, worker, events = tuned(tmp_path)
    first, *others = probes.choices
    assert first == default_candidate(CONFIG, SHAPE, GPU)
    assert first.kernels == {}
    expected = seconds_of(BUCKETS)
    assert others[0] == first.model_copy(update={"kernels": expected})
    assert all(c.kernels == (expected if c.backend == "triton" else {}) for c in others if c != first)
    assert result.plan.choices.kernels == expected
    assert "tuned launches: 8" in result.plan.choices.summary()
    evidence = result.plan.evidence.kernels
    assert {trial.bucket for trial in evidence} == set(expected)
    assert len(evidence) == len(BUCKETS) * (1 + EFFORTS["quick"].launches)
    assert PlanStore(tmp_path).load(result.plan.key) == result.plan
    assert [event.phase for event in events[:2]] == ["kernels", "kernels"]
    assert events[2].phase == "uniform"
    assert worker.requests[0].seconds <= EFFORTS["quick"].kernel_seconds


def test_more_effort_covers_more_micro_batches(tmp_path: Path) -> None:
    _, _, worker, _ = tuned(tmp_path, effort="full")
    tokens = {Bucket.parse(name).tokens for request in worker.requests for name in request.buckets}
    assert tokens == {1024, 2048, 4096, 8192}
    assert worker.requests[0].launches is None


def test_little_time_is_shared(tmp_path: Path) -> None:
    _, _, worker, _ = tuned(tmp_path, max_minutes=1.0 + kernels.START_SECONDS / 60)
    assert worker.requests[0].seconds <= (60 + kernels.START_SECONDS) / 4


def test_without_time_for_a_worker_that_hangs_what_is_known_of_launches_is_used(tmp_path: Path) -> None:
    result, probes, worker, _ = tuned(tmp_path / "unknown", max_minutes=kernels.START_SECONDS / 60)
    assert worker.requests == []
    assert all(choices.kernels == {} for choices in probes.choices)
    assert result.plan.evidence.out_of_time
    known = tuned(tmp_path)[0].plan.choices.kernels
    _, probes, worker, _ = tuned(tmp_path, max_minutes=kernels.START_SECONDS / 60, force=True)
    assert worker.requests == []
    assert probes.choices[1].kernels == known != {}


def test_on_a_cpu_nothing_changes(tmp_path: Path) -> None:
    result, probes, worker, events = tuned(tmp_path, device=CPU)
    assert worker.requests == []
    assert all(choices.kernels == {} for choices in probes.choices)
    assert result.plan.evidence.kernels == []
    assert "kernels" not in {event.phase for event in events}
    assert not (tmp_path / "kernels").exists()


def test_launches_that_gain_nothing_leave_the_default(tmp_path: Path) -> None:
    class Slower(FakeProbes):
        def __call__(self, request: Any) -> Trial:
            trial = super().__call__(request)
            return trial.model_copy(update={"step_time_ms": [100.0] * 3})

    result, _, _, _ = tuned(tmp_path, run_probe=Slower())
    assert result.plan.choices == default_candidate(CONFIG, SHAPE, GPU)
    assert result.plan.evidence.kernels


@pytest.mark.parametrize(("dtype", "allowed"), [("bf16", 2**-7), ("fp16", 2**-10), ("fp32", 1e-5)])
def test_a_launch_may_differ_from_the_default_by_the_roundings_of_its_dtype(
    dtype: str, allowed: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A unit in the last place of 16 bits; the order of sums in fp32."""
    default, other = OPERATIONS["add"].launches[:2]
    errors = iter([0.0, 0.9 * allowed, 1.1 * allowed])
    monkeypatch.setattr(CudaSubject, "_results", lambda *_: [torch.ones(64) * (1 + next(errors))])
    subject = CudaSubject(BUCKETS[0], dtype)
    assert [subject.check(launch) == "" for launch in (default, other, other)] == [True, True, False]
