"""The rig on the CPU: what it measures is real, and nothing that fails stays."""

import gc
import weakref

import pytest
import torch

from bench import rig as module
from bench.rig import Rig
from fastft.config import RunConfig
from fastft.engine.patch import ledger_of
from fastft.plan import Choices

CONFIG = RunConfig(model="toy-llama", batch_size=4, sequence_tokens=24, device="cpu", backend="auto", plan="none")


def choices(
    backend: str = "eager", micro_batch: int = 2, placement: tuple[str, ...] = ("light",) * 3, **more
) -> Choices:
    return Choices(
        backend=backend, micro_batch=micro_batch, accumulation=4 // micro_batch, placement=list(placement), **more
    )


@pytest.fixture(scope="module")
def rig() -> Rig:
    return Rig(CONFIG)


def measure(rig: Rig, what: Choices):
    return rig.measure(what, warmup_steps=1, timed_steps=3)


@pytest.mark.parametrize(
    "what",
    [
        choices(),
        choices(micro_batch=1),
        choices(placement=("full", "mlp", "light")),
        choices(placement=("full",) * 3, mlp_chunk_tokens=16, loss_chunk_tokens=8),
        choices("peft"),
        choices("peft", placement=("full",) * 3),
        choices(micro_batch=4),
    ],
    ids=Choices.summary,
)
def test_every_way_gives_the_same_losses_and_gradients(rig, what):
    trial = measure(rig, what)
    assert trial.verdict == "ok", trial.detail
    assert trial.choices == what
    assert len(trial.step_time_ms) == 3
    assert trial.tokens_per_second > 0
    assert trial.peak_bytes >= trial.model_bytes > 2**20
    assert (ledger_of(rig.session.model) is None) == (what.backend == "peft")
    assert rig.session.model.is_gradient_checkpointing == (what.backend == "peft" and what.placement[0] == "full")


def test_few_micro_batches_a_step_take_more_steps_to_be_warm(rig, monkeypatch):
    steps: list[int] = []
    original = module.measure_steps

    def count(session, batches):
        steps.append(len(batches))
        return original(session, batches)

    monkeypatch.setattr(module, "measure_steps", count)
    for micro_batch in (4, 2, 1):
        assert len(measure(rig, choices(micro_batch=micro_batch)).step_time_ms) == 3
    assert steps == [3 + 3, 2 + 3, 1 + 3]


def test_the_model_stands_still(rig):
    before = [parameter.detach().clone() for parameter in rig.session.parameters]
    assert all(tensor.any() for tensor in before), "a B of zero would hide A's gradient"
    measure(rig, choices())
    for tensor, parameter in zip(before, rig.session.parameters, strict=True):
        assert torch.equal(tensor, parameter)


@pytest.mark.parametrize("factor", [1.01, 0.0])
def test_a_configuration_that_computes_something_else_is_no_candidate(rig, factor, monkeypatch):
    measure(rig, choices())
    original = rig.session.forward_backward

    def wrong(batch):
        loss = original(batch)
        for parameter in rig.session.parameters:
            parameter.grad.mul_(factor)
        return loss

    monkeypatch.setattr(rig.session, "forward_backward", wrong)
    trial = measure(rig, choices())
    assert trial.verdict == "parity_failed"
    assert "gradient_norm of step 1" in trial.detail


class Held:
    """Something that a frame holds."""


@pytest.mark.parametrize(
    ("error", "verdict"),
    [(torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory"), (ValueError("odd"), "failed")],
)
def test_a_failure_is_a_verdict_frees_what_it_held_and_the_next_one_runs(rig, error, verdict, monkeypatch):
    held: list[weakref.ref[Held]] = []

    def fail(*arguments):
        activation = Held()
        held.append(weakref.ref(activation))
        raise type(error)(*error.args)

    with monkeypatch.context() as patched:
        patched.setattr(module, "measure_steps", fail)
        trial = measure(rig, choices())
    assert trial.verdict == verdict
    assert str(error) in trial.detail
    gc.collect()
    assert held[0]() is None
    assert all(parameter.grad is None for parameter in rig.session.parameters)
    assert measure(rig, choices(micro_batch=4)).verdict == "ok"
    unknown = choices().model_copy(update={"placement": ["light"]})
    assert measure(rig, unknown).verdict == "failed"
    assert measure(rig, choices()).verdict == "ok"
