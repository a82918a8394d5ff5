"""A shipped plan is verified by the run that follows it.

On a CPU nothing is compared, so the allocator's counters are stand-ins here; the training is real.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fastft.config import RunConfig
from fastft.hardware import detect_device
from fastft.plan import Choices, Evidence, Plan, Trial
from fastft.plan_store import PlanStore
from fastft.planning import model_shape, plan_key
from fastft.plans import shipped
from fastft.plans.run_file import RUN_FILE
from fastft.plans.verification import Verifications
from fastft.training import first_steps
from fastft.training.trainer import train

PEAK = 2**30


class Counters:
    """The allocator's, made up: until they start, what loading the model took counts too."""

    peak, retries, started = PEAK, 0, False

    def start(self) -> None:
        self.started = True

    def read(self) -> tuple[int, int]:
        return self.peak if self.started else 10 * self.peak, self.retries


@pytest.fixture
def counters(monkeypatch: pytest.MonkeyPatch) -> type[Counters]:
    monkeypatch.setattr(Counters, "peak", PEAK)
    monkeypatch.setattr(first_steps, "counters_for", lambda device: Counters())
    return Counters


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A run of the tiny model, for which a plan made by other kernels is shipped."""
    monkeypatch.setenv("FASTFT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "shipped")
    config = RunConfig(
        model="tiny", output=str(tmp_path / "run"), steps=5, batch_size=2, sequence_tokens=64,
        device="cpu",
    )  # fmt: skip
    plans = shipped.ShippedPlans()
    plans.folder.mkdir()
    plans.path(plan := made_for(config)).write_text(plan.to_json())
    return config


def made_for(config: RunConfig) -> Plan:
    shape = model_shape(config)
    choices = Choices(backend="eager", micro_batch=1, accumulation=2, placement=["full"] * shape.layers)
    key = plan_key(config, shape, detect_device("cpu")).model_copy(update={"kernels_sha256": "0" * 64})
    trials = [Trial(choices=choices, verdict="ok", peak_bytes=PEAK)]
    return Plan(key=key, choices=choices, evidence=Evidence(trials=trials), model_name="tiny")


def run(config: RunConfig, **update: Any) -> tuple[str | None, list[str]]:
    """The id of the plan that was followed, and the lines about it."""
    lines: list[str] = []
    result = train(config.model_copy(update=update), on_event=lines.append)
    return result.plan_id, [line for line in lines if line.startswith(("plan ", "no plan"))]


def test_a_plan_is_followed_at_once_and_verified_once(
    config: RunConfig, counters: type[Counters], tmp_path: Path
) -> None:
    plan = made_for(config)
    followed, lines = run(config)
    assert followed == plan.id
    assert len(lines) == 2
    assert "; shipped with fastft " in lines[0]
    assert lines[0].endswith("; not verified on this machine yet")
    assert lines[1] == f"plan {plan.id} verified on this machine: peak 1.00 GiB, 1.00 GiB when it was made"
    assert PlanStore().entries() == []  # so `fastft tune` measures
    followed, lines = run(config, output=str(tmp_path / "again"))
    assert followed == plan.id
    assert len(lines) == 1
    assert lines[0].endswith("; verified on this machine just now")


def test_a_plan_that_needs_more_is_rejected_and_not_followed_again(
    config: RunConfig, counters: type[Counters], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = made_for(config)
    monkeypatch.setattr(counters, "peak", 2 * PEAK)
    followed, lines = run(config)
    assert followed == plan.id  # this run goes on
    assert "rejected on this machine: peak 2.00 GiB, 1.00 GiB when it was made; later runs" in lines[1]
    followed, lines = run(config, output=str(tmp_path / "again"))
    assert followed is None
    assert len(lines) == 1
    assert "was rejected on this machine just now (peak 2.00 GiB" in lines[0]
    assert "fastft tune tiny" in lines[0]


def test_too_few_steps_give_no_verdict(config: RunConfig, counters: type[Counters]) -> None:
    assert len(run(config, steps=4)[1]) == 1
    assert not Verifications().folder.exists()


def test_what_the_run_sets_itself_says_nothing_about_the_plan(config: RunConfig, counters: type[Counters]) -> None:
    assert len(run(config, placement="light")[1]) == 1
    assert not Verifications().folder.exists()


def test_a_run_of_another_method_follows_the_plan_and_says_nothing_about_it(
    config: RunConfig, counters: type[Counters], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reference, or what is sampled, needs memory that the plan promised nothing about."""
    monkeypatch.setattr(counters, "peak", 2 * PEAK)
    followed, lines = run(config, method="grpo", settings={"num_generations": 2})
    assert followed == made_for(config).id
    assert len(lines) == 1
    assert not Verifications().folder.exists()


def test_a_lack_of_memory_rejects_whenever_it_comes(
    config: RunConfig, counters: type[Counters], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(config)  # verified

    def no_memory(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as during:
        during.setattr(transformers.Trainer, "training_step", no_memory)
        with pytest.raises(torch.OutOfMemoryError):
            run(config, output=str(tmp_path / "larger"))
    followed, lines = run(config, output=str(tmp_path / "again"))
    assert followed is None
    assert "(a run that followed it had not enough memory)" in lines[0]


def test_a_verdict_that_cannot_be_kept_ends_no_run(config: RunConfig, counters: type[Counters], tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(exist_ok=True)
    (tmp_path / "cache" / "verifications").write_text("in the way")
    lines: list[str] = []
    train(config, on_event=lines.append)
    assert any(line.startswith("warning: this could not be remembered: ") for line in lines)
    assert (tmp_path / "run" / RUN_FILE).exists()


def test_on_a_cpu_nothing_is_compared(config: RunConfig) -> None:
    assert first_steps.counters_for(detect_device("cpu")) is None
    assert len(run(config)[1]) == 1
    assert not Verifications().folder.exists()


@pytest.mark.gpu
def test_the_counters_are_the_allocators() -> None:
    found = first_steps.counters_for(detect_device("cuda"))
    assert found is not None
    torch.empty(2**28, device="cuda", dtype=torch.uint8)
    found.start()
    before = torch.cuda.memory_allocated()
    held = torch.empty(2**26, device="cuda", dtype=torch.uint8)
    peak, retries = found.read()
    assert before + held.nbytes <= peak < before + 2**27
    assert retries == 0
