"""`tune`: a plan, from the cache or by measuring; `dry_run`: what that would try, and how long it would take."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median

from autotune.kernel_store import KernelStore
from autotune.kernels import RunKernels
from autotune.kernels import run_in_process as run_kernels_in_process
from autotune.phases import VERIFICATION_SECONDS, Progress, Search
from autotune.pool import TrialPool
from autotune.probe import ProbeRequest
from autotune.ranking import MEASURED
from autotune.runner import Spares
from autotune.runner import run_probe as run_in_process
from autotune.space import EFFORTS, Effort, EffortName, candidates
from fastft.cache import cache_lock
from fastft.config import RunConfig
from fastft.errors import MeasureError, unknown_choice
from fastft.files import sha256_of
from fastft.hardware import Device, detect_device
from fastft.models.shapes import ModelShape
from fastft.plan import Choices, Plan, Trial
from fastft.plan_store import PlanStore
from fastft.planning import model_shape, plan_key

ASSUMED_PROBE_SECONDS = {"cuda": 15.0, "cpu": 10.0}
"""Where none was measured yet: 7 s for a few steps of an 8B model on an H100 (docs/log.md), and as much to read a real
one from disk; or the model `tiny` on two cores."""

SPARE_HOST_BYTES = 2**30
"""What a probe holds of the host's memory until it has its request, and nothing on the GPU; all of them may hold a
quarter."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TuneResult:
    """What `tune` gives."""

    plan: Plan
    cached: bool
    """True if the plan was there already and nothing was measured."""


@dataclass(frozen=True)
class DryRun:
    """What `tune` might do."""

    candidates: list[Choices]
    """The uniform ones, the default first.  Placements and refinements follow from what these measure."""
    probes: int | None
    """At most; None for no limit."""
    kernel_seconds: float
    """For the kernel search, where there is one."""
    probe_seconds: float
    """For one probe."""
    probe_seconds_measured: bool
    """Whether that is the median of earlier probes of this run, or an assumption."""
    minutes: float | None
    """How long all takes at most, by this estimate and by the effort's own limit; None for no limit."""


def tune(
    config: RunConfig,
    *,
    effort: EffortName = "quick",
    max_minutes: float | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    run_probe: Callable[[ProbeRequest], Trial] | None = None,
    run_kernels: RunKernels | None = None,
    store: PlanStore | None = None,
    force: bool = False,
    verify_plan: Callable[[Choices], bool] | None = None,
    shape: ModelShape | None = None,
    device: Device | None = None,
    seed: int = 0,
) -> TuneResult:
    """The plan for `config`: from the store, or found by measuring and then stored.

    What the run pins itself (backend, micro-batch, placement) does not narrow the search: a plan is for its key,
    and the run's pins are applied over it.

    Args:
        config: the run.
        effort: quick, full or exhaustive; see `space.EFFORTS`.
        max_minutes: nothing is measured that would end later, the kernel search included, and there is time left to
            verify the plan; the default is always measured, if no tuning of the last day did.  None takes the effort's
            own on a GPU.
        on_progress: called before and after each probe.
        run_probe: measures one request; default is `runner.run_probe`, in a process of its own.
        run_kernels: compares launches of kernels; default is `kernels.run_in_process`, or nothing where `run_probe` is
            given: launches that were not measured by the same means are not tried.
        store: default is the user's.
        force: measure even if there is a plan, and forget what was measured before: an interrupted tuning, and trials
            under other memory caps.
        verify_plan: asked for each winner until one is accepted; a refused one gets the verdict `parity_failed`.
        shape, device: what `config.model` and `config.device` say, by default.
        seed: of the adapters and the random batches.

    Raises:
        MeasureError: no candidate ran, or none under the cap.
    """
    level = _level(effort)
    config = _unpinned(config)
    device = device or detect_device(config.device)
    store = store or PlanStore()
    shape = shape or model_shape(config, store.cache)
    key = plan_key(config, shape, device)
    if not force and (plan := store.load(key)) is not None:
        return TuneResult(plan, cached=True)
    report = on_progress or (lambda progress: None)
    minutes = max_minutes if max_minutes is not None else level.minutes if device.kind == "cuda" else None
    with _device_lock(store, device, report), ExitStack() as waiting:
        if not force and (plan := store.load(key)) is not None:  # another tuner was faster
            return TuneResult(plan, cached=True)
        TrialPool.remove_outdated(store.cache)
        pool = TrialPool.of(store.cache, key, device, effort)
        if force:
            pool.forget()
        kept = 0.0 if verify_plan is None else VERIFICATION_SECONDS
        spares = waiting.enter_context(Spares(count=_spares(device)))
        if run_probe is None and device.kind == "cuda":
            spares.begin()  # while the search of launches, which is timed on the device alone, imports too
        search = Search(
            config, shape, device, effort, seed, pool, report, _with_time_limit(run_probe, spares),
            run_kernels or (run_kernels_in_process if run_probe is None else None),
            KernelStore(store.cache, key),
            deadline=None if minutes is None else time.monotonic() + 60 * minutes - kept,
        )  # fmt: skip
        try:
            choices = search.run(verify_plan)
        except MeasureError:
            if all(trial.verdict in MEASURED for trial in search.trials):
                pool.end()  # all ran, and only the cap says no
            else:
                pool.forget()  # the next attempt measures anew: another program may have held the memory
            raise
        plan = search.plan(key, choices)
        if search.out_of_time:
            _log.info("the %g minutes are over before everything was tried; the plan is the best until then", minutes)
        store.save(plan)
        pool.end()
    return TuneResult(plan, cached=False)


