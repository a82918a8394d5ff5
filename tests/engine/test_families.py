"""Every family of models against stock PEFT: losses, gradients, placements, forms of batches."""

# B rows, S tokens a row, D model

import copy
import dataclasses
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

from fastft import ledger_of, patch_model, unpatch_model
from fastft.backends import load_backend
from fastft.engine.layer import backward_layer, forward_layer
from fastft.engine.parts import LayerCall, StepContext, read_parts
from fastft.engine.saved import SAVED
from fastft.kernels.attention.library import Seen, choose_attention
from fastft.models.shapes import SHAPES
from fastft.models.spec import SPECS

TOYS = {shape.family: name for name, shape in SHAPES.items() if name.startswith("toy")}
TOLERANCE = 5e-5 if torch.cuda.is_available() else 1e-5  # ‖g − stock‖ / ‖stock‖ in fp32
PLACEMENTS: dict[str, Any] = {
    "keep": "keep",
    "light": "light",
    "mlp": "mlp",
    "full": "full",
    "mixed": ["full", "keep", "mlp"],
}
FORMS = ("none", "right", "left", "packed")
TABLE = Path(__file__).resolve().parents[2] / "docs" / "families.md"

_stock: dict[tuple[str, str], tuple[float, dict[str, Tensor]]] = {}


def make(toy: Any, family: str, **more: Any) -> Any:
    """The family's toy with adapters on all its linears.  Soft-capped scores exist in stock's eager attention only."""
    base = {"attn_implementation": "eager" if SPECS[family].softcap else "sdpa", **more.pop("base", {})}
    return toy(TOYS[family], base=base, **{"target_modules": list(SPECS[family].targets), **more})


def assert_all_fused(model: Any) -> None:
    ledger = ledger_of(model)
    assert ledger is not None
    assert not ledger.fallbacks
    assert [path.kind for path in ledger.paths.values()].count("decoder_layer") == 3


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradients[name].flatten().double() for name in sorted(gradients)])


def test_every_family_has_a_toy():
    assert set(TOYS) == set(SPECS)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", SPECS)
def test_gradients_equal_stock(family, form, placement, toy, batch_of, step, error_of):
    batch = batch_of(form)
    model = make(toy, family)
    if (family, form) not in _stock:
        _stock[family, form] = step(model, batch)
    loss, gradients = _stock[family, form]
    assert len(gradients) == 3 * 2 * len(SPECS[family].targets)
    patch_model(model, backend="eager", placement=PLACEMENTS[placement], loss_chunk_tokens=13)
    for rows in (4, 3):
        fused_loss, fused_gradients = step(model, batch, rows)
        assert fused_loss == pytest.approx(loss, rel=1e-5)
        assert error_of(fused_gradients, gradients) < TOLERANCE
    assert_all_fused(model)


@pytest.mark.parametrize(("family", "form"), [*((family, "right") for family in SPECS), ("qwen2", "packed")])
def test_gradients_of_the_triton_backend_equal_stock(family, form, toy, batch_of, step, error_of):
    batch = batch_of(form, B=2, S=9)
    model = make(toy, family)
    loss, gradients = step(model, batch)
    patch_model(model, backend="triton", placement=["light", "mlp", "full"], loss_chunk_tokens=5)
    fused_loss, fused_gradients = step(model, batch)
    assert fused_loss == pytest.approx(loss, rel=1e-5)
    assert error_of(fused_gradients, gradients) < TOLERANCE
    assert ledger_of(model).counts()["decoder_layer: fused (triton)"] == 3


