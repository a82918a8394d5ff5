"""torch.compile of a patched model gives stock's losses and gradients."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from same_as_stock import PADDED, Ask, Same, gradients, layers, on, step


def _compiled(model: Any) -> Any:
    compiled = torch.compile(model, backend="eager")
    loss = compiled(**{name: on(model, tensor) for name, tensor in PADDED.items()}).loss
    loss.backward()
    return [loss.detach(), gradients(model)]


def _compiled_layer_by_layer(model: Any) -> Any:
    for layer in layers(model):
        layer.compile(backend="eager")
    return step(model)


COMPILED: dict[str, Ask] = {
    "the model": _compiled,
    "layer by layer": _compiled_layer_by_layer,
}


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("what", COMPILED)
def test_compiled_losses_and_gradients(what: str, same: Same) -> None:
    def ask(model: Any) -> Any:
        torch._dynamo.reset()
        return COMPILED[what](model)

    same(ask, base={"num_hidden_layers": 1})
