"""DoRA on the fused path against stock PEFT: gradients, precision, what stays stock and why."""

# B rows, S tokens a row

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

from fastft import ledger_of, patch_model
from fastft.engine.bank import bank_of
from fastft.models.loading import quantization_config
from fastft.models.shapes import SHAPES
from fastft.plan import POLICIES
from peft_models import randomize_adapters

TOLERANCE = 5e-5 if torch.cuda.is_available() else 1e-5  # ‖g − stock‖ / ‖stock‖ in fp32


@pytest.fixture
def dora(toy: Any) -> Any:
    """A stock model with B ≠ 0, whose magnitudes are not the norms."""

    def make(family: str = "toy-llama", **more: Any) -> Any:
        return shaken(toy(family, **{"use_dora": True, **more}))

    return make


def shaken(model: Any) -> Any:
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_((1 + 0.3 * torch.randn(parameter.shape, generator=generator)).to(parameter.device))
    return model


def assert_all_fused(model: Any) -> None:
    ledger = ledger_of(model)
    assert ledger is not None
    assert not ledger.fallbacks
    assert any(line.startswith("decoder_layer: fused") for line in ledger.counts())


def errors(stock: Any, fused: Any, exact: Any) -> tuple[float, float]:
    """Of all gradients at once."""
    flat = [torch.cat([g[name].flatten().double() for name in exact]) for g in (stock, fused, exact)]
    first, second = (float((g - flat[2]).norm() / flat[2].norm()) for g in flat[:2])
    return first, second


def logits(model: Any, batch: Any) -> Tensor:
    device = next(model.parameters()).device
    with torch.no_grad():
        given: Tensor = model(input_ids=batch["input_ids"].to(device)).logits
    return given


@pytest.mark.parametrize("form", ["right", "packed"])
@pytest.mark.parametrize("placement", POLICIES)
def test_gradients_equal_stock(placement, form, dora, batch_of, step, error_of):
    batch = batch_of(form)
    model = dora("toy-qwen2")
    loss, gradients = step(model, batch)
    assert sum("magnitude" in name for name in gradients) == 3 * 7
    patch_model(model, backend="eager", placement=placement, strict=True)
    fused_loss, fused = step(model, batch, 2)
    assert fused_loss == pytest.approx(loss, rel=1e-5)
    assert error_of(fused, gradients) < TOLERANCE
    assert_all_fused(model)
    bank = bank_of(model.get_base_model().model.layers[0].self_attn.q_proj.lora_magnitude_vector["default"].weight)
    assert bank is not None
    assert bank.gradients_in_one() is not None


@pytest.mark.parametrize("placement", ["keep", "light", "mlp", "full"])
@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize(
    "change",
    [
        {"rank_pattern": {"q_proj": 1, "k_proj": 256, "v_proj": 3, "gate_proj": 9, "down_proj": 17}},
        {"target_modules": ["v_proj", "down_proj"], "use_rslora": True},
        {"target_modules": ["k_proj", "up_proj"]},
        {"target_modules": ["o_proj", "q_proj"], "base": {"attention_bias": True, "mlp_bias": True}},
    ],
    ids=["ranks", "v and down", "k and up", "o and q, biased"],
)
def test_ranks_targets_and_biases(change, backend, placement, dora, batch_of, step, error_of):
    batch = batch_of("left", B=2, S=13)
    model = dora(**change)
    loss, gradients = step(model, batch)
    patch_model(model, backend=backend, placement=placement, strict=True)
    fused_loss, fused = step(model, batch)
    assert fused_loss == pytest.approx(loss, rel=1e-5)
    assert error_of(fused, gradients) < (5 if backend == "triton" else 1) * TOLERANCE
    assert_all_fused(model)


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("placement", ["light", "full"])
@pytest.mark.parametrize("family", ["gemma2", "qwen3", "phi3", "granite", "falcon", "smollm3"])
def test_every_kind_of_layer(family, placement, backend, device, batch_of, step, error_of):
    """Packed linears, norms of heads and behind branches, multipliers, no gate, layers without positions."""
    from situations.models import ADAPTERS, make_base

    torch.manual_seed(3)
    base = make_base(family, "plain", "eager" if family == "gemma2" else "sdpa", "causal", torch.float32, 1, spread=0.1)
    model = shaken(ADAPTERS["dora"](base.to(device))).train()
    batch = batch_of("right", B=2, S=11)
    batch = {name: value % 97 if name == "input_ids" else value for name, value in batch.items()}
    batch["labels"] = torch.where(batch["labels"] >= 0, batch["input_ids"], -100)
    loss, gradients = step(model, batch)
    patch_model(model, backend=backend, placement=placement, strict=True)
    fused_loss, fused = step(model, batch)
    assert fused_loss == pytest.approx(loss, rel=1e-5)
    assert error_of(fused, gradients) < (5 if backend == "triton" else 2) * TOLERANCE
    assert_all_fused(model)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_a_tiled_mlp(backend, dora, batch_of, step, error_of):
    batch = batch_of("none", B=3, S=101)
    model = dora()
    _, gradients = step(model, batch)
    patch_model(model, backend=backend, placement=["mlp", "full", "mlp"], mlp_chunk_tokens=64, strict=True)
    assert error_of(step(model, batch)[1], gradients) < 2 * TOLERANCE


