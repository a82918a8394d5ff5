"""Models without a layer specification, and layers that cannot run fused as a whole: what stock gives, part by part."""

import contextlib
import copy
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from trl.trainer.utils import add_fused_lm_head

from fastft import ledger_of, patch_model, unpatch_model
from fastft.engine.patch import placement_of
from fastft.errors import BackendError, ConfigError, ModelError
from fastft.models.spec import SPECS
from peft_models import randomize_adapters

TOLERANCE = 5e-5 if torch.cuda.is_available() else 1e-5  # ‖g − stock‖ / ‖stock‖ in fp32

_COMMON = {
    "vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.1,
}  # fmt: skip
_GATED = {**_COMMON, "intermediate_size": 48, "num_key_value_heads": 2}
_QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]

# Model type: its configuration, what is adapted, and what the ledger then says of its kinds.
FAMILIES: dict[str, tuple[dict[str, Any], list[str], dict[str, int]]] = {
    "gpt_neox": (
        {**_COMMON, "intermediate_size": 64},
        ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
        {"linear: fused (eager)": 8},
    ),
    "opt": (
        {**_COMMON, "ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0, "init_std": 0.1},
        ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
        {"linear: fused (eager)": 12},
    ),
    "gpt2": (
        {"vocab_size": 512, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.1,
         "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2},
        ["c_attn", "c_proj", "c_fc"],
        {"linear: fused (eager)": 8},
    ),
    "olmo2": (
        _GATED, [*_QKVO, "gate_proj", "up_proj", "down_proj"],
        {"linear: fused (eager)": 14, "norm: fused (eager)": 9},
    ),
    "qwen3_moe": (
        {**_GATED, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
         "decoder_sparse_step": 1},
        _QKVO,
        {"linear: fused (eager)": 8, "norm: fused (eager)": 9},
    ),
}  # fmt: skip


def make_unknown(family: str, *, dtype: torch.dtype = torch.float32, adapt: bool = True, **lora: Any) -> Any:
    assert family not in SPECS
    settings, targets, _ = FAMILIES[family]
    config = transformers.AutoConfig.for_model(family, **settings)
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn(parameter.shape))
    model = model.to(dtype)
    if not adapt:
        return model
    wanted = {"r": 4, "lora_alpha": 8, "target_modules": targets, "task_type": "CAUSAL_LM", **lora}
    model = peft.get_peft_model(model, peft.LoraConfig(**wanted))
    return randomize_adapters(model).train()


@pytest.fixture
def unknown(device: torch.device) -> Callable[..., Any]:
    def make(family: str, **more: Any) -> Any:
        return make_unknown(family, **more).to(device)

    return make


def counts(model: Any, *kinds: str) -> dict[str, int]:
    return {line: count for line, count in ledger_of(model).counts().items() if line.startswith(kinds)}


def paths(model: Any, kind: str) -> dict[str, str]:
    return {name: path.reason or path.path for name, path in ledger_of(model).paths.items() if path.kind == kind}


# Families without a layer specification


@pytest.mark.parametrize("form", ["none", "right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_stock(family, form, unknown, batch_of, step, error_of):
    model = unknown(family)
    batch = batch_of(form)
    loss, gradients = step(model, batch)
    ledger = patch_model(model, backend="eager", strict=True)
    before = ledger.counts()
    fused_loss, fused = step(model, batch, 2)
    assert fused_loss == pytest.approx(loss, rel=1e-5)
    assert error_of(fused, gradients) < TOLERANCE
    assert ledger.counts() == before == {
        **FAMILIES[family][2],
        "head_and_loss: fused (eager)": 1,
        f"decoder_layer: stock, because no layer specification for {family}": 2,
    }  # fmt: skip


def test_the_interpreted_kernels_too(unknown, batch_of, step, error_of):
    model = unknown("olmo2")
    batch = batch_of("right", B=2, S=7)
    _, gradients = step(model, batch)
    patch_model(model, backend="triton", strict=True)
    assert error_of(step(model, batch)[1], gradients) < TOLERANCE


@pytest.mark.parametrize("family", ["gpt_neox", "olmo2", "qwen3_moe"])
def test_bf16_errs_no_more_than_stock(family, unknown, batch_of, step):
    """With PEFT's usual fp32 adapters, and under autocast as well as without.

    Over several batches: where rounding makes a router choose another expert, one batch says little.
    """
    batches = [batch_of("right", seed=seed) for seed in range(3, 11)]
    model = unknown(family, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    reference = copy.deepcopy(model).float()
    exact = [_flat(step(reference, batch)[1]) for batch in batches]

    def error() -> float:
        errors = [_flat(step(model, batch)[1]) - each for batch, each in zip(batches, exact, strict=True)]
        return float(torch.cat(errors).norm() / torch.cat(exact).norm())

    for on in (False, True):
        with torch.autocast(next(model.parameters()).device.type, dtype=torch.bfloat16, enabled=on):
            unpatch_model(model)
            stock = error()
            patch_model(model, backend="eager", strict=True)
            fused = error()
        assert 1e-4 < stock < 0.2
        assert fused <= 1.5 * stock


def _flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradients[name].flatten().double() for name in sorted(gradients)])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_is_hugging_faces_and_repeats_the_dropout(reentrant, unknown, batch_of, step, error_of):
    model = unknown("olmo2", lora_dropout=0.3)
    batch = batch_of("right")
    patch_model(model, backend="eager", strict=True)
    torch.manual_seed(7)
    loss, gradients = step(model, batch)
    assert step(model, batch)[0] != pytest.approx(loss, rel=1e-4), "another draw gives another loss"
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    runs = []
    model.get_base_model().model.layers[0].mlp.register_forward_hook(lambda *_: runs.append(1))
    torch.manual_seed(7)
    again_loss, again = step(model, batch)
    assert len(runs) == 2, "once forward, once more for the backward"
    assert again_loss == pytest.approx(loss, rel=1e-6)
    assert error_of(again, gradients) < TOLERANCE


def test_a_tuple_and_other_arguments(unknown, batch_of):
    """Whatever is asked of the model's own forward, it gives."""
    stock, model = unknown("olmo2"), unknown("olmo2")
    patch_model(model, backend="eager")
    batch = {name: tensor.to(stock.device) for name, tensor in batch_of("right").items()}
    for more in ({"return_dict": False}, {"output_hidden_states": True}, {"logits_to_keep": 23}):
        expected, got = (m(**batch, **more, use_cache=False) for m in (stock, model))
        assert type(expected) is type(got)
        assert len(expected) == len(got)
        torch.testing.assert_close(got[0], expected[0])
        torch.testing.assert_close(got[1] + 0, expected[1], rtol=1e-4, atol=1e-4)
    base = model.get_base_model()
    names = list(inspect.signature(type(base).forward).parameters)[1:]
    assert list(inspect.signature(base.forward).parameters) == names, "trainers drop the columns that it does not take"
    arguments = [batch.get(name) for name in names[: names.index("labels") + 1]]
    ledger_of(model).paths.clear()
    assert base(*arguments).loss.item() == pytest.approx(stock(**batch).loss.item(), rel=1e-5)
    assert paths(model, "head_and_loss") == {"lm_head": "fused (eager)"}


def test_in_evaluation_nothing_is_fused_and_the_logits_are_stocks(unknown, batch_of):
    model = unknown("qwen3_moe").eval()
    ids = batch_of("none")["input_ids"].to(model.device)
    with torch.no_grad():
        expected = model(ids).logits
        patch_model(model, backend="eager")
        assert torch.equal(model(ids).logits, expected)
        made = model.generate(input_ids=ids[:1, :4], max_new_tokens=3, do_sample=False)
    assert made.shape == (1, 7)


def test_unpatching_copies_and_patching_again(unknown, batch_of, step, error_of):
    model = unknown("gpt_neox")
    batch = batch_of("right")
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    loss, gradients = step(model, batch)
    first = patch_model(model, backend="eager")
    assert ledger_of(model) is first
    assert placement_of(model) is None
    clone = copy.deepcopy(model)
    assert ledger_of(clone) is not first
    randomize_adapters(clone, 99)
    clone_loss, _ = step(clone, batch)
    assert clone_loss != pytest.approx(loss, rel=1e-3)
    assert step(model, batch)[0] == pytest.approx(loss, rel=1e-5)
    unpatch_model(clone)
    assert ledger_of(clone) is None
    assert step(clone, batch)[0] == pytest.approx(clone_loss, rel=1e-5)
    second = patch_model(model, backend="triton")
    assert ledger_of(model) is second
    assert "linear: fused (triton)" in second.counts()
    patch_model(model, backend="eager")
    assert error_of(step(model, batch)[1], gradients) < TOLERANCE
    unpatch_model(model)
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == before
    again_loss, again = step(model, batch)
    assert again_loss == loss
    assert all(torch.equal(again[name], gradient) or gradient.is_cuda for name, gradient in gradients.items())


def test_hooks_fire_and_forwards_that_were_replaced_are_called(unknown, batch_of, step, error_of):
    def change(model: Any) -> list[str]:
        layers, calls = model.get_base_model().model.layers, []
        linear = layers[0].self_attn.q_proj
        linear.register_forward_hook(lambda _, __, output: calls.append("forward") or output * 1.5)
        linear.register_full_backward_hook(lambda *_: calls.append("backward"))
        layers[0].self_attn.q_norm.register_forward_hook(lambda *_: calls.append("norm"))
        layers[1].self_attn.k_proj.lora_A["default"].register_forward_hook(lambda *_: calls.append("inner"))
        replaced = layers[1].self_attn.v_proj
        original = replaced.forward
        replaced.forward = lambda *args: calls.append("replaced") or original(*args) * 0.5
        return calls

    stock, model, late = unknown("olmo2"), unknown("olmo2"), unknown("olmo2")
    batch = batch_of("right")
    expected_calls = change(stock)
    _, gradients = step(stock, batch)
    calls = change(model)
    patch_model(model, backend="eager")
    assert error_of(step(model, batch)[1], gradients) < TOLERANCE
    assert calls == expected_calls == ["forward", "norm", "inner", "replaced", "backward"]
    linears = paths(model, "linear")
    assert linears.pop("layers.1.self_attn.k_proj") == "its adapter: it has hooks"
    assert linears.pop("layers.1.self_attn.v_proj") == "its forward was replaced"
    assert set(linears.values()) == {"fused (eager)"}, "hooks on what is called as a whole hinder nothing"
    patch_model(late, backend="eager")
    change(late)
    assert error_of(step(late, batch)[1], gradients) < TOLERANCE
    unpatch_model(late)
    assert error_of(step(late, batch)[1], gradients) < TOLERANCE, "what holds the patched forward goes on working"


# Kinds of adapters


_VARIANTS: dict[str, tuple[dict[str, Any], str | None]] = {
    "lora_bias": ({"lora_bias": True}, None),
    "bias of every layer": ({"bias": "all"}, None),
    "bias of adapted layers": ({"bias": "lora_only", "target_modules": ["query_key_value"]}, None),
    "rslora": ({"use_rslora": True}, None),
    "dora": ({"use_dora": True}, None),
}


@pytest.mark.parametrize("kind", _VARIANTS)
@pytest.mark.filterwarnings("ignore:.*bias.*")
def test_variants(kind, unknown, batch_of, step, error_of):
    lora, reason = _VARIANTS[kind]
    model = unknown("gpt_neox", **lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name.endswith("bias"):
                parameter.add_(0.1)
    batch = batch_of("right")
    loss, gradients = step(model, batch)
    if "bias" in kind:
        assert any(name.endswith("bias") for name in gradients)
        # A key's bias moves all scores of a query alike, so its gradient is rounding alone.
        gradients = {n: g for n, g in gradients.items() if "query_key_value" not in n or "bias" not in n}
    patch_model(model, backend="eager")
    fused_loss, fused = step(model, batch)
    assert fused_loss == pytest.approx(loss, rel=1e-5)
    assert error_of({name: fused[name] for name in gradients}, gradients) < TOLERANCE
    assert set(paths(model, "linear").values()) == {reason or "fused (eager)"}
    if reason is not None:
        with pytest.raises(BackendError, match=reason):
            patch_model(model, backend="eager", strict=True)


def test_several_active_adapters_and_disabled_ones(unknown, batch_of, step, error_of):
    results = []
    for patched in (False, True):
        model = unknown("olmo2")
        model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        randomize_adapters(model)
        if patched:
            patch_model(model, backend="eager")
        model.base_model.set_adapter(["default", "second"])
        results.append(step(model, batch_of("right")))
        with model.disable_adapter(), torch.no_grad():
            results.append(model(batch_of("right")["input_ids"].to(model.device)).logits)
    torch.testing.assert_close(results[3], results[1])
    assert error_of(results[2][1], results[0][1]) < TOLERANCE
    reasons = paths(model, "linear")
    assert reasons["layers.1.self_attn.q_proj"] == "2 adapters are active at once"
    assert reasons["layers.1.self_attn.k_proj"] == "fused (eager)"


def test_adalora_is_fused_and_other_methods_stay_stock(unknown, batch_of, step, error_of):
    for config, kind, reason in (
        (peft.AdaLoraConfig(init_r=4, total_step=10, target_modules=_QKVO, task_type="CAUSAL_LM"),
         "linear", None),
        (peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
         "linear", "Linear of PEFT's method ia3 is not LoRA"),
    ):  # fmt: skip
        results = []
        for patched in (False, True):
            torch.manual_seed(4)
            model = peft.get_peft_model(unknown("qwen3_moe", adapt=False), config).train()
            randomize_adapters(model)
            if patched:
                patch_model(model, backend="eager")
            results.append(step(model, batch_of("right"))[1])
        assert error_of(results[1], results[0]) < TOLERANCE
        assert set(paths(model, kind).values()) == {reason or "fused (eager)"}
        assert set(paths(model, "norm").values()) == {"fused (eager)"}
        with pytest.raises(BackendError, match=reason) if reason is not None else contextlib.nullcontext():
            patch_model(model, backend="eager", strict=True)


def test_adapters_of_experts_and_embeddings_and_saved_modules_stay_stock(unknown, batch_of, step, error_of):
    model = unknown(
        "qwen3_moe",
        target_modules=[*_QKVO, "embed_tokens"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        modules_to_save=["lm_head"],
    )
    # Experts draw nothing here; PEFT initialises their B, too, at zero.
    batch = batch_of("right")
    _, gradients = step(model, batch)
    assert any("experts" in name for name in gradients)
    patch_model(model, backend="eager")
    assert error_of(step(model, batch)[1], gradients) < TOLERANCE
    adapters = paths(model, "adapter")
    assert set(adapters) == {"embed_tokens", "lm_head.adapter", "layers.0.mlp.experts", "layers.1.mlp.experts"}
    assert adapters["layers.0.mlp.experts"] == "Qwen3MoeExperts is not a linear layer that the engine knows"
    assert adapters["lm_head.adapter"] == "ModulesToSaveWrapper trains more than an adapter"
    assert paths(model, "head_and_loss")["lm_head"].startswith("the head is peft.")
    assert set(paths(model, "linear").values()) == set(paths(model, "norm").values()) == {"fused (eager)"}
    with pytest.raises(BackendError, match="lm_head"):
        patch_model(model, backend="eager", strict=True)


def test_an_adapted_head_is_a_linear_of_its_own(unknown, batch_of, step, error_of):
    model = unknown("olmo2", target_modules=["q_proj", "lm_head"])
    batch = batch_of("right")
    _, gradients = step(model, batch)
    patch_model(model, backend="eager")
    assert error_of(step(model, batch)[1], gradients) < TOLERANCE
    assert paths(model, "linear")["lm_head.adapter"] == "fused (eager)"
    assert paths(model, "head_and_loss")["lm_head"].startswith("the head is peft.")


# Norms


@pytest.mark.parametrize("change", ["trained", "other dtype"])
def test_norms_that_stay_stock(change, unknown, batch_of, step, error_of):
    model = unknown("olmo2")
    norm = model.get_base_model().model.layers[1].post_attention_layernorm
    batch = batch_of("right")
    if change == "trained":
        norm.weight.requires_grad_(True)
    _, gradients = step(model, batch)
    patch_model(model, backend="eager")
    if change == "other dtype":
        norm.weight.data = norm.weight.double()
        norm.register_forward_hook(lambda _, __, output: output.float())
    fused = step(model, batch)[1]
    assert error_of(fused, gradients) < TOLERANCE
    reason = {"trained": "its weight is trained", "other dtype": "its weight is torch.float64, its input torch.float32"}
    assert paths(model, "norm")["layers.1.post_attention_layernorm"] == reason[change]
    assert len(set(paths(model, "norm").values())) == 2


def test_a_norm_that_is_none_is_no_error_where_strict(unknown, batch_of, step, error_of):
    model = unknown("olmo2")
    norms = [m for m in model.modules() if type(m).__name__ == "Olmo2RMSNorm"]
    for norm in norms[:2]:
        norm.__class__ = type("OddRMSNorm", (type(norm),), {"forward": lambda self, x: 2 * self.weight * x})
    batch = batch_of("right")
    _, gradients = step(model, batch)
    patch_model(model, backend="eager", strict=True)
    assert error_of(step(model, batch)[1], gradients) < TOLERANCE
    assert counts(model, "norm: stock") == {
        "norm: stock, because OddRMSNorm is not the RMSNorm that the engine knows": 2
    }


# Models that are no causal language models

_OTHER_HEADS = {
    "SEQ_CLS": ("LlamaForSequenceClassification", torch.tensor([0, 1, 0, 1])),
    "TOKEN_CLS": ("Qwen3ForTokenClassification", torch.arange(4 * 23).view(4, 23) % 2),
}


@pytest.mark.parametrize("form", ["none", "right", "left"])
@pytest.mark.parametrize("task", _OTHER_HEADS)
def test_the_layers_under_another_head_run_fused(task, form, batch_of, toy_base, device, error_of):
    name, labels = _OTHER_HEADS[task]
    config = toy_base("toy-qwen3" if "Qwen3" in name else "toy-llama").config
    config.pad_token_id = 0
    batch = {key: tensor.to(device) for key, tensor in batch_of(form).items() if key != "labels"}
    batch["input_ids"] = batch["input_ids"].clamp(min=1)
    batch["labels"] = labels.to(device)
    lora = peft.LoraConfig(task_type=task, r=2, target_modules=["q_proj", "down_proj"])
    losses, found = [], []
    for fast in (False, True):
        torch.manual_seed(1)
        base = getattr(transformers, name)(config).to(device)
        model = randomize_adapters(peft.get_peft_model(base, lora)).train()
        if fast:
            patch_model(model, backend="eager", strict=True)
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
        found.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert error_of(found[1], found[0]) < TOLERANCE
    assert counts(model, "decoder", "head") == {"decoder_layer: fused (eager)": 3}
    unpatch_model(model)
    assert ledger_of(model) is None


def test_what_has_no_decoder_that_the_engine_knows_runs_part_by_part(toy_base, device):
    """A bare model is not found under the name that it has in one with a head."""
    torch.manual_seed(1)
    base = transformers.LlamaModel(toy_base().config).to(device)
    lora = peft.LoraConfig(task_type="FEATURE_EXTRACTION", r=2, target_modules=["q_proj", "down_proj"])
    model = randomize_adapters(peft.get_peft_model(base, lora)).train()
    inputs = {"input_ids": torch.tensor([[1, 2, 3]], device=device)}
    stock = copy.deepcopy(model)
    patch_model(model, backend="eager", strict=True)
    for each in (stock, model):
        each(**inputs).last_hidden_state.square().mean().backward()
    for (name, p), (_, q) in zip(stock.named_parameters(), model.named_parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert counts(model, "linear", "norm", "head", "decoder") == {
        "linear: fused (eager)": 6,
        "norm: fused (eager)": 7,
        "decoder_layer: stock, because LlamaModel is built otherwise than LlamaForCausalLM": 3,
    }
    unpatch_model(model)
    assert ledger_of(model) is None


def test_any_module_that_peft_adapts(device):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.relu(self.first(x)))

    torch.manual_seed(0)
    model = randomize_adapters(peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["first", "second"]))).to(
        device
    )
    x = torch.randn(3, 5, 8, device=device)
    expected = model(x)
    ledger = patch_model(model, backend="eager", strict=True)
    torch.testing.assert_close(model(x), expected)
    assert ledger.counts() == {"linear: fused (eager)": 2}


# What is refused


def test_what_cannot_be_is_refused_before_anything_changes(unknown):
    with pytest.raises(ModelError, match="neither Hugging Face's nor adapted by PEFT; got Linear"):
        patch_model(nn.Linear(2, 2), backend="eager")
    model = unknown("olmo2")
    ledger = patch_model(model, backend="eager")
    for chosen in ({"placement": "full"}, {"attention": "sdpa"}, {"graphs": "on"}):
        with pytest.raises(
            ConfigError, match=f"{next(iter(chosen))} cannot be chosen.*no layer specification for olmo2"
        ):
            patch_model(model, backend="eager", **chosen)
    with pytest.raises(BackendError, match="did you mean 'triton'"):
        patch_model(model, backend="tritn")
    assert ledger_of(model) is ledger


def test_each_reason_is_logged_once(unknown, batch_of, step, caplog):
    model = unknown("olmo2", use_dora=True, lora_dropout=0.1, target_modules=["q_proj"])
    patch_model(model, backend="eager")
    for _ in range(2):
        step(model, batch_of("none"))
    messages = [
        record.getMessage() for record in caplog.records if record.name == "fastft" and record.levelname == "WARNING"
    ]
    assert messages == [
        "Olmo2ForCausalLM: linear 2 of 2 (layers.0.self_attn.q_proj, …) runs as stock, because its adapter: its DoRA "
        "has dropout"
    ]


def test_names_are_the_models_own(unknown):
    ledger = patch_model(unknown("gpt2"), backend="eager")
    names = [f"h.{i}.{part}" for i, part in itertools.product(range(2), ["attn.c_attn", "attn.c_proj", "mlp.c_fc"])]
    assert set(names) <= set(ledger.paths)


@pytest.mark.parametrize("family", ["olmo2", "gpt2"])
def test_trls_head_is_answered_in_a_family_without_a_specification(family, unknown, batch_of, error_of):
    models, outputs, found = [unknown(family) for _ in range(2)], [], []
    patch_model(models[1], backend="eager")
    for model in models:
        add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy"))
        batch = {name: tensor.to(next(model.parameters()).device) for name, tensor in batch_of("right").items()}
        outputs.append(model(**batch, use_cache=False, fused_lm_head=True))
        outputs[-1].log_probs.square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(outputs[1].log_probs, outputs[0].log_probs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs[1].entropy, outputs[0].entropy, rtol=1e-4, atol=1e-5)
    assert error_of(found[1], found[0]) < TOLERANCE
    assert ledger_of(models[1]).paths["lm_head"].path == "fused (eager)"
