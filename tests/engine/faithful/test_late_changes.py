"""What changes in a layer that is looked at while the layers before it are computed."""

# seven layers: groups of them start at 0, 1 and 5

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastft import patch_model
from fastft.engine import runs
from fastft.engine.layers_watch import Look
from same_as_stock import IDS, MASK, Same, halved, layers, step

LAYERS = 7

Change = Callable[[Any], Any]


def _hook(layer: Any) -> None:
    layer.mlp.register_forward_hook(lambda module, args, output: halved(output))


def _scaling(layer: Any) -> None:
    layer.mlp.down_proj.scaling["default"] *= 3


def _epsilon(layer: Any) -> None:
    layer.post_attention_layernorm.variance_epsilon = 0.3


def _norm(layer: Any) -> None:
    layer.input_layernorm = nn.LayerNorm(64)


def _weight(layer: Any) -> None:
    base = layer.self_attn.o_proj.base_layer
    base.weight = nn.Parameter(0.5 * base.weight.detach(), requires_grad=False)


def _trained(layer: Any) -> None:
    layer.self_attn.q_proj.base_layer.weight.requires_grad_(True)


def _forward(layer: Any) -> None:
    before = layer.mlp.forward
    layer.mlp.forward = lambda x: 0.5 * before(x)


def _rank(layer: Any) -> None:
    """As AdaLoRA prunes: another shape in the same parameter."""
    adapted = layer.mlp.up_proj
    for linear, rows in (
        (adapted.lora_A["default"], slice(0, 2)),
        (adapted.lora_B["default"], (slice(None), slice(0, 2))),
    ):
        linear.weight.data = linear.weight.data[rows].clone()


CHANGES: dict[str, Change] = {
    "a hook": _hook, "a scaling": _scaling, "an epsilon": _epsilon, "another norm": _norm, "another weight": _weight,
    "a trained weight": _trained, "another forward": _forward, "fewer ranks": _rank,
}  # fmt: skip


@pytest.mark.parametrize("index", [0, 3, 6])
@pytest.mark.parametrize("change", CHANGES)
def test_between_two_steps(change: str, index: int, same: Same) -> None:
    def ask(model: Any) -> Any:
        torch.manual_seed(3)
        before = [step(model), step(model)]
        CHANGES[change](layers(model)[index])
        return [*before, step(model), step(model), step(model, input_ids=IDS, attention_mask=MASK, labels=IDS)]

    same(ask, base={"num_hidden_layers": LAYERS})


@pytest.mark.parametrize("index", [1, 6])
def test_the_embedding_is_heard_once(index: int, same: Same) -> None:
    """Where somebody hears of its calls, all layers are looked at before it."""

    def ask(model: Any) -> Any:
        heard: list[Tensor] = []
        model.get_input_embeddings().register_forward_hook(lambda module, args, output: heard.append(output.detach()))
        step(model), step(model)
        CHANGES["a scaling"](layers(model)[index])
        return [step(model), len(heard)]

    same(ask, base={"num_hidden_layers": LAYERS})


def test_a_layer_runs_only_after_it_was_looked_at(toy: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy("toy-llama", base={"num_hidden_layers": LAYERS}).train()
    patch_model(model, backend="eager")
    seen: list[Any] = []
    looked, run = Look.at, runs.forward_layer
    monkeypatch.setattr(Look, "at", lambda self, layer: seen.append(layer) or looked(self, layer))
    monkeypatch.setattr(runs, "forward_layer", lambda x, call: seen.append("run") or run(x, call))
    for _ in range(2):
        step(model)
    seen.clear()
    step(model)
    first, last = seen.index("run"), len(seen) - seen[::-1].index("run")
    assert seen[:first] == [-1, 0]
    assert seen[first:last] == [each for layer in range(1, LAYERS) for each in ("run", layer)] + ["run"]
