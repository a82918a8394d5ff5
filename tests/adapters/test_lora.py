"""What PEFT can make of an adapter: each runs with stock's results, and the ledger says what is not fused and why."""

import functools
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from fastft import ledger_of, patch_model
from fastft.adapters.lora import read_linear, stand_in, why_not_alone, why_not_fused
from fastft.models.shapes import SHAPES
from peft_models import gradients_on, randomize_adapters

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOLERANCE = 5e-5 if torch.cuda.is_available() else 1e-5  # ‖g − stock‖ / ‖stock‖ in fp32


def make_base(device: torch.device) -> Any:
    config = SHAPES["toy-llama"].to_config()
    config.initializer_range = 0.1
    torch.manual_seed(1)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(device)


def make_model(device: torch.device, config: peft.PeftConfig | None = None, **lora: Any) -> Any:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": LINEARS, "task_type": "CAUSAL_LM", **lora}
    model = peft.get_peft_model(make_base(device), config or peft.LoraConfig(**settings))
    return randomize_adapters(model).train()


def make_batch(model: Any, rows: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids_BS = torch.randint(0, 512, (rows, 15), generator=generator)
    labels_BS = ids_BS.clone()
    labels_BS[:, :2] = -100
    mask_BS = torch.ones_like(ids_BS)
    mask_BS[1, 9:] = 0
    labels_BS[1, 9:] = -100
    batch = {"input_ids": ids_BS, "labels": labels_BS, "attention_mask": mask_BS}
    return {name: tensor.to(next(model.parameters()).device) for name, tensor in batch.items()}


def gradients_of(model: Any) -> tuple[float, dict[str, Tensor]]:
    return gradients_on(model, make_batch(model))


def assert_same(result: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]]) -> None:
    assert result[0] == pytest.approx(expected[0], rel=1e-5)
    assert result[1].keys() == expected[1].keys()
    assert expected[1]
    for name, gradient in expected[1].items():
        assert gradient.norm() > 0, name
        assert (result[1][name] - gradient).norm() < TOLERANCE * gradient.norm(), name


def logits_of(model: Any) -> Tensor:
    batch = make_batch(model)
    with torch.no_grad():
        logits: Tensor = model(input_ids=batch["input_ids"], use_cache=False).logits
    return logits


def reasons(model: Any) -> set[str]:
    """Why layers, norm, head and loss do not run fused; tests/engine/test_generic.py has the parts of a layer."""
    return {path.reason for path in ledger_of(model).fallbacks.values() if path.kind != "linear"}


def test_the_tensors_read_are_pefts_own(device):
    model = make_model(device, lora_dropout=0.25, use_rslora=True)
    module = model.get_base_model().model.layers[0].mlp.down_proj
    linear = read_linear(module)
    assert linear.a is module.lora_A["default"].weight
    assert linear.b is module.lora_B["default"].weight
    assert linear.weight(torch.float32) is module.base_layer.weight
    assert linear.scaling == pytest.approx(8 / 4**0.5)
    assert linear.dropout == 0.25
    assert linear.bias is None
    model.eval()
    assert read_linear(module).dropout == 0


