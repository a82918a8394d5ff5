"""Whether the gradients of a tuned plan are stock PEFT's: the bench's parity gate, asked of what wins."""

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from fastft.config import RunConfig
from fastft.console import Meter
from fastft.errors import FastftError
from fastft.files import write_atomically
from fastft.models.shapes import SHAPES
from fastft.plan import Choices, Evidence, Plan, PlanKey
from fastft.siblings import import_sibling

if TYPE_CHECKING:
    from bench.worker_process import Worker

GATE_LAYERS = 6
"""Depth at which a shipped shape is checked: one layer a placement policy."""


class GradientGate:
    """Asked of each plan that wins, in a process of its own, which may have been started before."""

    def __init__(self, config: RunConfig, key: PlanKey, meter: Meter) -> None:
        """For plans of `key`; `meter` is told the figures."""
        self._config, self._key, self._meter = config, key, meter
        self._waiting: Worker | None = None

    def __enter__(self) -> "GradientGate":
        self._open = ExitStack()
        self._folder = Path(self._open.enter_context(tempfile.TemporaryDirectory(prefix="fastft-gate-")))
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def begin(self) -> None:
        """Start the process, if none waits yet: it imports for as long as it then takes to compare."""
        self._waiting = self._waiting or self._start()

    def agrees(self, choices: Choices) -> bool:
        """Whether the gradients of `choices` pass.

        Where the gate cannot say, because the fp32 reference does not fit for example, a warning says so and the
        answer is yes: the bench asks again before it prints any ratio.
        """
        if choices.backend == "peft":
            return True
        self._meter.update(f"comparing the gradients of {choices.summary()} with stock PEFT")
        messages, scenarios = import_sibling("bench.messages"), import_sibling("bench.scenarios")
        candidate = self._folder / "candidate.json"
        write_atomically(candidate, Plan(key=self._key, choices=choices, evidence=Evidence(trials=[])).to_json())
        scenario = scenarios.Scenario(
            name="tune",
            config=self._config.model_copy(update={"plan": str(candidate), "backend": "auto", "micro_batch": None}),
            arms=(choices.backend,), steps=2, data="random",
            gate=scenarios.GateSize(layers=GATE_LAYERS if self._config.model in SHAPES else None),
        )  # fmt: skip
        answer = None
        try:
            worker, self._waiting = self._waiting or self._start(), None
            answer = worker.ask(
                messages.GateRequest(scenario=scenario, arm=choices.backend), timeout_seconds=scenario.timeout_seconds
            )
            problem = answer.error
        except FastftError as error:
            problem = str(error)
        if answer is None or answer.gate is None:
            self._meter.line(f"warning: the gradients of the plan could not be compared with stock PEFT's: {problem}")
            return True
        parity = answer.gate.parity
        figures = f"relative error {parity.max_relative_error:.1e}, allowed {parity.tolerance:.1e}"
        if parity.passed:
            self._meter.line(f"gradients agree with stock PEFT's: {figures}")
        else:
            self._meter.line(f"{choices.summary()} is refused: {answer.gate.reason or figures}")
        return bool(parity.passed)

    def _start(self) -> "Worker":
        processes = import_sibling("bench.worker_process")
        environment = processes.worker_environment(self._config)
        worker: Worker = self._open.enter_context(
            processes.Worker(log_file=self._folder / "gate.log", environment=environment)
        )
        return worker
