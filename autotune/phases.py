"""The phases of a tuning: what is measured next, and which choices win.

0. on a GPU, the kernels by themselves: every candidate but the default has the launches that were fastest
1. the default: what every other must beat; then, without measuring, what is known from tunings under other caps
2. uniform candidates (`space.candidates`), without those that what was measured rules out
3. mixed placements from the solver, each confirmed by a probe
4. refinements: what leads with one thing changed, again from there whenever that is faster
5. the finalists again, interleaved, so that drift of the clocks hits all alike; leader and default once more while the
   lead could still be luck
6. the fastest; within the noise, the first in a fixed order
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from statistics import median
from typing import Literal

from autotune.forecast import beaten_by_one_alike, far_behind
from autotune.kernel_store import KernelStore
from autotune.kernels import START_SECONDS, RunKernels, search_kernels, step_buckets, winners
from autotune.layer_costs import LayerCosts, all_layer_costs
from autotune.memory import predicted_too_large
from autotune.pool import FIRST, TrialPool
from autotune.probe import ProbeRequest
from autotune.ranking import NOISE, Standings
from autotune.space import (
    EFFORTS,
    MEMORY_VERDICTS,
    MIXED_HEADROOM,
    WORTH_TRYING,
    EffortName,
    candidates,
    memory_limit,
    refinements,
    why_skip,
)
from fastft.config import RunConfig
from fastft.errors import MeasureError
from fastft.hardware import Device, resolve_dtype, soft_facts, software_versions
from fastft.models.shapes import ModelShape
from fastft.plan import Choices, Evidence, KernelTrial, Plan, PlanKey, Trial
from fastft.planning import tune_command
from fastft.units import gib

SLACK = 0.03
"""A solved placement that leaves more of the limit than this is solved again for more."""
CLEAR_LEAD = 2.0
"""Times the noise, from which on a lead over the default is no luck."""
CORRECTIONS = 3
"""How often a solved placement is measured and corrected."""

KERNEL_SHARE = 0.25
"""Of the time that there is, at most so much goes to the kernel search."""

VERIFICATION_SECONDS = 25.0
"""Of the time that there is, kept for comparing the winner's gradients with stock PEFT's: what that takes for six
layers of an 8B model."""

Phase = Literal["waiting", "kernels", "uniform", "mixed", "refine", "finalists"]
ProbePhase = Literal["uniform", "mixed", "refine", "finalists"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """Where a tuning stands; given to `on_progress` before and after each probe."""

    phase: Phase
    index: int
    """Of this probe, from 1; of kernels, how many are done."""
    total: int
    """At most so many, as far as known now."""
    choices: Choices | None
    trial: Trial | None
    """None before the probe."""
    best: Trial | None
    eta_seconds: float | None


@dataclass
class Search:
    """One tuning."""

    config: RunConfig
    shape: ModelShape
    device: Device
    effort: EffortName
    seed: int
    pool: TrialPool
    report: Callable[[Progress], None]
    run_probe: Callable[[ProbeRequest, float], Trial]
    """Given the seconds after which it is to give up."""
    run_kernels: RunKernels | None
    kernel_store: KernelStore
    deadline: float | None
    """On the monotonic clock: no measurement starts that would end later."""
    trials: list[Trial] = field(default_factory=list)
    kernel_trials: list[KernelTrial] = field(default_factory=list)
    out_of_time: bool = False
    """Whether something was left out for lack of time."""
    _standings: Standings = field(init=False)
    _probes: int = 0
    """Measurements of this tuning, those from before an interruption among them."""
    _probe_seconds: list[float] = field(init=False)
    _started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.level = EFFORTS[self.effort]
        self._probe_seconds = self.pool.probe_seconds()
        self._standings = Standings(
            self.trials, self.config.batch_size * self.config.sequence_tokens, NOISE[self.device.kind]
        )

    def run(self, verify_plan: Callable[[Choices], bool] | None) -> Choices:
        """All phases; the choices that win."""
        queue = candidates(self.config, self.shape, self.device, self.effort)
        self._kernels(queue)
        self._recall(queue)
        self._uniform(queue)
        self._mixed()
        self._refine()
        finalists = self._finalists()
        while True:
            winner = self._standings.winner(finalists) or self._standings.winner()
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
                out_of_time=self.out_of_time,
                soft=soft_facts() if self.device.kind == "cuda" else {},
                versions=software_versions(),
            ),
            model_name=self.config.model,
        )

    def _kernels(self, queue: Sequence[Choices]) -> None:
        """The kernels' launches, at the micro-batches that may be tried; in quick, at the default's."""
        default = queue[0]
        if self.run_kernels is None or self.device.kind != "cuda" or default.backend != "triton":
            return
        sizes = {default.micro_batch: None}
        if self.effort != "quick":
            sizes |= {choices.micro_batch: None for choices in queue if choices.backend == "triton"}
        of_step = (
            step_buckets(self.shape, self.config, self.device, size, default.loss_chunk_tokens) for size in sizes
        )
        buckets = list(dict.fromkeys(bucket for of_size in of_step for bucket in of_size))
        seconds = self.level.kernel_seconds
        if self.deadline is not None:
            # A worker that hangs is given up after its time and that of a start; without time for this, what is known
            # of the launches is all there is.
            seconds = max(0.0, min(seconds, KERNEL_SHARE * self._seconds_left(), self._seconds_left() - START_SECONDS))
        self.report(Progress("kernels", 0, len(buckets), None, None, None, seconds))
        self.kernel_trials += search_kernels(
            buckets, self.kernel_store, dtype=resolve_dtype(self.config.dtype, self.device),
            launches=self.level.launches, seconds=seconds, run=self.run_kernels,
        )  # fmt: skip
        unknown = {bucket.name for bucket in buckets} - {trial.bucket for trial in self.kernel_trials}
        self.out_of_time |= seconds < self.level.kernel_seconds and bool(unknown)
        self.report(Progress("kernels", len(buckets), len(buckets), None, None, None, None))

    def _launched(self, choices: Choices) -> Choices:
        """`choices` with the launches that were fastest."""
        kernels = winners(self.kernel_trials) if choices.backend == "triton" else {}
        return choices.model_copy(update={"kernels": kernels})

    def _recall(self, found: Sequence[Choices]) -> None:
        """The default's trial, measured if no other tuning did, and then those of all other tunings."""
        default, most = found[0], self.level.uniform_probes or len(found)
        others = self.pool.others(self._request(default))
        known = next((trial for trial in others if trial.choices == default), None)
        if known is None:
            trial = self._measure("uniform", default, min(most, len(found)) - 1)
            if trial.verdict in ("failed", "timeout"):
                _log.warning("the default does not run (%s): %s", trial.verdict, trial.detail)
        else:
            self.trials.append(known)
        self.trials += [trial for trial in others if trial.choices != default]
        reused = sum(trial.reused for trial in self.trials)
        if reused:
            _log.info("%d trials of the last day, under other memory caps, are judged again", reused)

    def _uniform(self, found: Sequence[Choices]) -> None:
        queue: list[Choices] = []
        for choices in map(self._launched, found):
            if choices not in queue and choices not in self._standings.order():
                queue.append(choices)
        # The default is one of them, also where it is known already.
        most = self.level.uniform_probes
        end = self._probes + (len(queue) if most is None else most - 1)
        for number, candidate in enumerate(queue):
            reason = self._why_not(candidate)
            if reason is not None:
                _log.debug("skipped %s: %s", candidate.summary(), reason)
            elif self._probes >= end or not self._may_probe():
                return
            else:
                left = sum(self._why_not(other) is None for other in queue[number + 1 :])
                self._measure("uniform", candidate, min(left, end - self._probes - 1))

    def _why_not(self, candidate: Choices) -> str | None:
        """Why a uniform candidate need not be tried; None if it should be."""
        reason = why_skip(candidate, self.trials, self.effort)
        if reason is not None:
            return reason
        limit = memory_limit(self.config, self.device)
        if predicted_too_large(candidate, self.trials, self.config.sequence_tokens, limit):
            return "the measured peaks predict more memory than there is"
        if self.effort == "exhaustive":
            return None
        known = self.trials, self.config, self.shape, self.device
        return beaten_by_one_alike(candidate, *known) or far_behind(candidate, *known)

    def _mixed(self) -> None:
        """The most promising solved placement, again and again, as each that was measured tells more of the prices."""
        end = self._probes + self.level.mixed_probes
        while self._probes < end and (proposal := self._proposal()) is not None:
            probes = self._probes
            self._confirm(*proposal, end)
            if self._probes == probes:
                return

    def _proposal(self) -> tuple[Choices, LayerCosts, int] | None:
        """The solved placement that is predicted to be fastest, of any backend and micro-batch, with what it rests on
        and the bytes there are; None where none is faster than what was measured."""
        budget, best = self._usable_bytes(), self._standings.best()
        limit = float("inf") if best is None else (1 - WORTH_TRYING) * median(best.step_time_ms)
        found = None
        for costs in all_layer_costs(self.trials, shape=self.shape, config=self.config, device=self.device):
            solved = costs.solve(budget * MIXED_HEADROOM)
            if solved is None or self._launched(solved[1]) in self._standings.order():
                continue
            if solved[0] < limit:
                limit, found = solved[0], (solved[1], costs, budget)
        return found

    def _confirm(self, choices: Choices, costs: LayerCosts, budget: int, end: int) -> None:
        """Measure a solved placement, and solve again with the prediction corrected: the measured peak counts, not the
        model."""
        for _ in range(CORRECTIONS):
            choices = self._launched(choices)
            if choices in self._standings.order() or self._probes >= end or not self._may_probe():
                return
            trial = self._measure("mixed", choices, end - self._probes - 1)
            if trial.peak_bytes is None:
                return
            predicted = costs.peak_of(choices.placement)
            target = predicted + budget * MIXED_HEADROOM - trial.peak_bytes
            if trial.verdict in MEMORY_VERDICTS:
                # What ran out of memory would have needed more than it reached.
                target = min(target, predicted - 0.01 * budget)
            elif trial.verdict != "ok" or trial.peak_bytes > (1 - SLACK) * budget:
                return
            again = costs.solve(target)
            if again is None:
                return
            choices = again[1]

    def _usable_bytes(self) -> int:
        """The limit; or what trials reached, where one ran out of memory below it: the driver, fragments of the
        allocator's cache and other programs take their share of the device."""
        limit = memory_limit(self.config, self.device)
        if all(trial.verdict != "out_of_memory" for trial in self.trials):
            return limit
        reached = [trial.peak_bytes for trial in self.trials if trial.peak_bytes is not None]
        return min(limit, max(reached, default=limit))

    def _refine(self) -> None:
        """Coordinate descent from what leads: one change at a time, kept where it is faster beyond the noise."""
        leader, limit = self._standings.best(), self.level.refinements
        end = None if limit is None else self._probes + limit
        while leader is not None:
            changes = refinements(leader, self.config, self.shape, self.device, self.effort)
            changes = [choices for choices in changes if choices not in self._standings.order()]
            most = len(changes) if end is None else min(len(changes), end - self._probes)
            if most < 1 or not self._may_probe():
                return
            self._measure("refine", changes[0], most - 1)
            now, before = (self._standings.speed(choices) for choices in (changes[0], leader.choices))
            if now is not None and before is not None and now > (1 + self._standings.noise) * before:
                leader = self.trials[-1]

    def _finalists(self) -> list[Choices] | None:
        """Those that were measured again; None where there was nothing to compare, or no time.

        Where a finalist is known from another tuning only, it is measured once more than the others, so that all of
        them have as many chances to be undisturbed.
        """
        finalists = self._standings.finalists(self.level.finalists)
        unmeasured = [choices for choices in finalists if not self._is_measured(choices)]
        if len(finalists) < 2 and not unmeasured:
            return None
        # There and back: a steady drift favours nobody over two turns.
        turns = [finalists if turn % 2 else finalists[::-1] for turn in range(self.level.retime_rounds)]
        turns += [unmeasured]
        left = sum(map(len, turns)) + 2 * self.level.confirmations
        for turn, of_turn in enumerate(turns, 1):
            for choices in of_turn:
                if not self._may_probe(finalists=True):
                    return finalists if all(map(self._is_measured, finalists)) else None
                left -= 1
                self._measure("finalists", choices, left, turn=FIRST + turn)
        self._confirm_lead(finalists, FIRST + len(turns) + 1)
        return finalists

    def _confirm_lead(self, finalists: Sequence[Choices], turn: int) -> None:
        """Time the winner and the default again while the lead is within twice the noise and measurements are left: the
        same machine should choose the same the next time."""
        default, left = self.trials[0].choices, 2 * self.level.confirmations
        for number in range(self.level.confirmations):
            winner = self._standings.winner(finalists)
            if winner is None or winner == default:
                return
            speed, of_default = self._standings.speed(winner), self._standings.speed(default)
            clear = 1 + CLEAR_LEAD * self._standings.noise
            if speed is None or of_default is None or speed >= clear * of_default:
                return
            for choices in (winner, default):
                if self._probes >= self.level.most_probes or not self._may_probe(finalists=True):
                    return
                left -= 1
                self._measure("finalists", choices, left, turn=turn + number)

    def _is_measured(self, choices: Choices) -> bool:
        """Whether this tuning measured it."""
        return any(trial.choices == choices and not trial.reused for trial in self.trials)

    @property
    def _kept_for_finalists(self) -> int:
        """Measurements that they may take, as it stands."""
        finalists = self._standings.finalists(self.level.finalists)
        return self.level.repetitions + sum(not self._is_measured(choices) for choices in finalists)

    def _request(self, choices: Choices) -> ProbeRequest:
        return ProbeRequest(
            config=self.config, choices=choices, warmup_steps=self.level.warmup_steps,
            timed_steps=self.level.timed_steps, seed=self.seed,
        )  # fmt: skip

    def _measure(self, phase: ProbePhase, choices: Choices, more: int, turn: int = FIRST) -> Trial:
        """One probe, after which the phase has at most so many `more`."""
        request = self._request(choices)
        self._probes += 1
        index, left = self._probes, self._most_left(phase, more)
        self.report(self._progress(phase, index, choices, None, left + 1))
        trial = self.pool.take(request, turn)
        if trial is None:
            seconds = self.level.timeout_seconds
            if self.trials:  # the default is measured however long it takes
                seconds = min(seconds, max(1.0, self._seconds_left()))
            started = time.monotonic()
            trial = self.run_probe(request, seconds)
            self._probe_seconds.append(time.monotonic() - started)
            self.pool.add(request, trial, self._probe_seconds[-1], turn)
        self.trials.append(trial)
        self.report(self._progress(phase, index, choices, trial, left))
        return trial

    def _most_left(self, phase: ProbePhase, more: int) -> int:
        """How many measurements may still follow in all phases, as far as there is a limit."""
        if phase == "finalists":
            return more
        later = self._kept_for_finalists
        if phase != "refine":
            later += self.level.refinements or 0
        return more + later if self.level.probes is None else min(more + later, self.level.probes - self._probes)

    def _progress(self, phase: ProbePhase, index: int, choices: Choices, trial: Trial | None, left: int) -> Progress:
        eta = median(self._probe_seconds) * left if self._probe_seconds else None
        total = index + left - (trial is None)
        return Progress(phase, index, total, choices, trial, self._standings.best(), eta)

    def _may_probe(self, *, finalists: bool = False) -> bool:
        """Whether there are time and measurements left for one more, beside those that are kept for the finalists."""
        if not finalists and self._probes + self._kept_for_finalists >= self.level.most_probes:
            return False
        # The first one also waits for its imports, and for kernels to be compiled.
        expected = max(self._probe_seconds[1:] or self._probe_seconds, default=0.0)
        if expected > self._seconds_left():
            self.out_of_time = True
            return False
        return True

    def _seconds_left(self) -> float:
        return float("inf") if self.deadline is None else self.deadline - time.monotonic()

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
