"""The runner: gates first, then repetitions interleaved over the arms, each in a process of its own.

Interleaved, because a machine gets warmer, its clocks change and other work comes and goes: what drifts must
hit every arm.  Isolated, because one arm's allocator, caches and patches must not reach the next one, and a
crash must cost one repetition.  Records are on disk after each step, so an interrupted run keeps what it has.
"""

import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from bench.arms import find_arm, require_runnable, runnable_arms
from bench.messages import Answer, GateReply, GateRequest, RepetitionRequest, identify
from bench.provenance import provenance, utc_now
from bench.scenarios import Scenario, load_scenario
from bench.worker_process import ask_worker, worker_environment
from fastft.errors import BackendError, MeasureError
from fastft.files import canonical_json, new_folder, write_atomically
from fastft.record import Record, write_records

log = logging.getLogger("fastft")

RECORDS, GATES, LOGS = "records.jsonl", "gates.json", "logs"
"""What a bench folder holds: the records, the gates' full results, the workers' stderr."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Told before each process starts (`record` None) and after each gate and repetition."""

    done: int
    total: int
    """Gates and repetitions of the whole run."""
    text: str
    record: Record | None = None


def run_bench(
    scenario: str | Path | Scenario,
    *,
    arms: tuple[str, ...] | list[str] | None = None,
    repetitions: int | None = None,
    output: Path,
    on_progress: Callable[[Progress], None] | None = None,
    config_overrides: dict[str, Any] | None = None,
) -> list[Record]:
    """Run a scenario and write `output/records.jsonl`.

    Args:
        scenario: a built-in name, a TOML file, or a scenario.
        arms: the arms to run; one that cannot run here is then an error, where the scenario's own is skipped
            with a logged line.
        output: a new or empty folder.
        config_overrides: configuration values as flags give them, e.g. `{"rank": 8}`.

    Returns:
        The records in the order in which they were made; repetitions that failed, and those of an arm that
        failed its gate, are among them.

    Raises:
        ConfigError: an unknown scenario, arm or key, or a bad value.
        BackendError: an arm that was asked for, or every arm, cannot run here.
        OutputError: `output` is not empty or cannot be written.
        KeyboardInterrupt: Ctrl-C; the worker is stopped and what was measured is on disk.
    """
    scenario = scenario if isinstance(scenario, Scenario) else load_scenario(scenario)
    scenario = scenario.changed(
        arms=tuple(arms) if arms is not None else None, repetitions=repetitions, config=config_overrides
    )
    scenario = _only_runnable(scenario, explicit=arms is not None)
    folder = new_folder(output, what="bench").resolve()
    return _Run(scenario, folder, on_progress or (lambda progress: None)).all()


def repetition_order(arms: tuple[str, ...], repetition: int) -> tuple[str, ...]:
    """The arms of one repetition, rotated by one place from repetition to repetition: none is always first."""
    first = repetition % len(arms)
    return arms[first:] + arms[:first]


