"""Quantized weights that stay dense: dequantized once, the same gradients, freed when fewer are to stay."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from fastft import patch_model
from fastft.engine import resident
from fastft.engine.patch import base_model
from fastft.engine.state import state_of
from fastft.models import quantized as quantized_weights
from fastft.models.loading import quantization_config

pytest.importorskip("bitsandbytes")
LINEARS_PER_LAYER = 7


@pytest.fixture
def nf4(tmp_path: Path, device: torch.device, toy_base: Any, shake: Any) -> Any:
    """Makes a `PeftModel` over weights in 4 bits."""

    def make(dtype: torch.dtype) -> Any:
        toy_base(device="cpu").save_pretrained(tmp_path)
        base = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype=dtype, device_map={"": str(device)}, quantization_config=quantization_config("nf4", dtype)
        )
        lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(base, lora)
        shake(model)
        return model.train()

    return make


@pytest.fixture
def dequantized(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The modules whose weights were dequantized."""
    seen: list[Any] = []
    original = quantized_weights.dense_weight

    def spy(module: Any, *rest: Any, **more: Any) -> torch.Tensor:
        if quantized_weights.is_quantized(module):
            seen.append(module)
        return original(module, *rest, **more)

    monkeypatch.setattr("fastft.adapters.adapted.dense_weight", spy)
    return seen


def held(model: Any) -> int:
    return len(state_of(base_model(model)).settings.reading.resident._dense)


@pytest.mark.parametrize("count", [1, 3])
def test_gradients_are_the_same_and_the_weights_are_dense_once(count, nf4, batch_of, step, dequantized):
    batch = batch_of("right")
    model = nf4(torch.float32)
    patch_model(model, backend="eager", placement="full", strict=True)
    _, expected = step(model, batch)
    staying = {
        id(module) for layer in base_model(model).model.layers[:count] for module in layer.modules()
        if quantized_weights.is_quantized(module)
    }  # fmt: skip
    of_others = [id(module) for module in dequantized if id(module) not in staying]
    assert len(dequantized) - len(of_others) > len(staying)
    patch_model(model, backend="eager", placement="full", resident_layers=count, strict=True)
    dequantized.clear()
    _, first = step(model, batch)
    seen = [id(module) for module in dequantized]
    assert sorted(seen) == sorted([*of_others, *staying])
    dequantized.clear()
    _, second = step(model, batch)
    assert sorted(map(id, dequantized)) == sorted(of_others)
    for name, gradient in expected.items():
        assert torch.equal(first[name], gradient)
        assert torch.equal(second[name], gradient)


def test_what_need_not_stay_is_freed(nf4, batch_of, step):
    model = nf4(torch.float32)
    patch_model(model, backend="eager", resident_layers=3)
    settings = state_of(base_model(model)).settings
    step(model, batch_of("none"))
    assert held(model) == 3 * LINEARS_PER_LAYER
    settings.resident_layers = 1
    step(model, batch_of("none"))
    assert held(model) == LINEARS_PER_LAYER


def test_what_changed_about_a_layer_does_not_dequantize_again(nf4, batch_of, step, dequantized):
    model = nf4(torch.float32)
    patch_model(model, backend="eager", resident_layers=3)
    step(model, batch_of("none"))
    dequantized.clear()
    base_model(model).model.layers[1].mlp.down_proj.scaling["default"] = 0.5
    step(model, batch_of("none"))
    assert not dequantized


def test_another_weight_is_dequantized_anew(nf4, batch_of, step):
    model = nf4(torch.float32)
    patch_model(model, backend="eager", resident_layers=3)
    loss, _ = step(model, batch_of("none"))
    linear = base_model(model).model.layers[1].mlp.down_proj
    linear.base_layer.weight.data = linear.base_layer.weight.data.flip(0).contiguous()
    linear.scaling["default"] = linear.scaling["default"] * 1.0000001  # so that the layers are looked at
    changed, _ = step(model, batch_of("none"))
    assert changed != pytest.approx(loss, rel=1e-6)


def test_dense_models_hold_nothing(toy, batch_of, step):
    model = toy()
    patch_model(model, backend="eager", resident_layers=3)
    step(model, batch_of("none"))
    assert held(model) == 0
    assert resident.ResidentWeights().of([None], 1, torch.float32) == [None]
