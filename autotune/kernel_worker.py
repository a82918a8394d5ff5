"""Launches of kernels timed on the GPU, in a process of its own.

    python -P -m autotune.kernel_worker  < request.json

reads a `KernelRequest` and prints a line `FASTFT_KERNEL {…}`, a `KernelAnswer`, as soon as a bucket is done: where the
process dies, what it had found stays.
"""

import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from autotune.kernel_comparison import Limits, Subject, compare_launches
from fastft.kernels.launches import OPERATIONS, Bucket, Launch
from fastft.plan import KernelTrial
from fastft.processes import die_with_parent, end_at_once

MARKER = "FASTFT_KERNEL "
ROUNDS = 10
"""Replays whose median is a time."""
WARM_SECONDS = 0.5
"""Of full load, until the clocks are where training has them."""
LARGEST_ERROR = {"bf16": 2**-7, "fp16": 2**-10, "fp32": 1e-5}
"""‖x − default‖ / ‖default‖.  Two roundings of a number to 16 bits are apart by so much at most; in fp32 other orders
of sums differ by a tenth of it.  One element in ten thousand that is missing is over it."""
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


class KernelRequest(BaseModel):
    """What to compare."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    buckets: list[str]
    launches: int | None
    """At most so many a bucket beside its default; None for all that are declared."""
    dtype: str
    seconds: float
    """In all.  A bucket may use its share of what is left."""


class KernelAnswer(BaseModel):
    """The trials of one bucket, its default's first."""

    bucket: str
    trials: list[KernelTrial] = Field(min_length=1)


def answers(request: KernelRequest, limits: Limits, subject_of: Callable[[Bucket], Subject]) -> Iterator[KernelAnswer]:
    """Every bucket's answer, until the time is out."""
    end = time.monotonic() + request.seconds
    for index, name in enumerate(request.buckets):
        bucket, now = Bucket.parse(name), time.monotonic()
        if now > end:
            return
        bucket_end = now + (end - now) / (len(request.buckets) - index)
        launches = OPERATIONS[bucket.operation].candidates(bucket, request.launches)
        subject = subject_of(bucket)
        trials = compare_launches(bucket, launches, subject, limits, partial(_is_over, bucket_end))
        yield KernelAnswer(bucket=name, trials=trials)
        subject.recover()


def _is_over(end: float) -> bool:
    return time.monotonic() > end


class CudaSubject:
    """A bucket on the current GPU; its buffers are made when they are needed, so that what they raise is a verdict."""

    def __init__(self, bucket: Bucket, dtype: str) -> None:
        self.bucket, self.dtype = bucket, dtype
        self._calls: list[Any] = []
        self._expected: Sequence[Any] | None = None

    def check(self, launch: Launch) -> str:
        """The largest relative error of any result against those of the first launch that is checked, if too large."""
        results = self._results(launch)
        if self._expected is None:
            self._expected = results
        return difference(results, self._expected, LARGEST_ERROR[self.dtype])

    def microseconds(self, launch: Launch) -> float:
        """The median over replays, over their calls."""
        from fastft.measure.replays import CALLS, capture, replay_ms, rotations

        if not self._calls:
            self._calls.append(self._call(0))
            self._calls += [self._call(seed) for seed in range(1, rotations(self._calls[0].bytes_moved))]
        graph = capture([partial(call.run, {self.bucket: launch}) for call in self._calls])
        return 1e3 * replay_ms(graph, ROUNDS) / CALLS

    def recover(self) -> None:
        """Give all memory back; raises if the context is lost."""
        import torch

        self._calls.clear()
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def _call(self, seed: int) -> Any:
        import torch

        from autotune.kernel_calls import kernel_call

        return kernel_call(self.bucket, getattr(torch, DTYPES[self.dtype]), seed=seed)

    def _results(self, launch: Launch) -> Sequence[Any]:
        call = self._call(0)
        return call.results(call.run({self.bucket: launch}))


def difference(results: Sequence[Any], expected: Sequence[Any], allowed: float) -> str:
    """In words, the largest relative error over `allowed`; "" if none is."""
    for index, (result, other) in enumerate(zip(results, expected, strict=True)):
        if result is None or other is None:
            continue
        error = float((result.float() - other.float()).norm() / other.float().norm())
        if not error <= allowed:
            return f"result {index} is off by {error:.1e} of its norm, allowed {allowed:.0e}"
    return ""


def warm_up() -> None:
    """Keep the GPU busy for a moment."""
    import torch

    x = torch.randn(4096, 4096, device="cuda")
    end = time.monotonic() + WARM_SECONDS
    while time.monotonic() < end:
        for _ in range(8):
            torch.mm(x, x)
        torch.cuda.synchronize()


def device_limits() -> Limits:
    """Those that Triton's launcher goes by."""
    import torch
    import triton

    properties = triton.runtime.driver.active.utils.get_device_properties(torch.cuda.current_device())
    return Limits(properties["max_shared_mem"], 1024)


def main() -> None:
    """Read the request from stdin, print an answer a bucket."""
    die_with_parent()
    request = KernelRequest.model_validate_json(sys.stdin.read())
    warm_up()
    for answer in answers(request, device_limits(), partial(CudaSubject, dtype=request.dtype)):
        print("\n" + MARKER + answer.model_dump_json(), flush=True)


if __name__ == "__main__":
    main()
    end_at_once(0)
