"""One probe: a few training steps of one candidate, in a process of its own.

    python -P -m autotune.probe  < request.json

reads a `ProbeRequest`, trains, and prints one line, `FASTFT_TRIAL {…}`, with a `fastft.plan.Trial`.  Whatever goes
wrong inside becomes a verdict; what kills the process is the runner's to judge.
"""

import contextlib
import gc
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fastft.config import RunConfig
from fastft.plan import Choices, Trial
from fastft.processes import die_with_parent, end_at_once, preload
from fastft.record import Memory

if TYPE_CHECKING:
    from fastft.measure.steps import Samples

MARKER = "FASTFT_TRIAL "
MAX_TIMED_STEPS = 64

Verdict = Literal["ok", "out_of_memory", "allocator_retry", "over_cap", "failed"]
"""What a probe itself may say; the others are its runner's and the search's."""

_OUT_OF_MEMORY_TEXTS = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")


class ProbeRequest(BaseModel):
    """What to measure."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: RunConfig
    choices: Choices
    warmup_steps: int = Field(default=2, ge=0)
    timed_steps: int = Field(default=4, ge=3, le=MAX_TIMED_STEPS)
    """Full optimizer steps after the warm-up; at least so many."""
    timed_seconds: float = Field(default=1.0, ge=0)
    """More of them until they took this long, so that short steps do not make a noisy median."""
    seed: int = 0


def probe(request: ProbeRequest) -> Trial:
    """Measure `request` in this process.  Every exception but an interrupt becomes a verdict."""
    try:
        return _measure(request)
    except Exception as error:
        verdict: Verdict = "out_of_memory" if is_out_of_memory(error) else "failed"
        frames = traceback.extract_tb(error.__traceback__)
        place = f" ({frames[-1].name}, line {frames[-1].lineno})" if frames and verdict == "failed" else ""
        detail = f"{type(error).__name__}: {str(error)[:400]}{place}"
        _free(error)
        return Trial(choices=request.choices, verdict=verdict, peak_bytes=_peak_reached(), detail=detail)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception, or what caused it, says that memory ran out; drivers say so in several ways."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if isinstance(current, MemoryError) or type(current).__name__ == "OutOfMemoryError":
            return True
        if isinstance(current, RuntimeError) and any(text in str(current) for text in _OUT_OF_MEMORY_TEXTS):
            return True
        current = current.__cause__ or current.__context__
    return False


def judge(memory: Memory, cap_bytes: int | None) -> tuple[Verdict, str]:
    """(verdict, detail) for a run that came to its end.

    Args:
        memory: what was measured.
        cap_bytes: what its peak must stay under.
    """
    if memory.allocator_retries:
        # It ran, but only by returning the allocator's cache to the driver in the middle of a step.  This says nothing
        # of any cap, so it comes first: another cap changes no such verdict.
        return "allocator_retry", f"the allocator retried {memory.allocator_retries} times"
    return _against_cap(memory.peak_bytes, cap_bytes)


def judge_again(trial: Trial, cap_bytes: int | None) -> Trial:
    """`trial` with the verdict that it would have had under `cap_bytes`."""
    if trial.verdict not in ("ok", "over_cap") or trial.peak_bytes is None:
        return trial
    verdict, detail = _against_cap(trial.peak_bytes, cap_bytes)
    return trial.model_copy(update={"verdict": verdict, "detail": detail})


def _against_cap(peak_bytes: int, cap_bytes: int | None) -> tuple[Verdict, str]:
    if cap_bytes is not None and peak_bytes > cap_bytes:
        return "over_cap", f"peak {peak_bytes} bytes, cap {cap_bytes}"
    return "ok", ""


def trial_of(choices: Choices, samples: "Samples", memory: Memory, warmup_steps: int, cap_bytes: int | None) -> Trial:
    """What a run of `choices` that came to its end says; its first `warmup_steps` do not count."""
    times, tokens = samples.step_time_ms[warmup_steps:], samples.step_tokens[warmup_steps:]
    verdict, detail = judge(memory, cap_bytes)
    return Trial(
        choices=choices,
        verdict=verdict,
        step_time_ms=times,
        tokens_per_second=1000.0 * statistics.median(tokens) / statistics.median(times),
        peak_bytes=memory.peak_bytes,
        model_bytes=memory.model_bytes,
        detail=detail,
    )


def _measure(request: ProbeRequest) -> Trial:
    from autotune.alternatives import other_attention
    from fastft.data.sources import random_batch
    from fastft.measure.steps import measure_steps
    from fastft.planning import model_shape
    from fastft.training.session import build_session

    config = request.config
    shape = model_shape(config)
    session = build_session(config, request.choices, seed=request.seed)

    # Full-length rows: the longest that the run can meet, so a peak measured here is the highest there.
    def batches() -> Iterator[dict[str, Any]]:
        timed_from = 0.0
        for step in range(request.warmup_steps + MAX_TIMED_STEPS):
            timed = step - request.warmup_steps
            if timed == 0:
                timed_from = time.perf_counter()
            if timed >= request.timed_steps and time.perf_counter() - timed_from >= request.timed_seconds:
                return
            yield random_batch(shape.vocabulary, config.batch_size, config.sequence_tokens, seed=request.seed + step)

    samples = measure_steps(session, batches())
    # Warm-up does not count: with fp16 the loss scale is found there, by steps that overflow.
    if any(not norm > 0 for norm in samples.gradient_norm[request.warmup_steps :]):
        return Trial(choices=request.choices, verdict="failed", detail="a step had no gradient: it did not train")
    memory = samples.memory
    if memory is None:
        return Trial(choices=request.choices, verdict="failed", detail="the peak of memory was not measured")
    trial = trial_of(request.choices, samples, memory, request.warmup_steps, config.memory_cap_bytes)
    return trial.model_copy(update={"other_attention": other_attention(config, request.choices, shape)})


def _free(error: BaseException) -> None:
    """Let go of what an exception's frames hold: the traceback keeps every tensor of the failed step alive, and
    without memory not even the verdict can be written."""
    current: BaseException | None = error
    while current is not None:
        traceback.clear_frames(current.__traceback__)
        current = current.__cause__ or current.__context__
    gc.collect()


def _peak_reached() -> int | None:
    """How far a failed step came on a GPU; a lower bound of what it needs."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    with contextlib.suppress(RuntimeError):
        peak = int(torch.cuda.max_memory_allocated())
        torch.cuda.empty_cache()
        return peak
    return None


def main() -> None:
    """Import, read the request from stdin, print the verdict line."""
    die_with_parent()
    preload()
    request = ProbeRequest.model_validate_json(sys.stdin.read())
    # Libraries print to stdout; the verdict line is found by its marker, the last one counts.
    print("\n" + MARKER + probe(request).model_dump_json(), flush=True)


if __name__ == "__main__":
    main()
    end_at_once(0)
