"""fp32 weights, or fp32 norms over 16-bit ones, under autocast: 16-bit products on an fp32 residual stream."""

from collections.abc import Callable
from typing import Any, NamedTuple

import peft
import pytest
import torch
from torch import Tensor

from fastft import ledger_of, patch_model
from fastft.models.shapes import SHAPES
from fastft.models.spec import SPECS
from peft_models import on_device

TOYS = {shape.family: name for name, shape in SHAPES.items() if name.startswith("toy")}
MIXED = ["keep", "mlp", "full"]
"""The policies of three layers."""
CLOSER = 1.5
"""Both round as often, at other places; stock's error is a draw of the same chance."""


class Compared(NamedTuple):
    exact: Tensor
    """Without autocast."""
    stock: Tensor
    fused: Tensor
    ledger: dict[str, str]
    """By module's name: why it ran stock."""

    def error(self, of: Tensor) -> float:
        return float((of - self.exact).norm() / self.exact.norm())


Compare = Callable[..., Compared]


def flat(model: Any) -> Tensor:
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


@pytest.fixture
def compare() -> Compare:
    """Gradients of a batch: without autocast, of stock under it, and patched under it."""

    def run(
        model: Any, batch: dict[str, Tensor], dtype: torch.dtype = torch.bfloat16, scale: float = 1.0, **more: Any
    ) -> Compared:
        batch, device = on_device(model, batch), next(model.parameters()).device.type

        def gradients(*, autocast: bool) -> Tensor:
            model.zero_grad()
            torch.manual_seed(4)
            with torch.autocast(device, dtype, enabled=autocast):
                loss = model(**batch).loss
            (scale * loss).backward()
            return flat(model) / scale

        exact, stock = gradients(autocast=False), gradients(autocast=True)
        patch_model(model, **{"backend": "eager", "placement": MIXED, **more})
        fused = gradients(autocast=True)
        return Compared(exact, stock, fused, {name: path.reason for name, path in ledger_of(model).fallbacks.items()})

    return run


def assert_close(compared: Compared) -> None:
    assert not compared.ledger
    assert compared.error(compared.stock) > 1e-4
    assert 1e-4 < compared.error(compared.fused) <= CLOSER * compared.error(compared.stock)


def of_family(toy: Any, family: str, **lora: Any) -> Any:
    attention = "eager" if SPECS[family].softcap else "sdpa"
    return toy(
        TOYS[family], base={"attn_implementation": attention}, target_modules=list(SPECS[family].targets), **lora
    )


@pytest.mark.parametrize("form", ["right", "left", "packed"])
@pytest.mark.parametrize("family", SPECS)
def test_layers_run_fused_and_err_no_more_than_stock(family, form, toy, batch_of, compare):
    assert_close(compare(of_family(toy, family), batch_of(form)))


@pytest.mark.parametrize("policy", ["light", "offload", "offload_mlp"])
def test_other_placements(policy, toy, batch_of, compare):
    assert_close(compare(toy(), batch_of("right"), placement=policy))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3", "falcon"])
def test_the_kernels_of_triton(family, toy, batch_of, compare):
    assert_close(compare(of_family(toy, family), batch_of("right", B=2, S=9), backend="triton"))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "falcon"])
def test_in_tiles(family, toy, batch_of, compare, monkeypatch):
    monkeypatch.setattr("fastft.engine.tiles.TILE_STEP", 4)
    assert_close(compare(of_family(toy, family), batch_of("right"), mlp_chunk_tokens=8))


def test_fp16_under_a_loss_scale(toy, batch_of, compare):
    assert_close(compare(toy(), batch_of("right"), torch.float16, 256.0))


def test_layers_in_stocks_own_loop(toy, batch_of, compare):
    model = toy()
    causal, seen = model.get_base_model(), []
    causal.config.use_cache = False
    causal.model.layers[1].register_forward_hook(lambda _, given, output: seen.append((given[0].dtype, output.dtype)))
    assert_close(compare(model, batch_of("right")))
    assert seen == 3 * [(torch.float32, torch.float32)]


