import time
from typing import Any

import pytest
import torch
from torch import Tensor

from fastft.data.sources import batch_sha256
from fastft.measure.steps import Samples, measure_steps, real_tokens
from fastft.training.session import StepResult


class FakeSession:
    """Steps of a known duration."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds = device, seconds
        self.seen: list[Any] = []

    def step(self, batch: dict[str, Tensor]) -> StepResult:
        self.seen.append(batch)
        time.sleep(self.seconds)
        return StepResult(loss=float(len(self.seen)), gradient_norm=10.0 * len(self.seen))


def batches(count: int, pause: float = 0.0) -> Any:
    for index in range(count):
        time.sleep(pause)
        yield {"input_ids": torch.full((2, 5), index), "labels": torch.full((2, 5), index)}


def test_one_value_a_step(device):
    session = FakeSession(device, 0.0)
    samples = measure_steps(session, batches(3))
    assert samples.loss == [1, 2, 3]
    assert samples.gradient_norm == [10, 20, 30]
    assert samples.step_tokens == [10, 10, 10]
    assert samples.batch_sha256 == [batch_sha256(batch) for batch in session.seen]
    assert len(set(samples.batch_sha256)) == 3
    assert samples.memory is not None
    assert samples.memory.model_bytes > 0


def test_the_time_is_that_of_the_step_alone(device):
    samples = measure_steps(FakeSession(device, 0.02), batches(2, pause=0.1))
    assert all(20 <= milliseconds < 90 for milliseconds in samples.step_time_ms), samples.step_time_ms


def test_the_caller_sees_each_step_when_it_is_over(device):
    seen = []

    def on_step(index: int, samples: Samples) -> None:
        seen.append((index, len(samples.loss), len(samples.step_time_ms)))

    measure_steps(FakeSession(device, 0.0), batches(3), on_step)
    assert seen == [(0, 1, 1), (1, 2, 2), (2, 3, 3)]


def test_an_error_of_a_step_goes_through(device):
    class Failing(FakeSession):
        def step(self, batch: dict[str, Tensor]) -> StepResult:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        measure_steps(Failing(device, 0.0), batches(1))


def test_no_batches(device):
    samples = measure_steps(FakeSession(device, 0.0), [])
    assert samples.loss == samples.step_time_ms == []
    assert samples.memory is not None


def test_padding_is_no_token():
    ids = torch.zeros(2, 4, dtype=torch.int64)
    assert real_tokens({"input_ids": ids}) == 8
    assert real_tokens({"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])}) == 6


@pytest.mark.gpu
def test_the_time_includes_what_the_gpu_still_does(device):
    class Asynchronous(FakeSession):
        def step(self, batch: dict[str, Tensor]) -> StepResult:
            torch.cuda._sleep(100_000_000)
            return StepResult(0.0, 0.0)

    samples = measure_steps(Asynchronous(device, 0.0), batches(2))
    assert min(samples.step_time_ms) > 20