def test_a_plain_linear_layer_has_no_adapter():
    linear = nn.Linear(3, 2).requires_grad_(False)
    assert why_not_fused(linear) is None
    read = read_linear(linear)
    assert read.a is read.b is None
    assert read.bias is linear.bias
    assert read.weight(torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("lora", "reason"),
    [
        ({"use_dora": True}, None),
        ({"use_dora": True, "lora_dropout": 0.1}, "its DoRA has dropout"),
        ({"lora_bias": True}, "its LoRA has a bias"),
        ({"bias": "lora_only"}, None),
        ({"modules_to_save": ["lm_head"]}, "the head is peft.utils.other.ModulesToSaveWrapper"),
        ({"target_modules": [*LINEARS, "lm_head"]}, "the head is peft.tuners.lora.layer.Linear"),
        ({"target_modules": [*LINEARS, "embed_tokens"]}, None),
        ({"init_lora_weights": "pissa"}, None),
        ({"modules_to_save": ["embed_tokens"]}, None),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*tie.*")
def test_kinds_of_lora(lora, reason, device):
    expected = gradients_of(make_model(device, **lora))
    model = make_model(device, **lora)
    patch_model(model, backend="eager", placement=["light", "mlp", "full"])
    assert_same(gradients_of(model), expected)
    if reason is None:
        assert not reasons(model)
    else:
        assert len(reasons(model)) > 0
        assert all(reason in each for each in reasons(model))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (peft.AdaLoraConfig(init_r=4, total_step=10, target_modules=LINEARS, task_type="CAUSAL_LM"), None),
        (peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"],
                        task_type="CAUSAL_LM"), "k_proj: Linear of PEFT's method ia3 is not LoRA"),
        (peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), None),
    ],
    ids=["adalora", "ia3", "prompt"],
)  # fmt: skip
def test_other_methods_of_peft(config, reason, device):
    """Their trained tensors are not what the engine knows, and none may be passed over."""

    def make() -> Any:
        torch.manual_seed(4)
        return make_model(device, config)

    expected = gradients_of(make())
    model = make()
    patch_model(model, backend="eager")
    assert_same(gradients_of(model), expected)
    assert reasons(model) == (set() if reason is None else {reason})


def _second(model: Any, seed: int = 8) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".second." in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


OTHER = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")


@pytest.mark.parametrize("active", ["default", "second", "both"])
def test_several_adapters(active, device):
    """The second, of another rank on fewer layers, comes after the patch."""
    results = []
    for patched in (False, True):
        model = make_model(device)
        if patched:
            patch_model(model, backend="eager", placement="mlp")
        model.add_adapter("second", OTHER)
        _second(model)
        if active == "both":
            model.base_model.set_adapter(["default", "second"])
        else:
            model.set_adapter(active)
        results.append(gradients_of(model))
    assert_same(results[1], results[0])
    if active == "both":
        assert reasons(model) == {"q_proj: 2 adapters are active at once"}
    else:
        assert not reasons(model)
        assert all(f".{active}." in name for name in results[1][1])


def test_disabled_adapters(device):
    stock, model = make_model(device), make_model(device)
    patch_model(model, backend="eager")
    with stock.disable_adapter(), model.disable_adapter():
        expected = logits_of(stock)
        torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-5)
        batch = make_batch(model)
        assert not model(**batch).loss.requires_grad
    assert (logits_of(model) - expected).abs().max() > 0.01, "the adapter does something"
    assert_same(gradients_of(model), gradients_of(stock))


def test_a_merged_adapter_and_a_merged_one_that_is_disabled(device):
    stock, model = make_model(device), make_model(device)
    patch_model(model, backend="eager")
    expected = logits_of(stock)
    for each in (stock, model):
        each.merge_adapter()
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-4)
    assert not reasons(model)
    linear = model.get_base_model().model.layers[0].self_attn.q_proj
    assert why_not_fused(linear) is None
    with stock.disable_adapter(), model.disable_adapter():
        assert why_not_fused(linear) == "its adapter is merged and disabled"
        # Stock unmerges here; reading the merged weight instead would leave the adapter in.
        torch.testing.assert_close(logits_of(model), logits_of(stock), rtol=1e-4, atol=1e-4)
    for each in (stock, model):
        each.merge_adapter()
        each.unmerge_adapter()
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-4)


def test_merging_for_good_gives_the_adapters_logits(device):
    model = make_model(device)
    patch_model(model, backend="eager")
    expected = logits_of(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-4, atol=1e-4)
    again = peft.get_peft_model(merged, OTHER)
    patch_model(again, backend="eager")
    randomize_adapters(again)
    assert gradients_of(again)[1]
    assert not reasons(again)


