"""QLoRA: the frozen weights in bitsandbytes' 4 bits, on a CPU too where bitsandbytes can."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from fastft import ledger_of, patch_model
from fastft.adapters.lora import why_not_fused
from fastft.models.loading import quantization_config
from fastft.models.quantized import dense_weight, is_quantized

bitsandbytes = pytest.importorskip("bitsandbytes")
TOLERANCE = 5e-5 if torch.cuda.is_available() else 1e-5  # ‖g − stock‖ / ‖stock‖ in fp32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fastft.models.shapes import SHAPES

    config = SHAPES["toy-llama"].to_config()
    config.initializer_range = 0.1
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("model")
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


@pytest.fixture
def quantized(folder: Path, device: torch.device, shake: Any) -> Any:
    def make(kind: str, dtype: torch.dtype, prepare: bool = False) -> Any:
        try:
            base = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, device_map={"": str(device)}, quantization_config=quantization_config(kind, dtype)
            )
        except (RuntimeError, ImportError, NotImplementedError) as error:
            pytest.skip(f"bitsandbytes cannot quantize to {kind} on this {device.type}: {error}")
        if prepare:
            base = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
        lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(base, lora)
        shake(model)
        return model.train()

    return make


@pytest.mark.parametrize("placement", ["keep", "full"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_gradients_equal_stock_on_the_same_weights(kind, placement, quantized, batch_of, step, error_of):
    batch = batch_of("right")
    model = quantized(kind, torch.float32)
    loss, gradients = step(model, batch)
    patch_model(model, backend="eager", placement=placement, strict=True)
    fused_loss, fused = step(model, batch, 2)
    assert fused_loss == pytest.approx(loss, rel=1e-5)
    assert error_of(fused, gradients) < TOLERANCE


def test_bf16_errs_no_more_than_stock(quantized, batch_of, step):
    batch = batch_of("right")
    model = quantized("nf4", torch.bfloat16)
    _, stock = step(model, batch)
    patch_model(model, backend="eager", strict=True)
    _, fused = step(model, batch)
    exact_model = copy.deepcopy(model.get_base_model())
    for name, module in list(exact_model.named_modules()):
        if is_quantized(module):
            plain = torch.nn.Linear(module.in_features, module.out_features, bias=False, device=module.weight.device)
            plain.weight = torch.nn.Parameter(dense_weight(module, torch.bfloat16).float(), requires_grad=False)
            parent, _, child = name.rpartition(".")
            setattr(exact_model.get_submodule(parent), child, plain)
    _, exact = step(torch.nn.Module.float(exact_model), batch)  # Hugging Face's own refuses
    exact = {f"base_model.model.{name}": gradient for name, gradient in exact.items()}
    assert exact.keys() == stock.keys()

    def error(gradients: dict[str, torch.Tensor]) -> float:
        flat, flat_exact = (torch.cat([g[name].flatten().double() for name in exact]) for g in (gradients, exact))
        return float((flat - flat_exact).norm() / flat_exact.norm())

    assert 1e-4 < error(stock) < 0.1
    assert error(fused) <= 1.5 * error(stock)


def test_dequantization_is_bitsandbytes_own(quantized):
    """Every input row of the identity picks one column of the matrix: bit for bit what stock multiplies with."""
    model = quantized("nf4", torch.float32)
    module = model.get_base_model().model.layers[0].mlp.gate_proj.base_layer
    assert is_quantized(module)
    eye = torch.eye(module.in_features, device=module.weight.device, requires_grad=True)
    with torch.enable_grad():
        expected = module(eye).detach().t()
    dense = dense_weight(module, torch.float32)
    assert dense.shape == (module.out_features, module.in_features)
    assert torch.equal(dense, expected)
    assert dense_weight(module, torch.bfloat16).dtype == torch.bfloat16


def test_norms_that_were_made_fp32_run_stock_under_autocast_aloud(quantized, batch_of, step):
    """What `prepare_model_for_kbit_training` makes of a model; `FastLanguageModel` does not call it for this reason."""
    model = quantized("nf4", torch.bfloat16, prepare=True)
    patch_model(model, backend="eager")
    with torch.autocast(next(model.parameters()).device.type, dtype=torch.bfloat16):
        step(model, batch_of("right"))
    assert "torch.float32 weights" in ledger_of(model).fallbacks["layers.0"].reason


def test_a_weight_that_was_packed_for_inference_is_not_read(quantized):
    module = quantized("nf4", torch.float32).get_base_model().model.layers[0].self_attn.q_proj
    assert why_not_fused(module) is None
    module.base_layer.weight.quant_state.packing_format_for_cpu = True
    assert why_not_fused(module) == "bitsandbytes packed its weight for inference on the CPU"


def test_int8_runs_stock_aloud(quantized, batch_of, step):
    model = quantized("int8", torch.float32)
    ledger = patch_model(model, backend="eager")
    assert "Linear8bitLt" in ledger.fallbacks["layers.0"].reason
    step(model, batch_of("right"))
