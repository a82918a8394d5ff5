"""QLoRA: the frozen weights in bitsandbytes' 4 bits, on a CPU too where bitsandbytes can."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from fastft import ledger_of, patch_model, unpatch_model
from fastft.adapters.lora import why_not_fused
from fastft.kernels.dequantize import triton
from fastft.models import quantized as quantized_weights
from fastft.models.loading import load_model, quantization_config, resolve_model
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


def exact_gradients(model: Any, dtype: torch.dtype, step: Any, batch: Any) -> dict[str, torch.Tensor]:
    """Of stock's own layers in fp32, with dense matrices that were dequantized in `dtype`."""
    dense_model = copy.deepcopy(model)
    unpatch_model(dense_model)
    dense_model = dense_model.get_base_model()
    for name, module in list(dense_model.named_modules()):
        if is_quantized(module):
            plain = torch.nn.Linear(module.in_features, module.out_features, bias=False, device=module.weight.device)
            plain.weight = torch.nn.Parameter(dense_weight(module, dtype).float(), requires_grad=False)
            parent, _, child = name.rpartition(".")
            setattr(dense_model.get_submodule(parent), child, plain)
    _, exact = step(torch.nn.Module.float(dense_model), batch)  # Hugging Face's own refuses
    return {f"base_model.model.{name}": gradient for name, gradient in exact.items()}


