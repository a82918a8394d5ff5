import gc
import weakref

import pytest
import torch
from pydantic import ValidationError

from autotune import probe as module
from autotune.probe import ProbeRequest, is_out_of_memory, judge, probe
from autotune.runner import run_probe
from fastft.config import RunConfig
from fastft.plan import Choices, Trial
from fastft.record import Memory

CHOICES = Choices(backend="eager", micro_batch=2, accumulation=2, placement=["full", "mlp", "keep"])
REQUEST = ProbeRequest(
    config=RunConfig(model="toy-llama", sequence_tokens=16, batch_size=4, device="cpu"),
    choices=CHOICES, warmup_steps=1, timed_steps=3, timed_seconds=0.0,
)  # fmt: skip


def memory(peak: int, retries: int = 0) -> Memory:
    return Memory(kind="cuda_allocated", model_bytes=1, peak_bytes=peak, allocator_retries=retries)


def test_judging() -> None:
    assert judge(memory(100), None)[0] == "ok"
    assert judge(memory(100), 100)[0] == "ok"
    assert judge(memory(101), 100)[0] == "over_cap"
    assert judge(memory(100, retries=1), 100)[0] == "allocator_retry"


def _caused_by(cause: BaseException) -> BaseException:
    try:
        raise ValueError("loading failed") from cause
    except ValueError as error:
        return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 1 byte"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (_caused_by(MemoryError()), True),
        (RuntimeError("shapes differ"), False),
        (ValueError("out of memory of the writer"), False),
    ],
)
def test_lack_of_memory_is_recognised(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


class Tensor:
    """Something that a frame holds."""


@pytest.mark.parametrize(("error", "verdict"), [(MemoryError("no"), "out_of_memory"), (ValueError("odd"), "failed")])
def test_an_exception_is_a_verdict_and_frees_what_its_frames_hold(
    error: Exception, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[Tensor]] = []

    def fail(request: ProbeRequest) -> Trial:
        activation = Tensor()
        held.append(weakref.ref(activation))
        raise error

    monkeypatch.setattr(module, "_measure", fail)
    trial = probe(REQUEST)
    assert trial.verdict == verdict
    assert str(error) in trial.detail
    gc.collect()
    assert held[0]() is None, "the test's own reference to the error keeps its traceback, not its frames' locals"


def test_a_request_needs_three_steps_to_be_timed() -> None:
    with pytest.raises(ValidationError):
        ProbeRequest(config=REQUEST.config, choices=CHOICES, timed_steps=2)


def test_an_unknown_model_is_a_failure_that_says_so() -> None:
    trial = probe(REQUEST.model_copy(update={"config": REQUEST.config.model_copy(update={"model": "toy-lama"})}))
    assert trial.verdict == "failed"
    assert "toy-llama" in trial.detail


def test_a_real_probe_in_its_own_process() -> None:
    trial = run_probe(REQUEST, timeout_seconds=120)
    assert trial.verdict == "ok", trial.detail
    assert trial.choices == CHOICES
    assert len(trial.step_time_ms) == 3
    assert trial.tokens_per_second is not None
    assert trial.peak_bytes is not None
    assert trial.model_bytes is not None
    assert trial.tokens_per_second > 0
    assert trial.peak_bytes >= trial.model_bytes > 2**20


def test_a_real_probe_over_its_cap_keeps_what_it_measured() -> None:
    config = REQUEST.config.model_copy(update={"memory_cap": "10MB"})
    trial = probe(REQUEST.model_copy(update={"config": config}))
    assert trial.verdict == "over_cap", trial.detail
    assert len(trial.step_time_ms) == 3
    assert trial.peak_bytes is not None
    assert trial.peak_bytes > 10 * 10**6
