"""The kernel search: which launches the fused kernels of a training step should have on this device.

1. the buckets that the step of a model uses (`step_buckets`)
2. without those that were measured here before, for whatever model (`kernel_store`)
3. a worker process that compares the launches of each (`kernel_worker`); if it dies, the bucket it was at keeps its
   default and another one goes on with the rest
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby

from pydantic import ValidationError

from autotune.kernel_comparison import fastest
from autotune.kernel_store import KernelStore
from autotune.kernel_worker import MARKER, KernelAnswer, KernelRequest
from autotune.runner import Ended, run_worker
from fastft.config import RunConfig
from fastft.hardware import Device, resolve_dtype
from fastft.kernels.launches import MAX_RANK, OPERATIONS, Bucket, bucket_of
from fastft.memory.model import DTYPE_BYTES
from fastft.models.shapes import ModelShape
from fastft.plan import KernelTrial

WORKER_COMMAND = (sys.executable, "-P", "-m", "autotune.kernel_worker")
START_SECONDS = 90.0
"""For importing torch, starting CUDA, and a candidate that was begun in time."""
DEATHS = 2
"""After so many the device is not fit for the search."""
_MIN_BLOCK_R = 16

RunKernels = Callable[[KernelRequest], Ended]

_log = logging.getLogger(__name__)


def run_in_process(request: KernelRequest) -> Ended:
    """A worker's answers to `request`; never raises but for an interrupt."""
    limit = request.seconds + START_SECONDS
    return run_worker(request.model_dump_json(), WORKER_COMMAND, MARKER, limit, what="the kernel worker")


def step_buckets(
    shape: ModelShape, config: RunConfig, device: Device, micro_batch: int, loss_chunk_tokens: int
) -> list[Bucket]:
    """What the Triton backend launches in a step with micro-batches of so many full rows, without repetitions."""
    tokens, bits = micro_batch * config.sequence_tokens, 8 * DTYPE_BYTES[resolve_dtype(config.dtype, device)]
    of = partial(bucket_of, bits=bits, tokens=tokens)
    found = [of(operation, sizes) for operation, sizes in _problems(shape, config)]
    found.append(bucket_of("cross_entropy", (shape.vocabulary,), bits, min(tokens, loss_chunk_tokens)))
    return list(dict.fromkeys(found))


def _problems(shape: ModelShape, config: RunConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Operations and sizes of one decoder layer; the conditions are those of `fastft.engine.layer`."""
    spec, rank = shape.spec, config.lora.rank
    block_r = max(_MIN_BLOCK_R, 1 << (rank - 1).bit_length())
    targets = {target.rpartition(".")[2] for target in config.lora.targets or spec.targets}
    adapted = targets & set(shape.linear_sizes) if rank <= MAX_RANK else set()
    widths = {name: out for name, (_, out) in shape.linear_sizes.items()}
    down, o = spec.targets[-1], spec.targets[len(spec.qkv)]
    heads, d = (shape.heads, shape.kv_heads), shape.head_dim
    if shape.rotary_fraction == 1 and d & (d - 1) == 0:
        # Forward with the adapters' terms where nothing comes before the rotation; backward without.
        yield "rotate", (*heads, d, 0)
        if len(spec.qkv) == 3 and spec.head_norms is None and set(shape.qkv_names[:2]) <= adapted:
            yield "rotate", (*heads, d, block_r)
    for group in (shape.qkv_names, (o,), (down,)):
        of_group = [widths[name] for name in group if name in adapted]
        if of_group:
            yield "narrow_gradients", (*of_group, *[0] * (3 - len(of_group)), block_r)
    if adapted & {*shape.gate_up_names, down}:
        sizes = 1 + spec.gated, shape.intermediate, block_r
        yield "activate", sizes
        yield "activate_backward", sizes
    if down in adapted and spec.post_mlp_norm is None:
        yield "add", (shape.hidden, block_r)


def search_kernels(
    buckets: Sequence[Bucket],
    store: KernelStore,
    *,
    dtype: str,
    launches: int | None,
    seconds: float,
    run: RunKernels = run_in_process,
) -> list[KernelTrial]:
    """The trials of all buckets, in their order; of a bucket that the time did not reach there are none.

    Args:
        store: what was measured before, and where new measurements go.
        dtype: of the wide tensors: bf16, fp16 or fp32.
        launches: at most so many a bucket beside its default; None for all.
        seconds: for measuring, the worker's start not counted.
        run: asks a worker.
    """
    known = store.load()
    found = {bucket: known[bucket.name] for bucket in buckets if _covers(known.get(bucket.name, []), bucket, launches)}
    end, deaths = time.monotonic() + seconds, 0
    while deaths < DEATHS and time.monotonic() < end:
        missing = [bucket for bucket in buckets if bucket not in found]
        if not missing:
            break
        names, left = [bucket.name for bucket in missing], end - time.monotonic()
        ended = run(KernelRequest(buckets=names, launches=launches, dtype=dtype, seconds=left))
        answered = {answer.bucket: answer.trials for answer in _answers(ended) if answer.bucket in names}
        if answered:
            store.add(answered)
        found |= {bucket: answered[bucket.name] for bucket in missing if bucket.name in answered}
        if ended.code == 0:
            break
        deaths += 1
        died_at = next((bucket for bucket in missing if bucket.name not in answered), None)
        if died_at is not None:
            _log.warning("launches of %s are not tuned: %s", died_at.name, ended.detail)
            default = OPERATIONS[died_at.operation].default(died_at)
            failed = KernelTrial(bucket=died_at.name, launch=list(default), verdict="failed", detail=ended.detail[:400])
            found[died_at] = [failed]  # not stored: the next tuning tries it again
    return [trial for bucket in buckets for trial in found.get(bucket, [])]


def winners(trials: Sequence[KernelTrial]) -> dict[str, list[int]]:
    """`Choices.kernels`: the fastest launch of each bucket where that is not the default."""
    chosen = {}
    for bucket, group in groupby(trials, key=lambda trial: trial.bucket):
        of_bucket = list(group)
        winner = fastest(of_bucket)
        if winner is not None and winner is not of_bucket[0]:
            chosen[bucket] = winner.launch
    return chosen


def _covers(trials: Sequence[KernelTrial], bucket: Bucket, launches: int | None) -> bool:
    """Whether everything that is wanted was tried; a default that failed, maybe by the machine's fault, was not."""
    tried = [trial.launch for trial in trials]
    wanted = OPERATIONS[bucket.operation].candidates(bucket, launches)
    return fastest(trials) is not None and all(list(launch) in tried for launch in wanted)


def _answers(ended: Ended) -> Iterator[KernelAnswer]:
    for line in ended.answers:
        try:
            yield KernelAnswer.model_validate_json(line)
        except ValidationError as error:  # a line cut off by the worker's death
            _log.debug("not an answer of the kernel worker: %s", error)