@pytest.mark.parametrize("form", ["none", "left"])
@pytest.mark.parametrize("policy", ["keep", "full"])
@pytest.mark.parametrize("family", SPECS)
def test_bf16_errs_no_more_than_stock(family, policy, form, toy, batch_of, step):
    """Over all adapters together, against fp32 on the same (bf16) weights: one tensor's ratio is mostly chance."""
    batch = batch_of(form)
    model = make(toy, family, base={"dtype": torch.bfloat16})
    _, stock = step(model, batch)
    _, exact = step(copy.deepcopy(model).float(), batch)
    patch_model(model, backend="eager", placement=policy)
    _, fused = step(model, batch)
    assert_all_fused(model)
    errors = [float((flat(g) - flat(exact)).norm() / flat(exact).norm()) for g in (stock, fused)]
    assert errors[0] > 1e-4, "stock is exact, so this compares nothing"
    assert errors[1] <= 1.5 * errors[0]


@pytest.mark.parametrize("policy", ["light", "mlp", "full"])
@pytest.mark.parametrize("family", SPECS)
def test_recomputation_is_exact_and_repeats_the_dropout(family, policy, toy, batch_of, step):
    """Bit by bit where the backward only makes again what the forward made."""
    batch = batch_of("right")
    results = []
    for placement in ("keep", policy):
        model = make(toy, family, lora_dropout=0.4)
        patch_model(model, backend="eager", placement=placement)
        torch.manual_seed(7)
        results.append(step(model, batch))
    (loss, gradients), (other_loss, other) = results
    assert other_loss == loss
    for name, gradient in gradients.items():
        assert torch.equal(other[name], gradient), name


@pytest.mark.parametrize("family", SPECS)
def test_logits_and_evaluation_equal_stock(family, toy, batch_of):
    model = make(toy, family).eval()
    ids_BS = batch_of("none")["input_ids"].to(next(model.parameters()).device)
    with torch.no_grad():
        expected = model(input_ids=ids_BS, use_cache=False).logits
        patch_model(model, backend="eager", strict=True)
        torch.testing.assert_close(model(input_ids=ids_BS, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)
    model.train()
    deferred = model(input_ids=ids_BS, labels=ids_BS, use_cache=False).logits
    torch.testing.assert_close(deferred.detach(), expected, rtol=1e-5, atol=1e-5)
    unpatch_model(model)
    with torch.no_grad():
        again = model(input_ids=ids_BS, use_cache=False).logits
    torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", SPECS)
@pytest.mark.parametrize("targets", ["first", "last", "o"])
def test_some_targets(family, targets, toy, batch_of, step, error_of):
    spec = SPECS[family]
    name = {"first": spec.targets[0], "last": spec.targets[-1], "o": spec.o.rpartition(".")[2]}[targets]
    batch = batch_of("left")
    model = make(toy, family, target_modules=[name])
    _, gradients = step(model, batch)
    patch_model(model, backend="eager", placement=["light", "mlp", "full"], strict=True)
    _, fused = step(model, batch)
    assert error_of(fused, gradients) < TOLERANCE


# What a toy is about must change its gradients, or the comparisons above would not see it missing.
WITHOUT: list[tuple[str, dict[str, Any]]] = [
    ("mistral", {"sliding_window": None}),
    ("gemma2", {"sliding_window": 100}),
    ("gemma2", {"attn_logit_softcapping": None}),
    ("gemma2", {"final_logit_softcapping": None}),
    ("gemma2", {"query_pre_attn_scalar": 24}),
    ("gemma3_text", {"sliding_window": 100}),
    ("gemma3_text", {"layer_types": ["full_attention"] * 3}),
    ("granite", {"residual_multiplier": 1.0}),
    ("granite", {"logits_scaling": 1.0}),
    ("granite", {"attention_multiplier": 0.25}),
    ("granite", {"embedding_multiplier": 1.0}),
    ("phi3", {"sliding_window": None}),
    ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}}),
    ("smollm3", {"no_rope_layers": [1, 1, 1]}),
    ("smollm3", {"layer_types": ["full_attention"] * 3}),
    ("falcon", {"parallel_attn": False}),
]


