"""A run that is launched before all its layers were asked: early, the same, and taken back where others come."""

from typing import Any

import pytest
import torch

from fastft import patch_model
from fastft.engine import forwards, runtime
from fastft.engine.state import state_of

TOLERANCE = 5e-5 if torch.cuda.is_available() else 1e-5  # ‖g − stock‖ / ‖stock‖ in fp32


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens in a forward: a run that is launched, a call that is put down."""
    events: list[str] = []
    run, put_down = runtime.run_layers, runtime.Runtime.put_down

    def spied(self: Any, x: torch.Tensor, index: int, *rest: Any) -> bool:
        events.append(f"layer {index}")
        return put_down(self, x, index, *rest)

    monkeypatch.setattr(runtime, "run_layers", lambda *given: events.append("run") or run(*given))
    monkeypatch.setattr(runtime.Runtime, "put_down", spied)
    return events


def test_from_the_second_time_on_with_the_first_layer(patched, batch_of, step, order):
    layers = [f"layer {index}" for index in range(patched.config.num_hidden_layers)]
    batch = batch_of("none")
    _, first = step(patched, batch)
    assert order == [*layers, "run"]
    order.clear()
    _, second = step(patched, batch)
    assert sorted(order) == sorted([*layers, "run"])
    assert order[:2] in (["run", layers[0]], [layers[0], "run"])
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_size_waits_for_all_layers(patched, batch_of, step, order):
    step(patched, batch_of("none"))
    order.clear()
    step(patched, batch_of("none", S=17))
    assert order[-1] == "run"


def test_other_policies_than_expected_run_again(toy, patched, batch_of, step, error_of, order):
    batch = batch_of("none")
    step(patched, batch)
    layer = forwards._layers_and_norm(patched.get_base_model().model)[0][0]
    state_of(layer).settings.placement[1] = "full"
    order.clear()
    _, gradients = step(patched, batch)
    assert order.count("run") == 2
    _, stock = step(toy("toy-qwen2"), batch)
    assert error_of(gradients, stock) < TOLERANCE
    order.clear()
    step(patched, batch)
    assert order.count("run") == 1


def test_a_layer_that_drops_out_is_noticed(toy, patched, batch_of, step, error_of, monkeypatch):
    """One layer runs stock this time, though nothing about it changed."""
    batch = batch_of("none")
    step(patched, batch)
    reasons = forwards._why_not_now

    def refuse(layer: Any, *rest: Any) -> str | None:
        return "not today" if state_of(layer).index == 1 else reasons(layer, *rest)

    monkeypatch.setattr(forwards, "_why_not_now", refuse)
    monkeypatch.setattr(runtime.Runtime, "told_before", lambda *_: None)
    state_of(forwards._layers_and_norm(patched.get_base_model().model)[0][0]).settings.ledger.strict = False
    _, gradients = step(patched, batch)
    _, stock = step(toy("toy-qwen2"), batch)
    assert error_of(gradients, stock) < TOLERANCE


def test_dropout_never_runs_ahead(toy, batch_of, step, order):
    model = toy("toy-qwen2", lora_dropout=0.3)
    patch_model(model, backend="eager")
    for _ in range(3):
        order.clear()
        step(model, batch_of("none"))
        assert order[-1] == "run"
