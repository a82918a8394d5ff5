"""The search: measure the default, then what may beat it, and write down the best as a plan.

0. on a GPU, the kernels by themselves: every candidate but the default has the launches that were fastest
1. the default: what every other must beat
2. uniform candidates (`space.candidates`), without those that what was measured rules out
3. where memory binds, mixed placements from the solver, each confirmed by a probe
4. the finalists again, interleaved, so that drift of the clocks hits all alike
5. the fastest; within the noise, the first in a fixed order
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from statistics import median
from typing import Literal

from autotune.journal import Journal
from autotune.kernel_store import KernelStore
from autotune.kernels import RunKernels, search_kernels, step_buckets, winners
from autotune.kernels import run_in_process as run_kernels_in_process
from autotune.memory import layer_costs, predicted_too_large
from autotune.probe import ProbeRequest
from autotune.ranking import NOISE, Standings
from autotune.runner import run_probe as run_in_process
from autotune.solver import solve_equal
from autotune.space import (
    EFFORTS,
    MEMORY_VERDICTS,
    EffortName,
    candidates,
    memory_limit,
    why_skip,
)
from fastft.cache import cache_lock
from fastft.config import RunConfig
from fastft.errors import MeasureError, unknown_choice
from fastft.files import sha256_of
from fastft.hardware import Device, detect_device, resolve_dtype, soft_facts, software_versions
from fastft.models.shapes import ModelShape
from fastft.plan import Choices, Evidence, KernelTrial, Plan, PlanKey, Trial
from fastft.plan_store import PlanStore
from fastft.planning import gib, model_shape, plan_key, tune_command

MIXED_HEADROOM = 0.99
"""Share of the limit that a solved placement may use by prediction: the fit is no better."""

KERNEL_SHARE = 0.25
"""Of the time that there is, at most so much goes to the kernel search."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """Where a tuning stands; given to `on_progress` before and after each probe."""

    phase: Literal["waiting", "kernels", "uniform", "mixed", "finalists"]
    index: int
    """Of this probe, from 1; of kernels, how many are done."""
    total: int
    """As far as known now; skipping makes it smaller, mixed placements and finalists larger."""
    choices: Choices | None
    trial: Trial | None
    """None before the probe."""
    best: Trial | None
    eta_seconds: float | None


@dataclass(frozen=True)
class TuneResult:
    """What `tune` gives."""

    plan: Plan
    cached: bool
    """True if the plan was there already and nothing was measured."""


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
        max_minutes: no new probe is started that would not end by then; the default is always measured.
        on_progress: called before and after each probe.
        run_probe: measures one request; default is `runner.run_probe`, in a process of its own.
        run_kernels: compares launches of kernels; default is `kernels.run_in_process`, or nothing where `run_probe` is
            given: launches that were not measured by the same means are not tried.
        store: default is the user's.
        force: measure even if there is a plan, and forget an interrupted tuning.
        verify_plan: asked for each winner until one is accepted; a refused one gets the verdict `parity_failed`.
        shape, device: what `config.model` and `config.device` say, by default.
        seed: of the adapters and the random batches.

    Raises:
        MeasureError: no candidate ran, or none under the cap.
    """
    if effort not in EFFORTS:
        raise unknown_choice("effort", effort, EFFORTS)
    config = config.model_copy(update={"backend": "auto", "micro_batch": None, "placement": None, "plan": "none"})
    device = device or detect_device(config.device)
    store = store or PlanStore()
    shape = shape or model_shape(config, store.cache)
    key = plan_key(config, shape, device)
    if not force and (plan := store.load(key)) is not None:
        return TuneResult(plan, cached=True)
    report = on_progress or (lambda progress: None)
    with _device_lock(store, device, report):
        if not force and (plan := store.load(key)) is not None:  # another tuner was faster
            return TuneResult(plan, cached=True)
        journal = Journal(store.cache / "journals" / f"{key.digest}-{effort}.jsonl")
        if force:
            journal.remove()
        level = EFFORTS[effort]
        search = _Search(
            config, shape, device, effort, seed, journal, report,
            run_probe or partial(run_in_process, timeout_seconds=level.timeout_seconds),
            run_kernels or (run_kernels_in_process if run_probe is None else None),
            KernelStore(store.cache, key),
            deadline=None if max_minutes is None else time.monotonic() + 60 * max_minutes,
        )  # fmt: skip
        try:
            choices = search.run(verify_plan)
        except MeasureError:
            journal.remove()  # the next attempt measures anew: another program may have held the memory
            raise
        plan = search.plan(key, choices)
        store.save(plan)
        journal.remove()
    return TuneResult(plan, cached=False)


def dry_run(
    config: RunConfig, *, effort: EffortName = "quick", shape: ModelShape | None = None, device: Device | None = None
) -> list[Choices]:
    """What `tune` might probe, the default first; nothing is measured."""
    config = config.model_copy(update={"backend": "auto", "micro_batch": None, "placement": None, "plan": "none"})
    return candidates(config, shape or model_shape(config), device or detect_device(config.device), effort)


