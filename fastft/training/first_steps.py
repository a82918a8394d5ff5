"""Verifies a shipped plan in the first steps of the run that follows it; nothing is run for it."""

from collections.abc import Callable
from typing import Any

import transformers

from fastft.errors import OutputError
from fastft.hardware import Device
from fastft.measure.memory import AllocatorCounters
from fastft.plan import Plan, PlanKey
from fastft.plans.verification import Verification, Verifications, judge, rejected

CHECKED_STEPS = 5
"""Optimizer steps: the optimizer has its states after the first, and graphs are recorded by the third."""


def counters_for(device: Device) -> AllocatorCounters | None:
    """What is compared on this device; None on a CPU, whose resident set holds more than the training."""
    return AllocatorCounters() if device.kind == "cuda" else None


class FirstSteps(transformers.TrainerCallback):
    """Judges `plan` after `CHECKED_STEPS` and remembers a verdict that is new; the run goes on either way."""

    def __init__(
        self, plan: Plan, key: PlanKey, counters: AllocatorCounters, verifications: Verifications,
        tell: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._plan, self._key, self._counters = plan, key, counters
        self._verifications, self._tell = verifications, tell
        self._steps = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts counting."""
        self._steps = 0
        self._counters.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Judges once."""
        self._steps += 1
        if self._steps == CHECKED_STEPS:
            peak, retries = self._counters.read()
            verdict = judge(self._plan, peak_bytes=peak, allocator_retries=retries)
            if verdict is not None:
                self._remember(verdict)

    def out_of_memory(self) -> None:
        """The run ended for lack of memory, in whichever step."""
        self._remember(rejected(self._plan, "a run that followed it had not enough memory"))

    def _remember(self, verdict: Verification) -> None:
        known = self._verifications.load(self._key, self._plan)
        if known is not None and known.verdict == verdict.verdict:
            return
        after = "" if verdict.verdict == "verified" else "; later runs take the default (`fastft tune` finds a plan)"
        self._tell(f"plan {self._plan.id} {verdict.verdict} on this machine: {verdict.detail}{after}")
        try:
            self._verifications.save(self._key, verdict)
        except OutputError as error:
            self._tell(f"warning: this could not be remembered: {error}")