def test_an_adapter_saved_from_a_patched_model_loads_in_stock_peft(device, tmp_path: Path):
    model = make_model(device)
    patch_model(model, backend="eager")
    _, gradients = gradients_of(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in gradients:
                parameter.sub_(0.1 * gradients[name])
    expected = logits_of(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make_base(device), tmp_path)
    assert ledger_of(loaded) is None
    torch.testing.assert_close(logits_of(loaded), expected, rtol=1e-4, atol=1e-5)
    saved = sorted(file.name for file in tmp_path.iterdir())
    assert "adapter_model.safetensors" in saved


def test_an_adapter_loaded_into_a_patched_model_is_used(device, tmp_path: Path):
    other = make_model(device)
    randomize_adapters(other, 77)
    other.save_pretrained(tmp_path)
    model = make_model(device)
    patch_model(model, backend="eager")
    model.load_adapter(str(tmp_path), adapter_name="loaded")
    model.set_adapter("loaded")
    torch.testing.assert_close(logits_of(model), logits_of(other), rtol=1e-4, atol=1e-5)


def _transposed(module: Any) -> None:
    module.fan_in_fan_out = True


def _hooked(module: Any) -> None:
    module.lora_A["default"].register_forward_hook(lambda *_: None)


def _replaced(module: Any) -> None:
    module.base_layer.forward = module.base_layer.forward


def _other(module: Any) -> None:
    module.base_layer = nn.Conv1d(64, 64, 1)


def _nested(module: Any) -> None:
    module.base_layer = type(module)(module.base_layer, "inner", peft.LoraConfig(), r=2)


def _transposed_and_trained(module: Any) -> None:
    module.base_layer = transformers.pytorch_utils.Conv1D(64, 64)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_transposed, "its weight is stored transposed"),
        (_hooked, "its adapter: it has hooks"),
        (_replaced, "its base layer: its forward was replaced"),
        (_other, "Conv1d is not a linear layer that the engine knows"),
        (_nested, "two adapter layers are nested"),
        (_transposed_and_trained, "its base weight is trained"),
    ],
)
def test_reasons(change: Callable[[Any], None], reason: str, device):
    module = make_model(device).get_base_model().model.layers[0].self_attn.q_proj
    assert why_not_fused(module) is None
    change(module)
    assert why_not_fused(module) == reason


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)  # fmt: skip
def test_every_kind_of_hook_is_called(register: str, device):
    module = make_model(device).get_base_model().model.layers[0].self_attn.q_proj
    assert why_not_fused(module) is None
    hook = getattr(module.base_layer, register)(lambda *_: None)
    assert why_not_fused(module) == "its base layer: it has hooks"
    hook.remove()
    assert why_not_fused(module) is None


def test_a_dense_copy_is_used_in_its_own_dtype_only(device):
    linear = nn.Linear(5, 3, device=device)
    dense = torch.zeros(3, 5, dtype=torch.bfloat16, device=device)
    read = read_linear(linear)._replace(dense=dense)
    assert read.weight(torch.bfloat16) is dense
    assert torch.equal(read.weight(torch.float32), linear.weight)


def test_what_a_layer_cannot_take_may_be_computed_alone(device):
    module = make_model(device, lora_bias=True).get_base_model().model.layers[0].self_attn.q_proj
    assert why_not_alone(module) is None
    assert why_not_fused(module) == "its LoRA has a bias"
    plain = make_model(device).get_base_model().model.layers[0].self_attn.q_proj
    plain.register_forward_hook(lambda *_: None)
    assert why_not_alone(plain) is None
    assert why_not_fused(plain) == "it has hooks"


def test_only_the_engines_own_forwards_may_be_passed_over(device):
    """A wrapper may look like what it wraps, down to its attributes."""
    module = make_model(device).get_base_model().model.layers[0].self_attn.q_proj

    @stand_in
    def own(self: nn.Module, x: Tensor) -> Tensor:
        return x

    @functools.wraps(own)
    def wrapper(self: nn.Module, x: Tensor) -> Tensor:
        return own(self, x)

    module.forward = MethodType(own, module)
    assert why_not_fused(module) is None
    module.forward = MethodType(wrapper, module)
    assert why_not_fused(module) == "its forward was replaced"
    module.forward = functools.partial(own, module)
    assert why_not_fused(module) == "its forward was replaced"