@dataclass
class _Search:
    config: RunConfig
    shape: ModelShape
    device: Device
    effort: EffortName
    seed: int
    journal: Journal
    report: Callable[[Progress], None]
    run_probe: Callable[[ProbeRequest], Trial]
    run_kernels: RunKernels | None
    kernel_store: KernelStore
    deadline: float | None
    trials: list[Trial] = field(default_factory=list)
    kernel_trials: list[KernelTrial] = field(default_factory=list)
    _standings: Standings = field(init=False)
    _probe_seconds: list[float] = field(default_factory=list)
    _started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._standings = Standings(
            self.trials, self.config.batch_size * self.config.sequence_tokens, NOISE[self.device.kind]
        )

    def run(self, verify_plan: Callable[[Choices], bool] | None) -> Choices:
        """All phases; the choices that win."""
        queue = candidates(self.config, self.shape, self.device, self.effort)
        self._kernels(queue)
        self._uniform(queue)
        self._mixed()
        self._finalists()
        while True:
            winner = self._standings.winner()
            if winner is None:
                raise self._nothing_feasible()
            if verify_plan is None or verify_plan(winner):
                return winner
            self.trials.append(
                Trial(choices=winner, verdict="parity_failed", detail="its gradients differ from the reference's")
            )

    def plan(self, key: PlanKey, choices: Choices) -> Plan:
        """The plan with everything that was tried."""
        default = self.trials[0].choices
        return Plan(
            key=key,
            choices=choices,
            evidence=Evidence(
                trials=self.trials,
                kernels=self.kernel_trials,
                default_tokens_per_second=self._standings.speed(default),
                best_tokens_per_second=self._standings.speed(choices),
                seed=self.seed,
                command=f"{tune_command(self.config)} --effort {self.effort}",
                created_at=datetime.now(UTC).isoformat(timespec="seconds"),
                seconds=round(time.monotonic() - self._started, 1),
                soft=soft_facts() if self.device.kind == "cuda" else {},
                versions=software_versions(),
            ),
            model_name=self.config.model,
        )

    def _kernels(self, queue: Sequence[Choices]) -> None:
        """The kernels' launches, at the micro-batches that may be tried; in quick, at the default's."""
        level, default = EFFORTS[self.effort], queue[0]
        if self.run_kernels is None or self.device.kind != "cuda" or default.backend != "triton":
            return
        sizes = {default.micro_batch: None}
        if self.effort != "quick":
            sizes |= {choices.micro_batch: None for choices in queue if choices.backend == "triton"}
        of_step = (
            step_buckets(self.shape, self.config, self.device, size, default.loss_chunk_tokens) for size in sizes
        )
        buckets = list(dict.fromkeys(bucket for of_size in of_step for bucket in of_size))
        seconds = level.kernel_seconds
        if self.deadline is not None:
            seconds = min(seconds, KERNEL_SHARE * (self.deadline - time.monotonic()))
        self.report(Progress("kernels", 0, len(buckets), None, None, None, seconds))
        self.kernel_trials += search_kernels(
            buckets, self.kernel_store, dtype=resolve_dtype(self.config.dtype, self.device), launches=level.launches,
            seconds=seconds, run=self.run_kernels,
        )  # fmt: skip
        self.report(Progress("kernels", len(buckets), len(buckets), None, None, None, None))

    def _launched(self, choices: Choices) -> Choices:
        """`choices` with the launches that were fastest."""
        kernels = winners(self.kernel_trials) if choices.backend == "triton" else {}
        return choices.model_copy(update={"kernels": kernels})

    def _uniform(self, found: Sequence[Choices]) -> None:
        queue = list(found[:1])
        queue += [choices for choices in map(self._launched, found) if choices not in queue]
        limit = memory_limit(self.config, self.device)
        for number, candidate in enumerate(queue):
            if number > 0:
                reason = why_skip(candidate, self.trials, self.effort)
                if reason is None and predicted_too_large(candidate, self.trials, self.config.sequence_tokens, limit):
                    reason = "the measured peaks predict more memory than there is"
                if reason is not None:
                    _log.debug("skipped %s: %s", candidate.summary(), reason)
                    continue
                if self._out_of_time():
                    return
            self._measure("uniform", candidate, queue[number + 1 :])

    def _mixed(self) -> None:
        """Where uniform placements met the limit, the solved mixture at each micro-batch, the most promising first."""
        if not any(trial.verdict in MEMORY_VERDICTS for trial in self.trials):
            return
        budget = self._usable_bytes()
        proposals = []
        for backend, micro_batch in sorted({(t.choices.backend, t.choices.micro_batch) for t in self.trials}):
            if backend != "peft":  # stock checkpoints all layers or none
                proposal = self._solve(backend, micro_batch, budget * MIXED_HEADROOM)
                if proposal is not None:
                    proposals.append((*proposal, backend, micro_batch))
        proposals.sort(key=lambda proposal: proposal[0])
        for predicted_ms, choices, backend, micro_batch in proposals[: EFFORTS[self.effort].mixed_confirmations]:
            best = self._standings.best()
            if best is not None and predicted_ms >= median(best.step_time_ms):
                return  # and so are the rest
            target = budget * MIXED_HEADROOM
            for _ in range(3):
                if choices in self._standings.order() or self._out_of_time():
                    break
                trial = self._measure("mixed", choices, [])
                if trial.verdict not in MEMORY_VERDICTS or trial.peak_bytes is None:
                    break
                # The measured peak counts, not the model: ask for as much less as it was too much.
                target -= max(trial.peak_bytes - budget, 0) + 0.01 * budget
                again = self._solve(backend, micro_batch, target)
                if again is None:
                    break
                choices = again[1]

    def _usable_bytes(self) -> int:
        """The limit; or what trials reached, where one ran out of memory below it: the driver, fragments of the
        allocator's cache and other programs take their share of the device."""
        limit = memory_limit(self.config, self.device)
        if all(trial.verdict != "out_of_memory" for trial in self.trials):
            return limit
        reached = [trial.peak_bytes for trial in self.trials if trial.peak_bytes is not None]
        return min(limit, max(reached, default=limit))

    def _solve(self, backend: str, micro_batch: int, budget: float) -> tuple[float, Choices] | None:
        """(predicted step time in ms, choices) of the best mixture whose predicted peak is at most `budget`."""
        costs = layer_costs(self.trials, backend, micro_batch, shape=self.shape, config=self.config, device=self.device)
        if costs is None:
            return None
        placement = solve_equal(costs.costs, self.shape.layers, int(budget - costs.base_bytes))
        if placement is None:
            return None
        some = next(
            t.choices for t in self.trials if (t.choices.backend, t.choices.micro_batch) == (backend, micro_batch)
        )
        time_ms = costs.base_ms + sum(costs.costs[policy].price_ms for policy in placement)
        return time_ms, self._launched(some.model_copy(update={"placement": placement}))

    def _finalists(self) -> None:
        level = EFFORTS[self.effort]
        finalists = self._standings.finalists(level.finalists)
        if len(finalists) < 2:
            return
        for turn in range(level.retime_rounds):
            # There and back: a steady drift favours nobody over two turns.
            for position, choices in enumerate(finalists if turn % 2 else finalists[::-1]):
                if self._out_of_time():
                    return
                left = (level.retime_rounds - turn) * len(finalists) - position - 1
                self._measure("finalists", choices, [choices] * left)

    def _measure(
        self, phase: Literal["uniform", "mixed", "finalists"], choices: Choices, rest: Sequence[Choices]
    ) -> Trial:
        level = EFFORTS[self.effort]
        request = ProbeRequest(
            config=self.config, choices=choices, warmup_steps=level.warmup_steps, timed_steps=level.timed_steps,
            seed=self.seed,
        )  # fmt: skip
        index = len(self.trials) + 1
        left = sum(1 for c in rest if phase == "finalists" or why_skip(c, self.trials, self.effort) is None)
        self.report(self._progress(phase, index, index + left, choices, None, left + 1))
        trial = self.journal.take(request)
        if trial is None:
            started = time.monotonic()
            trial = self.run_probe(request)
            self._probe_seconds.append(time.monotonic() - started)
            self.journal.add(request, trial)
        self.trials.append(trial)
        if index == 1 and trial.verdict in ("failed", "timeout"):
            _log.warning("the default does not run (%s): %s", trial.verdict, trial.detail)
        self.report(self._progress(phase, index, index + left, choices, trial, left))
        return trial

    def _progress(
        self, phase: Literal["uniform", "mixed", "finalists"], index: int, total: int, choices: Choices,
        trial: Trial | None, left: int,
    ) -> Progress:  # fmt: skip
        eta = median(self._probe_seconds) * left if self._probe_seconds else None
        return Progress(phase, index, total, choices, trial, self._standings.best(), eta)

    def _out_of_time(self) -> bool:
        if self.deadline is None:
            return False
        expected = max(self._probe_seconds, default=0.0)
        return time.monotonic() + expected > self.deadline

    def _nothing_feasible(self) -> MeasureError:
        peaks = [t.peak_bytes for t in self.trials if t.peak_bytes is not None and t.verdict in ("over_cap", "ok")]
        cap = self.config.memory_cap_bytes
        if cap is not None and peaks and all(t.verdict in MEMORY_VERDICTS for t in self.trials):
            return MeasureError(
                "nothing trains under the memory cap", got=f"the smallest peak seen is {gib(min(peaks))}",
                allowed=f"up to {gib(cap)}", fix="raise the cap, shorten sequence_tokens, or quantize the base weights",
            )  # fmt: skip
        last = self.trials[0]
        return MeasureError(
            "no candidate could be measured",
            got=f"{len(self.trials)} tried; the default: {last.verdict}: {last.detail}",
            fix="see whether `fastft train` runs with --plan none, then tune again",
        )


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