def test_a_rotation_that_scales(dora, batch_of, step, error_of):
    """YaRN's: the projections are not what is rotated back."""
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
    batch = batch_of("right")
    for placement in ("light", "full"):
        model = dora(base={"rope_parameters": rope})
        assert model.get_base_model().model.rotary_emb.attention_scaling > 1.1
        _, gradients = step(model, batch)
        patch_model(model, backend="eager", placement=placement, strict=True)
        assert error_of(step(model, batch)[1], gradients) < TOLERANCE


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_gradient_checkpointing(reentrant, dora, batch_of, step, error_of):
    model, batch = dora(), batch_of("right")
    if reentrant is not None:
        model.enable_input_require_grads()
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    _, gradients = step(model, batch)
    patch_model(model, backend="eager", strict=True)
    assert error_of(step(model, batch)[1], gradients) < TOLERANCE


def test_beside_plain_lora_and_with_frozen_magnitudes(toy, batch_of, step, error_of):
    def make() -> Any:
        model = toy(target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"])
        config = peft.LoraConfig(r=4, use_dora=True, target_modules=r".*\.1\.mlp\.gate_proj")
        peft.inject_adapter_in_model(config, model.get_base_model())
        return shaken(randomize_adapters(model))

    stock, model, batch = make(), make(), batch_of("right")
    patch_model(model, backend="eager", strict=True)
    assert error_of(step(model, batch)[1], step(stock, batch)[1]) < TOLERANCE
    assert_all_fused(model)
    for each in (stock, model):
        for name, parameter in each.named_parameters():
            if "magnitude" in name:
                parameter.requires_grad_(False)
    _, gradients = step(model, batch)
    assert not any("magnitude" in name for name in gradients)
    assert error_of(gradients, step(stock, batch)[1]) < TOLERANCE


@pytest.mark.parametrize("kind", ["bf16", "bf16 adapters", "autocast"])
def test_16_bits_err_no_more_than_stock(kind, dora, toy_base, batch_of, step):
    batch = batch_of("right", B=3, S=63)
    model = dora(base={"dtype": torch.float32 if kind == "autocast" else torch.bfloat16})
    if kind == "bf16 adapters":
        model = model.to(torch.bfloat16)
    _, exact = step(copy.deepcopy(model).double(), batch)
    with torch.autocast(next(model.parameters()).device.type, dtype=torch.bfloat16, enabled=kind == "autocast"):
        _, stock = step(model, batch)
        patch_model(model, backend="eager", placement=["light", "mlp", "full"], strict=True)
        _, fused = step(model, batch)
    assert_all_fused(model)
    for part in ("lora_A", "lora_B", "magnitude", ""):
        of_stock, of_fused = errors(stock, fused, {name: g for name, g in exact.items() if part in name})
        assert 1e-4 < of_stock < 0.1
        assert of_fused <= 1.5 * of_stock, part


@pytest.mark.parametrize("placement", ["keep", "full"])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantized_weights(quantization, placement, device, tmp_path, batch_of, step, error_of):
    pytest.importorskip("bitsandbytes")
    config = SHAPES["toy-llama"].to_config()
    config.initializer_range = 0.1
    torch.manual_seed(1)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    try:
        base = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype=torch.float32, device_map={"": str(device)},
            quantization_config=quantization_config(quantization, torch.float32),
        )  # fmt: skip
    except (RuntimeError, ImportError, NotImplementedError) as error:
        pytest.skip(f"bitsandbytes cannot quantize here: {error}")
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=True)
    model = shaken(randomize_adapters(peft.get_peft_model(base, lora))).train()
    batch = batch_of("right")
    loss, gradients = step(model, batch)
    patch_model(model, backend="eager", placement=placement, strict=True, resident_layers=1)
    fused_loss, fused = step(model, batch)
    assert_all_fused(model)
    if quantization == "nf4":
        assert fused_loss == pytest.approx(loss, rel=1e-5)
        assert error_of(fused, gradients) < TOLERANCE
    else:  # stock rounds its activations to 8 bits, too
        assert fused_loss == pytest.approx(loss, rel=2e-2)