class _Run:
    """One bench run: its records so far, and what later repetitions need from earlier ones."""

    def __init__(self, scenario: Scenario, folder: Path, on_progress: Callable[[Progress], None]) -> None:
        self._scenario, self._folder, self._on_progress = scenario, folder, on_progress
        self._run_id = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{secrets.token_hex(4)}"
        self._provenance = provenance()
        self._environment = worker_environment(scenario.config)
        self._records: list[Record] = []
        self._done = 0
        self._total = len(scenario.arms) * (1 + scenario.repetitions)
        self._accuracy_before: dict[int, float] = {}

    def all(self) -> list[Record]:
        gates = self._gates()
        passed = tuple(arm for arm, reply in gates.items() if isinstance(reply, GateReply) and reply.parity.passed)
        for repetition in range(self._scenario.repetitions):
            for arm in repetition_order(passed, repetition) if passed else ():
                gate = gates[arm]
                assert isinstance(gate, GateReply)
                self._repetition(arm, repetition, gate)
        return self._records

    def _gates(self) -> dict[str, GateReply | str]:
        """Every arm's gate: the reply, or why there is none.  Arms that may not be timed get their records here."""
        gates: dict[str, GateReply | str] = {}
        for arm in self._scenario.arms:
            self._tell(f"{arm}: parity gate")
            gates[arm] = gate = self._gate(arm)
            self._done += 1
            shown = {
                name: reply.model_dump() if isinstance(reply, GateReply) else {"error": reply}
                for name, reply in gates.items()
            }
            write_atomically(self._folder / GATES, canonical_json(shown) + "\n")
            if isinstance(gate, GateReply) and gate.parity.passed:
                parity = gate.parity
                self._tell(f"{arm}: gradients agree, error {parity.max_relative_error:.1e} of {parity.tolerance:.1e}")
                continue
            for repetition in range(self._scenario.repetitions):
                self._add(self._untimed_record(arm, repetition, gate))
        return gates

    def _gate(self, arm: str) -> GateReply | str:
        try:
            answer = self._ask(GateRequest(scenario=self._scenario, arm=arm), f"gate-{arm}")
        except MeasureError as error:
            return str(error)
        if answer.gate is None:
            return answer.error or "the worker answered something else than a gate"
        return answer.gate

    def _untimed_record(self, arm: str, repetition: int, gate: GateReply | str) -> Record:
        """The record of a repetition that is not run, because the gate failed or gave no verdict."""
        if isinstance(gate, GateReply):
            identity = identify(self._request(arm, repetition, gate), started_at=utc_now())
            return Record(**identity, status="gate_failed", error=f"the parity gate failed: {gate.reason}")
        return Record(
            run_id=self._run_id,
            scenario=self._scenario.name,
            arm=arm,
            backend=find_arm(arm).backend,
            repetition=repetition,
            seed=self._scenario.seed(repetition),
            status="failed",
            error=f"the parity gate gave no verdict: {gate}",
            git_commit=self._provenance.git_commit,
            command=self._provenance.command,
            started_at=utc_now(),
        )

    def _repetition(self, arm: str, repetition: int, gate: GateReply) -> None:
        self._tell(f"{arm}: repetition {repetition + 1} of {self._scenario.repetitions}")
        request = self._request(arm, repetition, gate)
        started_at = utc_now()
        try:
            answer = self._ask(request, f"{arm}-{repetition}")
            if answer.record is None:
                raise MeasureError(answer.error or "the worker answered something else than a record")
            record = answer.record
            if record.accuracy is not None:
                self._accuracy_before.setdefault(record.seed, record.accuracy.before)
        except MeasureError as error:
            record = Record(**identify(request, started_at=started_at), status="failed", error=str(error))
        self._add(record)

    def _request(self, arm: str, repetition: int, gate: GateReply) -> RepetitionRequest:
        seed = self._scenario.seed(repetition)
        return RepetitionRequest(
            run_id=self._run_id,
            scenario=self._scenario,
            arm=arm,
            repetition=repetition,
            gate=gate,
            initial_adapter=self._folder / f"initial-adapter-seed{seed}.safetensors",
            accuracy_before=self._accuracy_before.get(seed),
            git_commit=self._provenance.git_commit,
            command=self._provenance.command,
        )

    def _ask(self, request: BaseModel, name: str) -> Answer:
        return ask_worker(
            request,
            log_file=self._folder / LOGS / f"{name}.log",
            timeout_seconds=self._scenario.timeout_seconds,
            environment=self._environment,
        )

    def _add(self, record: Record) -> None:
        self._records.append(record)
        write_records(self._folder / RECORDS, self._records)
        self._done += 1
        rate = record.tokens_per_second()
        outcome = f"{rate:,.0f} tokens/s" if rate is not None else f"{record.status}: {record.error}"
        self._tell(f"{record.arm}: repetition {record.repetition + 1}: {outcome}", record)

    def _tell(self, text: str, record: Record | None = None) -> None:
        self._on_progress(Progress(done=self._done, total=self._total, text=text, record=record))


def _only_runnable(scenario: Scenario, *, explicit: bool) -> Scenario:
    if explicit:
        for arm in scenario.arms:
            require_runnable(arm, scenario.config)
        return scenario
    arms, reasons = runnable_arms(scenario.arms, scenario.config)
    for arm, reason in reasons.items():
        log.warning("arm %s is skipped: %s", arm, reason)
    if not arms:
        raise BackendError(
            f"no arm of scenario {scenario.name} can run here", got="; ".join(map(str, reasons.values())),
            fix="choose arms that this machine can run",
        )  # fmt: skip
    return scenario.changed(arms=arms)