def error(gradients: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    assert gradients.keys() == exact.keys()
    flat, flat_exact = (torch.cat([g[name].flatten().double() for name in exact]) for g in (gradients, exact))
    return float((flat - flat_exact).norm() / flat_exact.norm())


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
    exact = exact_gradients(model, torch.bfloat16, step, batch)
    assert 1e-4 < error(stock, exact) < 0.1
    assert error(fused, exact) <= 1.5 * error(stock, exact)


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


@pytest.mark.parametrize("placement", ["keep", "full"])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_norms_that_were_made_fp32_stay_so_beside_16_bit_products(kind, placement, quantized, batch_of, step):
    """What `prepare_model_for_kbit_training` makes of a model, trained under autocast."""
    model, batch = quantized(kind, torch.bfloat16, prepare=True), batch_of("right")
    exact = exact_gradients(model, torch.bfloat16, step, batch)
    with torch.autocast(next(model.parameters()).device.type, dtype=torch.bfloat16):
        loss, stock = step(model, batch)
        patch_model(model, backend="eager", placement=placement, strict=True)
        fused_loss, fused = step(model, batch)
    assert fused_loss == pytest.approx(loss, rel=1e-3)
    assert 1e-4 < error(fused, exact) <= 1.5 * error(stock, exact)


def test_a_weight_that_was_packed_for_inference_is_not_read(quantized):
    module = quantized("nf4", torch.float32).get_base_model().model.layers[0].self_attn.q_proj
    assert why_not_fused(module) is None
    module.base_layer.weight.quant_state.packing_format_for_cpu = True
    assert why_not_fused(module) == "bitsandbytes packed its weight for inference on the CPU"


@pytest.mark.parametrize("placement", ["keep", "full"])
def test_int8_multiplies_with_the_dense_matrix(placement, quantized, batch_of, step):
    """Stock rounds the activations to 8 bits as well, on a GPU; on a CPU it trains with the dense matrix too."""
    batch = batch_of("right")
    model = quantized("int8", torch.float32)
    loss, stock = step(model, batch)
    patch_model(model, backend="eager", placement=placement, strict=True)
    fused_loss, fused = step(model, batch, 2)
    exact = exact_gradients(model, torch.float32, step, batch)
    assert error(fused, exact) < TOLERANCE
    if next(model.parameters()).is_cuda:
        assert error(fused, exact) < error(stock, exact) < 0.2
    else:
        assert fused_loss == pytest.approx(loss, rel=1e-5)
        assert error(fused, stock) < TOLERANCE


def test_int8_in_bf16_errs_no_more_than_stock(quantized, batch_of, step):
    batch = batch_of("right")
    model = quantized("int8", torch.bfloat16)
    _, stock = step(model, batch)
    patch_model(model, backend="eager", strict=True)
    _, fused = step(model, batch)
    exact = exact_gradients(model, torch.float32, step, batch)
    assert 1e-4 < error(fused, exact) < 0.1
    assert error(fused, exact) <= 1.5 * error(stock, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_int8_layer_by_itself(dtype, quantized, device):
    """Part by part, as in models whose decoder layers do not run fused."""
    model = quantized("int8", torch.float32)
    patch_model(model, backend="eager", strict=True)
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    x = torch.randn(2, 5, 172, device=device).to(dtype).requires_grad_()
    y = layer(x)
    assert y.dtype == dtype
    exact = x.detach().float() @ dense_weight(layer.base_layer, torch.float32).t()
    a, b = (part["default"].weight for part in (layer.lora_A, layer.lora_B))
    exact += x.detach().float() @ a.t() @ b.t() * layer.scaling["default"]
    # In bf16: the matrix, and A and B, are rounded to 8 bits of mantissa, and so is the result.
    assert (y.float() - exact).norm() < (1e-6 if dtype == torch.float32 else 1e-2) * exact.norm()
    (gradient,) = torch.autograd.grad(y.float().sum(), x)
    assert gradient.dtype == dtype


def test_an_int8_layer_with_weights_of_16_bits_runs_stock():
    """Stock quantizes those anew at each call."""
    layer = bitsandbytes.nn.Linear8bitLt(8, 8, has_fp16_weights=True)
    assert not is_quantized(layer)
    assert "Linear8bitLt is not a linear layer that the engine knows" in str(why_not_fused(layer))


@pytest.mark.parametrize("fused", [True, False], ids=["kernel", "bitsandbytes"])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_dense_weights_are_those_that_peft_merges_with(kind, fused, quantized, batch_of, step, monkeypatch):
    if fused:
        monkeypatch.setattr(quantized_weights, "_kernels_on", lambda _: triton)
    model = quantized(kind, torch.float32)
    for forward in (False, True):
        if forward:
            # It moves an 8-bit layer's statistics.
            step(model, batch_of("right"))
        for module in filter(is_quantized, model.modules()):
            expected = peft.utils.integrations.dequantize_module_weight(module)
            assert torch.equal(dense_weight(module, torch.float32), expected)
            out = torch.empty_like(expected, dtype=torch.float16)
            assert dense_weight(module, torch.float16, out) is out
            assert torch.equal(out, expected.half())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_adapters_are_saved_and_merged_as_from_stock(kind, quantized, batch_of, step, folder, tmp_path):
    """Into the quantized weights, which are quantized anew, and into those of 16 bits."""
    model = quantized(kind, torch.float32)
    stock = copy.deepcopy(model)
    patch_model(model, backend="eager", strict=True)
    step(model, batch_of("right"))
    model.save_pretrained(tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged, expected = (m.merge_and_unload().state_dict() for m in (model, stock))
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    path = "model.layers.1.mlp.up_proj"
    assert not torch.equal(merged[f"{path}.weight"], before[f"base_model.model.{path}.base_layer.weight"])

    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    dense = base.get_submodule(path).weight.detach().float()
    adapted = peft.PeftModel.from_pretrained(base, tmp_path)
    delta = adapted.get_submodule(f"base_model.model.{path}").get_delta_weight("default")
    in_16_bits = adapted.merge_and_unload().get_submodule(path).weight
    assert in_16_bits.dtype == torch.bfloat16
    assert delta.norm() > 0.01 * dense.norm()
    # The delta is rounded to bf16 (8 bits of mantissa), and so is the sum.
    assert (in_16_bits.float() - dense - delta.float()).norm() < 2**-7 * dense.norm()


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_a_shape_that_was_made_quantized_trains_fused(kind, device, batch_of, step, shake):
    base = load_model(resolve_model("toy-qwen2"), dtype=torch.bfloat16, device=device.type, quantization=kind)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    shake(model)
    batch = batch_of("right")
    # As sessions train: the adapters' branch is then stock's in bf16 too.
    with torch.autocast(device.type, dtype=torch.bfloat16):
        _, stock = step(model.train(), batch)
        patch_model(model, backend="eager", strict=True)
        _, fused = step(model, batch)
    assert ledger_of(model).counts()["decoder_layer: fused (eager)"] == 3
    exact = exact_gradients(model, torch.bfloat16 if kind != "int8" else torch.float32, step, batch)
    assert 1e-4 < error(fused, exact) < 0.1
    assert error(fused, exact) <= 1.5 * error(stock, exact)