@pytest.mark.parametrize(("family", "change"), WITHOUT, ids=lambda x: x if isinstance(x, str) else next(iter(x)))
def test_what_a_family_is_about_matters_in_its_toy(family, change, toy, batch_of, step, error_of):
    batch = batch_of("none")
    _, gradients = step(make(toy, family), batch)
    _, others = step(make(toy, family, base=change), batch)
    assert error_of(others, gradients) > 0.01


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"alibi": True}, "its positions are ALiBi's"),
        ({"new_decoder_architecture": True, "num_kv_heads": 2}, "its query_key_value is grouped by key/value head"),
        ({"multi_query": False, "num_kv_heads": 4}, "its query_key_value is grouped by head"),
        ({"parallel_attn": False}, "its MLP has a norm of its own"),
        ({"hidden_dropout": 0.1}, "hidden has dropout"),
    ],
    ids=lambda x: "" if isinstance(x, str) else next(iter(x)),
)
def test_other_falcons_run_part_by_part(change, reason, toy, batch_of, step, error_of):
    batch = batch_of("right")
    model = make(toy, "falcon", base=change)
    torch.manual_seed(1)
    loss, gradients = step(model, batch)
    patch_model(model, backend="eager", placement="full")
    torch.manual_seed(1)
    fused_loss, fused = step(model, batch)
    paths = ledger_of(model).paths
    assert {name: path.reason for name, path in paths.items() if path.kind == "decoder_layer"} == dict.fromkeys(
        ("h.0", "h.1", "h.2"), reason
    )
    assert paths["ln_f"].path == paths["lm_head"].path == paths["h.1.mlp.dense_4h_to_h"].path == "fused (eager)"
    if "hidden_dropout" not in change:
        assert fused_loss == pytest.approx(loss, rel=1e-5)
        assert error_of(fused, gradients) < TOLERANCE


@pytest.mark.parametrize(
    ("family", "base", "lora", "reason"),
    [
        ("gemma2", {"use_bidirectional_attention": True}, {}, "attention is not causal"),
        ("gemma2", {"hidden_activation": "relu"}, {}, "the activation is ReLU, not one of SiLU, "),
        ("phi3", {"resid_pdrop": 0.1}, {}, "resid_attn has dropout"),
        ("qwen3", {"attention_dropout": 0.1}, {}, "attention has dropout"),
        ("phi3", {}, {"use_dora": True, "lora_dropout": 0.1}, "qkv_proj: its adapter: its DoRA has dropout"),
    ],
)
def test_what_cannot_run_fused_says_why(family, base, lora, reason, toy, batch_of, step):
    model = make(toy, family, base=base, **lora)
    patch_model(model, backend="eager")
    torch.manual_seed(1)
    assert step(model, batch_of("none"))[0] > 0
    paths = ledger_of(model).paths
    assert paths["layers.1"].path == "stock"
    assert paths["layers.1"].reason.startswith(reason)
    assert paths["norm"].path == paths["lm_head"].path == "fused (eager)"


def test_trained_head_norms_stay_stock(toy):
    model = make(toy, "qwen3")
    model.get_base_model().model.layers[1].self_attn.k_norm.weight.requires_grad_()
    patch_model(model, backend="eager")
    stock = {name: path.reason for name, path in ledger_of(model).fallbacks.items() if path.kind == "decoder_layer"}
    assert stock == {"layers.1": "self_attn.k_norm: its weight is trained"}


def test_a_soft_cap_that_stock_leaves_out_is_not_put_in(toy, monkeypatch):
    """transformers 5.17 loads Gemma 2 with sdpa, and then does not cap its scores."""
    model = make(toy, "gemma2")
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "sdpa")
    patch_model(model, backend="eager")
    assert "leaves out its soft-cap" in ledger_of(model).paths["layers.0"].reason
    model = make(toy, "gemma2", base={"attn_logit_softcapping": None})
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "sdpa")
    patch_model(model, backend="eager", strict=True)