def dry_run(
    config: RunConfig,
    *,
    effort: EffortName = "quick",
    store: PlanStore | None = None,
    shape: ModelShape | None = None,
    device: Device | None = None,
) -> DryRun:
    """What `tune` might probe and how long that takes; nothing is measured, nothing written."""
    level, config = _level(effort), _unpinned(config)
    device, store = device or detect_device(config.device), store or PlanStore()
    shape = shape or model_shape(config, store.cache)
    found = candidates(config, shape, device, effort)
    measured = TrialPool.of(store.cache, plan_key(config, shape, device), device, effort).probe_seconds()
    seconds = median(measured) if measured else ASSUMED_PROBE_SECONDS[device.kind]
    kernels = level.kernel_seconds if found[0].backend == "triton" and device.kind == "cuda" else 0.0
    minutes = None
    if level.probes is not None:
        minutes = (kernels + level.probes * seconds + VERIFICATION_SECONDS) / 60
        if level.minutes is not None and device.kind == "cuda":
            minutes = min(minutes, level.minutes)
    return DryRun(found, level.probes, kernels, seconds, bool(measured), minutes)


def _level(effort: EffortName) -> Effort:
    if effort not in EFFORTS:
        raise unknown_choice("effort", effort, EFFORTS)
    return EFFORTS[effort]


def _unpinned(config: RunConfig) -> RunConfig:
    """The run without what it chooses for itself."""
    return config.model_copy(update={"backend": "auto", "micro_batch": None, "placement": None, "plan": "none"})


def _with_time_limit(
    run_probe: Callable[[ProbeRequest], Trial] | None, spares: Spares
) -> Callable[[ProbeRequest, float], Trial]:
    if run_probe is None:
        return lambda request, seconds: run_in_process(request, timeout_seconds=seconds, spares=spares)
    return lambda request, seconds: run_probe(request)


def _spares(device: Device) -> int:
    """How many probes import together: all of quick's if that does not crowd the host, and on a CPU none beside a
    measurement."""
    if device.kind != "cuda":
        return 1
    host = device.host_memory_bytes
    room = device.cores if host is None else host // (4 * SPARE_HOST_BYTES)
    return max(1, min(EFFORTS["quick"].probes or 1, device.cores - 2, room))


@contextmanager
def _device_lock(store: PlanStore, device: Device, report: Callable[[Progress], None]) -> Iterator[None]:
    """One tuner a device: two at a time would time each other."""
    path = store.cache / "locks" / f"{device.kind}-{sha256_of([device.name, device.bus_id])[:16]}.lock"
    with ExitStack() as held:
        try:
            held.enter_context(cache_lock(path, timeout=0))
        except TimeoutError:
            _log.info("another tuning runs on %s; waiting for it to end", device.name)
            report(Progress("waiting", 0, 0, None, None, None, None))
            held.enter_context(cache_lock(path))
        yield