@pytest.mark.parametrize("bias", [False, True])
def test_single_linears(bias, dora, batch_of, step, error_of):
    """A hook in a layer: its linears run fused one by one."""
    model, batch = dora(base={"attention_bias": bias, "mlp_bias": bias}), batch_of("right")
    loss, gradients = step(model, batch)
    model.get_base_model().model.layers[1].self_attn.register_forward_hook(lambda *_: None)
    patch_model(model, backend="eager")
    fused_loss, fused = step(model, batch)
    assert fused_loss == pytest.approx(loss, rel=1e-5)
    assert error_of(fused, gradients) < TOLERANCE
    assert ledger_of(model).counts()["linear: fused (eager)"] == 7


def test_an_output_that_is_changed_in_place(dora, batch_of, step, error_of):
    def halve(model: Any) -> None:
        module = model.get_base_model().model.layers[1].mlp.up_proj
        module.register_forward_hook(lambda _, __, output: output.mul_(0.5))

    stock, model, batch = dora(), dora(), batch_of("right")
    halve(stock)
    halve(model)
    patch_model(model, backend="eager")
    assert error_of(step(model, batch)[1], step(stock, batch)[1]) < TOLERANCE
    assert ledger_of(model).paths["layers.1.mlp.up_proj"].path == "fused (eager)"


def test_a_magnitude_of_zero(dora, batch_of, step, error_of):
    stock, model, batch = dora(), dora(), batch_of("right")
    for each in (stock, model):
        with torch.no_grad():
            for module in each.get_base_model().model.layers[1].mlp.children():
                if hasattr(module, "lora_magnitude_vector"):
                    module.lora_magnitude_vector["default"].weight[::3] = 0.0
    patch_model(model, backend="eager", strict=True)
    assert error_of(step(model, batch)[1], step(stock, batch)[1]) < TOLERANCE


def test_eval_merged_disabled_and_without_gradients(dora, batch_of, step, error_of):
    stock, model, batch = dora(), dora(), batch_of("right")
    patch_model(model, backend="eager", strict=True)
    with stock.disable_adapter(), model.disable_adapter():
        torch.testing.assert_close(logits(model, batch), logits(stock, batch))
    for each in (stock, model):
        each.merge_adapter()
    torch.testing.assert_close(logits(model, batch), logits(stock, batch), rtol=1e-4, atol=1e-4)
    for each in (stock, model):
        each.unmerge_adapter()
        each.eval()
    torch.testing.assert_close(logits(model, batch), logits(stock, batch), rtol=1e-4, atol=1e-4)
    assert error_of(step(model, batch)[1], step(stock, batch)[1]) < TOLERANCE


def test_a_weight_that_changes_in_a_way_that_pytorch_does_not_count(dora, batch_of, step, error_of):
    """The norms are of the weights as they are in this forward."""
    stock, model, batch = dora(), dora(), batch_of("right")
    patch_model(model, backend="eager", strict=True)
    step(model, batch)
    for each in (stock, model):
        each.get_base_model().model.layers[1].self_attn.v_proj.base_layer.weight.data.mul_(1.5)
    assert error_of(step(model, batch)[1], step(stock, batch)[1]) < TOLERANCE