def test_norms_and_embeddings_in_fp32_over_narrow_weights(toy, batch_of, compare):
    model = toy(base={"dtype": torch.bfloat16})
    for name, parameter in model.named_parameters():
        if "norm" in name or "embed" in name:
            parameter.data = parameter.data.float()
    device, batch = next(model.parameters()).device.type, batch_of("right")
    with pytest.raises(RuntimeError, match="dtype"):  # as in stock: fp32 activations meet bf16 weights
        model(**on_device(model, batch))
    with torch.autocast(device, torch.bfloat16):
        stock = model(**on_device(model, batch)).loss
        stock.backward()
        expected = flat(model)
        model.zero_grad()
        patch_model(model, backend="eager", strict=True)
        loss = model(**on_device(model, batch)).loss
    loss.backward()
    assert loss.item() == pytest.approx(stock.item(), rel=1e-3)
    assert (flat(model) - expected).norm() < 0.05 * expected.norm()


@pytest.fixture
def resident(toy: Any, batch_of: Any) -> tuple[Any, Callable[..., Tensor]]:
    """A model whose first two layers keep their weights in 16 bits beside fp32, and what gives a batch's gradients."""
    model = toy()
    patch_model(model, backend="eager", resident_layers=2)
    batch = on_device(model, batch_of("right"))

    def gradients(*, autocast: bool = True) -> Tensor:
        model.zero_grad()
        with torch.autocast(next(model.parameters()).device.type, torch.bfloat16, enabled=autocast):
            loss = model(**batch).loss
        loss.backward()
        return flat(model)

    return model, gradients


def narrow_copies(model: Any) -> set[str]:
    """Layers whose parts hold weights in 16 bits."""
    causal = model.get_base_model()
    parts = causal.__dict__["_fastft_read"].layers.parts
    return {f"layers.{i}" for i, part in enumerate(parts) if part.down.dense is not None}


def test_copies_made_once_change_no_bit(resident, toy, batch_of, compare):
    model, gradients = resident
    copied = gradients()
    assert narrow_copies(model) == {"layers.0", "layers.1"}
    patch_model(model, backend="eager")
    assert torch.equal(gradients(), copied)
    assert not narrow_copies(model)


def test_without_autocast_there_are_no_copies(resident):
    model, gradients = resident
    exact = gradients(autocast=False)
    assert not narrow_copies(model)
    assert not torch.equal(gradients(), exact)
    assert torch.equal(gradients(autocast=False), exact)


def halve(model: Any) -> None:
    with torch.no_grad():
        model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight.mul_(0.5)


def another(model: Any) -> None:
    linear = model.get_base_model().model.layers[0].mlp.up_proj.base_layer
    linear.weight = torch.nn.Parameter(0.5 * linear.weight.detach(), requires_grad=False)


def merge_another(model: Any) -> None:
    """Through `.data`, as PEFT merges; then the first adapter is what is trained again."""
    model.add_adapter("other", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if "other" in name:
            torch.nn.init.constant_(parameter, 0.1)
    model.merge_adapter(["other"])
    model.unmerge_adapter()
    model.merge_adapter(["other"])
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.merged_adapters.clear()
    model.set_adapter("default")


@pytest.mark.parametrize("change", [halve, another, merge_another])
def test_copies_follow_their_weights(change, resident):
    model, gradients = resident
    before = gradients()
    change(model)
    after = gradients()
    assert not torch.equal(after, before)
    patch_model(model, backend="eager")
    assert torch.equal(gradients(), after)


def test_the_weights_that_are_saved_and_merged_are_untouched(resident, tmp_path):
    model, gradients = resident
    weights = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    gradients()
    for name, parameter in model.named_parameters():
        if name in weights:
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, weights[name])
    assert model.merge_and_unload().model.layers[0].mlp.up_proj.weight.dtype == torch.float32
