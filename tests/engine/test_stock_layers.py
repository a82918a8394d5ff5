"""A layer that cannot run fused as a whole, in a family that has a specification: its parts run fused one by one."""

from typing import Any

import peft
import pytest
import torch

from fastft import ledger_of, patch_model
from peft_models import randomize_adapters

TOLERANCE = 5e-5 if torch.cuda.is_available() else 1e-5  # ‖g − stock‖ / ‖stock‖ in fp32


def counts(model: Any, *kinds: str) -> dict[str, int]:
    return {line: count for line, count in ledger_of(model).counts().items() if line.startswith(kinds)}


def paths(model: Any, kind: str) -> dict[str, str]:
    return {name: path.reason or path.path for name, path in ledger_of(model).paths.items() if path.kind == kind}


def test_dora_on_one_projection_leaves_the_rest_of_its_layer_fused(toy, batch_of, step, error_of):
    def make() -> Any:
        plain = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]}
        model = toy(**plain)
        # DoRA with dropout stays stock; so little of it drops nothing.
        config = peft.LoraConfig(r=4, use_dora=True, lora_dropout=1e-9, target_modules=r".*\.1\.mlp\.gate_proj")
        peft.inject_adapter_in_model(config, model.get_base_model())
        return randomize_adapters(model)

    stock, model = make(), make()
    batch = batch_of("right")
    loss, gradients = step(stock, batch)
    assert any("magnitude" in name for name in gradients)
    ledger = patch_model(model, backend="eager")
    before = dict(ledger.paths)
    fused_loss, fused = step(model, batch, 2)
    assert fused_loss == pytest.approx(loss, rel=1e-5)
    assert error_of(fused, gradients) < TOLERANCE
    assert ledger.paths == before, "known before the first step"
    variant = "its adapter: its DoRA has dropout"
    assert {name: path.reason for name, path in ledger.fallbacks.items()} == {
        "layers.1": f"gate_proj: {variant}", "layers.1.mlp.gate_proj": variant,
    }  # fmt: skip
    assert counts(model, "linear: fused", "norm: fused") == {"linear: fused (eager)": 6, "norm: fused (eager)": 3}
    assert counts(model, "decoder_layer: fused") == {"decoder_layer: fused (eager)": 2}


@pytest.mark.parametrize("placement", ["full", "keep"])
def test_a_layer_that_becomes_fusable_again_is_fused_again(placement, toy, batch_of, step, error_of):
    model = toy(lora_dropout=0.0)
    batch = batch_of("right")
    _, gradients = step(model, batch)
    patch_model(model, backend="eager", placement=placement)
    runs = []
    attention = model.get_base_model().model.layers[1].self_attn
    for _ in range(2):
        assert error_of(step(model, batch)[1], gradients) < TOLERANCE
        assert not counts(model, "linear")
        assert list(paths(model, "norm")) == ["norm"], "those of the layers are parts of them again"
        assert not runs
        hook = attention.register_forward_hook(lambda *_: runs.append(1))
        assert error_of(step(model, batch)[1], gradients) < TOLERANCE
        assert counts(model, "linear") == {"linear: fused (eager)": 7}
        assert sorted(paths(model, "norm")) == ["layers.1.input_layernorm", "layers.1.post_attention_layernorm", "norm"]
        assert len(runs) == (2 if placement == "full" else 1)
        hook.remove()
        runs.clear()


@pytest.mark.parametrize("path", ["self_attn.q_proj", "mlp.down_proj", "post_attention_layernorm"])
def test_a_forward_replaced_between_steps_is_called(path, toy, batch_of, step, error_of):
    """The engine's own stands there already, and its layer ran fused."""

    def halve(model: Any) -> None:
        module = model.get_base_model().model.layers[1].get_submodule(path)
        original = module.forward
        module.forward = lambda x: 0.5 * original(x)

    stock, model = toy(), toy()
    batch = batch_of("right")
    patch_model(model, backend="eager")
    step(model, batch)
    for each in (stock, model):
        halve(each)
    assert error_of(step(model, batch)[1], step(stock, batch)[1]) < TOLERANCE
    assert paths(model, "decoder_layer")["layers.1"] == f"{path.rpartition('.')[2]}: its forward was replaced"