def test_several_adapters(dora, batch_of, step, error_of):
    batch, results = batch_of("right"), []
    for patched in (False, True):
        model = dora()
        if patched:
            patch_model(model, backend="eager")
        other = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], use_dora=True)
        model.add_adapter("second", other)
        randomize_adapters(model)
        results.append(step(model, batch)[1])
        model.set_adapter("second")
        results.append(step(model, batch)[1])
    assert error_of(results[2], results[0]) < TOLERANCE
    assert error_of(results[3], results[1]) < TOLERANCE
    assert_all_fused(model)


def _caching(model: Any, monkeypatch: Any) -> str:
    monkeypatch.setattr("peft.tuners.lora.dora.ENABLE_DORA_CACHING", True)
    return "q_proj: its adapter: PEFT keeps DoRA's norms (DoraCaching)"


def _hooked(model: Any, monkeypatch: Any) -> str:
    module = model.get_base_model().model.layers[0].self_attn.q_proj.lora_magnitude_vector["default"]
    module.register_forward_hook(lambda *_: None)
    return "q_proj: its adapter: it has hooks"


def _another_forward(model: Any, monkeypatch: Any) -> str:
    from peft.tuners.lora.variants import DoraLinearVariant

    original = DoraLinearVariant.forward
    monkeypatch.setattr(DoraLinearVariant, "forward", staticmethod(lambda *a, **k: 0.5 * original(*a, **k)))
    return "q_proj: its adapter: its DoRA has another forward than PEFT's"


@pytest.mark.parametrize("change", [_caching, _hooked, _another_forward])
def test_what_changes_after_a_step_is_noticed(change, dora, batch_of, step, error_of, monkeypatch):
    stock, model, batch = dora(), dora(), batch_of("right")
    patch_model(model, backend="eager")
    step(model, batch)
    assert_all_fused(model)
    change(stock, monkeypatch)
    reason = change(model, monkeypatch)
    assert error_of(step(model, batch)[1], step(stock, batch)[1]) < TOLERANCE
    assert ledger_of(model).paths["layers.0"].reason == reason


def test_with_dropout_it_stays_stock(dora, batch_of, step, error_of):
    """PEFT drops the input of the frozen matrix too, where DoRA has dropout; in evaluation nothing is dropped."""
    stock, model, batch = dora(lora_dropout=0.3), dora(lora_dropout=0.3), batch_of("right")
    patch_model(model, backend="eager")
    results = []
    for each in (stock, model):
        torch.manual_seed(6)
        results.append(step(each, batch))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    assert error_of(results[1][1], results[0][1]) < TOLERANCE
    assert ledger_of(model).paths["layers.2"].reason == "q_proj: its adapter: its DoRA has dropout"
    model.eval()
    step(model, batch)
    assert_all_fused(model)


def test_a_bias_in_b_stays_stock(toy, batch_of, step, error_of):
    """PEFT has no such configuration, but would compute it."""

    def make() -> Any:
        model = shaken(toy(use_dora=True))
        for name, module in model.named_modules():
            if name.endswith("lora_B.default"):
                module.bias = torch.nn.Parameter(torch.full((module.out_features,), 0.1, device=module.weight.device))
        return model

    stock, model, batch = make(), make(), batch_of("right")
    patch_model(model, backend="eager")
    assert error_of(step(model, batch)[1], step(stock, batch)[1]) < TOLERANCE
    assert ledger_of(model).paths["layers.0"].reason == "q_proj: its adapter: its DoRA has a bias in A or B"


def test_training_gives_stocks_losses(dora, batch_of):
    losses = []
    for patched in (False, True):
        model = dora()
        if patched:
            patch_model(model, backend="eager", strict=True)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        device = next(model.parameters()).device
        of_model = []
        for index in range(40):
            batch = {name: value.to(device) for name, value in batch_of("right", B=2, S=11, seed=index % 5).items()}
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            of_model.append(loss.item())
        losses.append(of_model)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[1][-1] < 0.95 * losses[1][0]


def test_saved_from_a_patched_model_it_loads_in_stock_peft(dora, toy_base, batch_of, tmp_path: Path):
    model, batch = dora(), batch_of("none")
    patch_model(model, backend="eager", strict=True)
    values = logits(model, batch)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(toy_base(), tmp_path)
    torch.testing.assert_close(logits(loaded, batch), values, rtol=1e-4, atol=1e-5)