FALCON = SPECS["falcon"]


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("policy", SAVED)
def test_parallel_attention_layer_norm_and_no_gate(policy, backend, device):
    """Falcon's layer, with its tensors read by hand."""
    torch.manual_seed(0)
    config = transformers.FalconConfig(
        vocab_size=50, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, initializer_range=0.1
    )
    model = peft.get_peft_model(
        transformers.FalconForCausalLM(config).to(device),
        peft.LoraConfig(r=4, target_modules=list(FALCON.targets), init_lora_weights=False),
    )
    layer, rotary = model.get_base_model().transformer.h[0], model.get_base_model().transformer.rotary_emb
    with torch.no_grad():
        layer.input_layernorm.weight.add_(0.2 * torch.randn(64, device=device))
        layer.input_layernorm.bias.add_(0.2 * torch.randn(64, device=device))
    x_BSD = torch.randn(2, 9, 64, device=device, requires_grad=True)
    dy_BSD = torch.randn_like(x_BSD)
    cos, sin = rotary(x_BSD, torch.arange(9, device=device)[None])
    causal = torch.ones(9, 9, dtype=torch.bool, device=device).tril()[None, None]
    expected_BSD, _ = layer(x_BSD, alibi=None, attention_mask=causal, position_embeddings=(cos, sin))

    parts = read_parts(layer, FALCON, 0)
    matrices = [matrix for matrix in parts.adapters if matrix is not None]
    expected = torch.autograd.grad(expected_BSD, [x_BSD, *matrices], dy_BSD)
    seen = Seen(causal)
    context = StepContext(
        2, 18, choose_attention("auto", x_BSD.new_empty(2, 9, 4, 16), seen), cos[0], sin[0], seen, None
    )
    call = LayerCall(load_backend(backend), parts, context, policy, 0)
    with torch.no_grad():
        y_TD, saved = forward_layer(x_BSD.flatten(0, 1), call)
        dx_TD, gradients = backward_layer(dy_BSD.flatten(0, 1), saved, call, needs_dx=True)
    torch.testing.assert_close(y_TD.view_as(x_BSD), expected_BSD.detach(), rtol=1e-5, atol=1e-5)
    assert dx_TD is not None
    gradients = [gradient for gradient, matrix in zip(gradients, parts.adapters, strict=True) if matrix is not None]
    assert len(expected) == 1 + len(gradients) == 9
    for got, wanted in zip([dx_TD.view_as(x_BSD), *gradients], expected, strict=True):
        assert (got - wanted).norm() < TOLERANCE * wanted.norm()


def describe(family: str, toy: Any) -> tuple[str, ...]:
    """The family's row of the table, from the ledger of its toy and from its specification."""
    model = make(toy, family)
    patch_model(model, backend="eager")
    paths = ledger_of(model).paths
    kinds = {path.kind: path for path in paths.values()}
    columns = [f"{kinds[kind].path.partition(' ')[0]}" for kind in ("decoder_layer", "norm", "head_and_loss")]
    reasons = sorted({path.reason for path in paths.values() if path.reason})
    return (f"`{family}`", *columns, "; ".join(reasons) or "nothing")


def test_the_table_in_the_documentation_is_what_runs(toy):
    rows = [
        tuple(cell.strip() for cell in line.strip("|").split("|"))
        for line in TABLE.read_text(encoding="utf-8").splitlines()
        if re.match(r"\| `\w+` \|", line)
    ]
    assert [(row[0], *row[2:6]) for row in rows] == [describe(family, toy) for family in SPECS]


def test_specs_differ_by_data_only():
    """A family is a row of a table: no code asks for one by name."""
    engine = Path(__file__).resolve().parents[2] / "fastft" / "engine"
    for path in engine.glob("*.py"):
        words = set(re.findall(r"\w+", path.read_text(encoding="utf-8").lower()))
        assert not words & (set(SPECS) - {"llama"}), path
    assert all(dataclasses.is_dataclass(spec) for spec in SPECS.values())
