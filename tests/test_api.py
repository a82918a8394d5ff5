"""The public API: what people who fine-tune already call."""

import copy
import inspect
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

import fastft
from fastft import FastLanguageModel, ledger_of, patch_hf_training, patch_model, unpatch_model
from fastft.config import RunConfig
from fastft.engine.patch import placement_of
from fastft.engine.state import state_of
from fastft.errors import BackendError, ConfigError, FastftError, ModelError, PlanError
from fastft.hardware import detect_device
from fastft.kernels.launches import OPERATIONS, Bucket, launch_for
from fastft.models.shapes import SHAPES
from fastft.plan import Choices, Evidence, Plan
from fastft.plan_store import PlanStore
from fastft.planning import plan_key
from fastft.plans import shipped
from fastft.plans.shipped import ShippedPlans
from fastft.plans.verification import Verifications, rejected

# Looser than in tests/engine: with the shapes' own small weights, k's gradient is a difference of nearly equal numbers.
TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTFT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "shipped")


def load(model: str = "toy-llama", **more: Any) -> Any:
    return FastLanguageModel.from_pretrained(
        model, **{"max_seq_length": 64, "load_in_4bit": False, "dtype": "fp32", **more}
    )[0]


def make_batch(model: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids_BS = torch.randint(0, 512, (3, 15), generator=generator)
    mask_BS = torch.ones_like(ids_BS)
    mask_BS[1, 9:] = 0
    batch = {"input_ids": ids_BS, "labels": ids_BS.masked_fill(mask_BS == 0, -100), "attention_mask": mask_BS}
    return {name: tensor.to(next(model.parameters()).device) for name, tensor in batch.items()}


def gradients_of(model: Any) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**make_batch(model), use_cache=False).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equals_stock(model: Any) -> None:
    """With B ≠ 0: at first B is zero, and so is A's gradient."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    stock = copy.deepcopy(model)
    unpatch_model(stock)
    loss, gradients = gradients_of(model)
    expected_loss, expected = gradients_of(stock)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        assert (gradients[name] - gradient).norm() < TOLERANCE * gradient.norm(), name


# FastLanguageModel


def test_the_two_calls_of_the_readme():
    model, tokenizer = FastLanguageModel.from_pretrained("toy-llama", max_seq_length=64, load_in_4bit=False)
    assert tokenizer is None
    model = FastLanguageModel.get_peft_model(model, r=8)
    assert isinstance(model, peft.PeftModel)
    assert model.training
    ids = make_batch(model)["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert len(gradients) == 3 * 7 * 2
    assert all(gradient is not None for gradient in gradients)
    assert not ledger_of(model).fallbacks


@pytest.mark.parametrize("family", ["toy-llama", "toy-qwen2"])
def test_what_it_makes_equals_stock(family):
    model = FastLanguageModel.get_peft_model(load(family), r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    assert_equals_stock(model)


def test_arguments_reach_peft():
    model = FastLanguageModel.get_peft_model(
        load(), r=3, lora_alpha=6, lora_dropout=0.25, target_modules=("v_proj",), use_rslora=True,
        layers_to_transform=[1], random_state=5,
    )  # fmt: skip
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (3, 6, 0.25, True)
    assert set(config.target_modules) == {"v_proj"}
    assert sum(p.requires_grad for p in model.parameters()) == 2
    assert config.task_type == "CAUSAL_LM"


def test_the_random_state_fixes_the_adapters():
    def weights(seed: int) -> Tensor:
        model = FastLanguageModel.get_peft_model(load(), r=2, random_state=seed)
        return next(p for name, p in model.named_parameters() if "lora_A" in name).detach()

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_all_linear_means_the_seven():
    model = FastLanguageModel.get_peft_model(load(), target_modules="all-linear")
    assert len(model.peft_config["default"].target_modules) == 7


def test_the_tiny_model_comes_with_its_tokenizer():
    model, tokenizer = FastLanguageModel.from_pretrained("tiny", load_in_4bit=False, dtype="fp32")
    assert tokenizer("1 + 1")["input_ids"]
    model = FastLanguageModel.get_peft_model(model, r=2)
    assert model.training
    assert_equals_stock(model)


def test_arguments_reach_hugging_face(tmp_path):
    for source in ("toy-llama", str(tmp_path)):
        if source == str(tmp_path):
            load().save_pretrained(tmp_path)
            transformers.AutoTokenizer.from_pretrained(
                Path(fastft.__file__).parent / "models" / "tiny"
            ).save_pretrained(tmp_path)
        assert load(source).config._attn_implementation == "sdpa"
        assert load(source, attn_implementation="eager").config._attn_implementation == "eager"
        with pytest.raises(TypeError, match="no_such_argument"):
            load(source, no_such_argument=1)


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", torch.bfloat16), (torch.float16, torch.float16)], ids=str)
def test_dtypes(dtype, expected):
    assert load(dtype=dtype).lm_head.weight.dtype == expected


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"load_in_4bit": True, "load_in_8bit": True}, ConfigError, "exclude each other"),
        ({"model": "toy-lama"}, ModelError, "did you mean 'toy-llama'"),
        ({"model": "./nowhere"}, ModelError, "model is unknown"),
        ({"model": "owner/name", "local_files_only": True}, ModelError, "cannot read model owner/name"),
        ({"dtype": "fp8"}, ConfigError, "dtype"),
        ({"dtype": torch.float64}, ConfigError, "torch.float64"),
        ({"memory_cap": "much"}, ConfigError, "memory_cap is not a size; got much"),
        ({"backend": "tritn"}, ConfigError, "backend is not valid; got tritn"),
        ({"max_seq_length": 1}, ConfigError, "sequence_tokens is not valid"),
    ],
)
def test_what_cannot_be_loaded_is_refused(arguments, error, message, monkeypatch):
    """Before the weights are: they may take minutes."""
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_config", None)
    with pytest.raises(error, match=message):
        load(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 0}, "lora.rank is not valid; got 0"),
        ({"lora_dropout": 1.5}, "lora.dropout is not valid"),
        ({"target_modules": []}, "names no module"),
        ({"target_modules": ".*proj"}, "target_modules is not a list of names"),
        ({"use_gradient_checkpointing": "fulll"}, "did you mean 'full'"),
    ],
)
def test_what_cannot_be_adapted_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        FastLanguageModel.get_peft_model(load(), **arguments)


def test_a_model_from_elsewhere_is_refused():
    model = transformers.AutoModelForCausalLM.from_config(SHAPES["toy-llama"].to_config())
    with pytest.raises(ModelError, match=r"from_pretrained; got LlamaForCausalLM; fix: .*patch_hf_training"):
        FastLanguageModel.get_peft_model(model)


@pytest.mark.parametrize(
    ("checkpointing", "placement"),
    [(True, "full"), (False, "light"), ("mlp", "mlp"), ("keep", "keep"), ("full", "full")],
)
def test_checkpointing_is_a_placement(checkpointing, placement):
    model = FastLanguageModel.get_peft_model(load(), r=2, use_gradient_checkpointing=checkpointing)
    assert placement_of(model) == [placement] * 3
    model.gradient_checkpointing_enable()
    assert placement_of(model) == [placement] * 3
    assert_equals_stock(model)


def test_without_a_plan_the_placement_follows_the_batch_and_the_cap(caplog):
    free = FastLanguageModel.get_peft_model(load(), r=2)
    gradients_of(free)
    assert "full" not in placement_of(free)
    tight = FastLanguageModel.get_peft_model(load(memory_cap=1_000_000), r=2, use_gradient_checkpointing="unsloth")
    with caplog.at_level(logging.WARNING, logger="fastft"):
        gradients_of(tight)
    # A CPU has no other memory to move to.
    assert placement_of(tight) == ["offload" if torch.cuda.is_available() else "full"] * 3
    assert "nothing is predicted to fit" in caplog.text


@pytest.mark.parametrize(
    ("checkpointing", "dense", "policy"), [(False, 3, "light"), ("auto", 3, "light"), (True, 0, "full")]
)
def test_quantized_weights_stay_dense_where_memory_allows_unless_it_is_to_be_spared(checkpointing, dense, policy):
    pytest.importorskip("bitsandbytes")
    model = FastLanguageModel.get_peft_model(load(load_in_4bit=True), r=2, use_gradient_checkpointing=checkpointing)
    assert_equals_stock(model)
    settings = state_of(model.get_base_model()).settings
    assert settings.resident_layers == dense
    assert placement_of(model) == [policy] * 3


def test_a_cap_without_room_keeps_none_dense(caplog):
    pytest.importorskip("bitsandbytes")
    tight = load(load_in_4bit=True, memory_cap=1_000_000)
    model = FastLanguageModel.get_peft_model(tight, r=2, use_gradient_checkpointing=False)
    gradients_of(model)
    assert state_of(model.get_base_model()).settings.resident_layers == 0
    assert placement_of(model) == ["light"] * 3, "what was asked for"


def test_weights_that_are_stored_quantized_are_planned_as_such(tmp_path):
    pytest.importorskip("bitsandbytes")
    load("tiny", load_in_4bit=True).save_pretrained(tmp_path)
    for file in (Path(fastft.__file__).parent / "models" / "tiny").glob("*tokenizer*"):
        shutil.copy(file, tmp_path)
    model = load(str(tmp_path), load_in_4bit=False)
    assert model.__dict__[fastft.api._REQUEST][0].quantization == "nf4"
    adapted = FastLanguageModel.get_peft_model(model, r=2)
    gradients_of(adapted)
    assert state_of(adapted.get_base_model()).settings.resident_layers == adapted.config.num_hidden_layers


def test_the_stock_backend_is_stock():
    for checkpointing, expected in [("auto", True), (True, True), (False, False), ("light", False)]:
        model = FastLanguageModel.get_peft_model(load(backend="peft"), r=2, use_gradient_checkpointing=checkpointing)
        assert ledger_of(model) is None
        assert model.is_gradient_checkpointing is expected
        _, gradients = gradients_of(model)
        assert len(gradients) == 42


def test_strict_reaches_the_engine():
    model = FastLanguageModel.get_peft_model(load(strict=True), r=2)
    model.get_base_model().model.layers[2].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(BackendError, match=r"layers\.2"):
        gradients_of(model)


@pytest.mark.parametrize("backend", ["auto", "eager", "peft"])
@pytest.mark.parametrize("checkpointing", ["auto", True, False])
def test_a_family_without_a_layer_specification(backend, checkpointing, tmp_path, caplog):
    torch.manual_seed(1)
    transformers.AutoModelForCausalLM.from_config(_olmo2_config()).save_pretrained(tmp_path)
    tiny = Path(fastft.__file__).parent / "models" / "tiny"
    transformers.AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path)
    model = load(str(tmp_path), backend=backend, strict=True)
    model = FastLanguageModel.get_peft_model(model, r=2, use_gradient_checkpointing=checkpointing)
    assert len(model.targeted_module_names) == 14
    assert model.is_gradient_checkpointing is (checkpointing is not False)
    if backend == "peft":
        assert ledger_of(model) is None
        return
    counts = ledger_of(model).counts()
    assert sum(count for line, count in counts.items() if line.startswith(("linear: fused", "norm: fused"))) == 14 + 9
    assert counts["decoder_layer: stock, because no layer specification for olmo2"] == 2
    assert_equals_stock(model)


# Plans


def make_plan(**choices: Any) -> Plan:
    device = detect_device("auto")
    config = RunConfig.load(
        model="toy-llama", sequence_tokens=64, dtype="fp32", rank=4, alpha=8.0, batch_size=6, optimizer="adamw"
    )
    wanted = {"backend": "eager", "micro_batch": 2, "accumulation": 3, "placement": ["full", "keep", "mlp"], **choices}
    return Plan(
        key=plan_key(config, SHAPES["toy-llama"], device), choices=Choices(**wanted), evidence=Evidence(trials=[])
    )


def adapt(**more: Any) -> Any:
    return FastLanguageModel.get_peft_model(load(**more), r=4, lora_alpha=8)


def test_a_cached_plan_is_followed_whatever_the_batch(caplog):
    plan = make_plan(attention="sdpa", loss_chunk_tokens=7)
    PlanStore().save(plan)
    with caplog.at_level(logging.INFO, logger="fastft"):
        model = adapt()
    assert f"plan {plan.id}" in caplog.text
    assert placement_of(model) == ["full", "keep", "mlp"]
    assert_equals_stock(model)
    assert placement_of(adapt(plan="none")) != ["full", "keep", "mlp"]
    other_rank = FastLanguageModel.get_peft_model(load(), r=5, lora_alpha=8)
    assert placement_of(other_rank) != ["full", "keep", "mlp"]


BUCKET = "add/64x16/32bit/256"


def default_launch() -> Any:
    return OPERATIONS["add"].default(Bucket.parse(BUCKET))


def other_launch() -> Any:
    return next(launch for launch in OPERATIONS["add"].launches if launch != default_launch())


def test_a_plan_decides_how_kernels_are_launched():
    launch = list(other_launch())
    PlanStore().save(make_plan(kernels={BUCKET: launch}))
    adapt()
    assert launch_for("add", (64, 16), 4, 100) == tuple(launch)
    adapt(plan="none")
    assert launch_for("add", (64, 16), 4, 100) == default_launch(), "without a plan, by default"


def test_a_plan_file_is_followed_or_refused_by_the_differing_field(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(make_plan().to_json())
    assert placement_of(adapt(plan=str(path))) == ["full", "keep", "mlp"]
    with pytest.raises(ConfigError, match="made for something else; got lora_rank, sequence_tokens"):
        FastLanguageModel.get_peft_model(load(plan=str(path), max_seq_length=128), r=8, lora_alpha=8)
    with pytest.raises(PlanError):
        adapt(plan=str(tmp_path / "missing.json"))
    path.write_text(path.read_text().replace("full", "mlp"))
    with pytest.raises(PlanError, match="checksum"):
        adapt(plan=str(path))


def test_a_plan_in_which_stock_was_the_fastest_gives_stock():
    PlanStore().save(make_plan(backend="peft", placement=["full"] * 3))
    model = adapt()
    assert ledger_of(model) is None
    assert model.is_gradient_checkpointing
    pinned = adapt(backend="eager")
    assert ledger_of(pinned) is not None


def test_explicit_checkpointing_wins_over_the_plan():
    PlanStore().save(make_plan())
    model = FastLanguageModel.get_peft_model(load(), r=4, lora_alpha=8, use_gradient_checkpointing=True)
    assert placement_of(model) == ["full"] * 3


def ship(**choices: Any) -> Plan:
    """A shipped plan that other kernels made."""
    plan = make_plan(**choices)
    plan = plan.model_copy(update={"key": plan.key.model_copy(update={"kernels_sha256": "f" * 64})})
    path = ShippedPlans().path(plan)
    path.parent.mkdir(exist_ok=True)
    path.write_text(plan.to_json())
    return plan


def test_a_shipped_plan_is_followed_up_to_its_own_micro_batch(caplog):
    plan = ship(micro_batch=3, accumulation=2, attention="sdpa")
    with caplog.at_level(logging.INFO, logger="fastft"):
        model = adapt()
    assert f"plan {plan.id} (shipped): " in caplog.text
    assert_equals_stock(model)  # 3 rows
    assert placement_of(model) == ["full", "keep", "mlp"]
    ship(micro_batch=2, accumulation=3)
    model = adapt()
    assert_equals_stock(model)
    assert placement_of(model) != ["full", "keep", "mlp"]  # by estimate


def test_the_users_plan_comes_before_a_shipped_one():
    ship()
    PlanStore().save(make_plan(placement=["mlp"] * 3))
    assert placement_of(adapt()) == ["mlp"] * 3


def test_a_shipped_plan_that_a_run_rejected_is_not_followed(caplog):
    plan = ship()
    Verifications().save(make_plan().key, rejected(plan, "too large"))
    with caplog.at_level(logging.INFO, logger="fastft"):
        adapt()
    assert plan.id not in caplog.text


def test_a_saved_adapter_names_the_plan(tmp_path):
    plan = make_plan()
    PlanStore().save(plan)
    adapt().save_pretrained(tmp_path / "planned")
    adapt(plan="none").save_pretrained(tmp_path / "default")
    facts = json.loads((tmp_path / "planned" / "fastft.json").read_text())
    assert (facts["plan_id"], facts["choices"]) == (plan.id, plan.choices.model_dump())
    assert json.loads((tmp_path / "default" / "fastft.json").read_text())["plan_id"] is None
    base = transformers.AutoModelForCausalLM.from_config(SHAPES["toy-llama"].to_config())
    assert peft.PeftModel.from_pretrained(base, tmp_path / "planned").peft_config["default"].r == 4


# patch_hf_training


def test_launches_of_plans_for_the_same_widths_are_followed_and_nothing_else(monkeypatch):
    launch = list(other_launch())
    PlanStore().save(make_plan(kernels={BUCKET: launch}))
    monkeypatch.setattr("fastft.api._backend_name", lambda *_: "triton")
    with patch_hf_training(backend="triton"):
        model = stock_model()
        assert launch_for("add", (64, 16), 4, 100) == tuple(launch)
        assert placement_of(model) == ["light"] * 3
        stock_model(r=5)
        assert launch_for("add", (64, 16), 4, 100) == default_launch(), "a plan for another rank"
        ship(kernels={BUCKET: launch})
        PlanStore().path(make_plan().key).unlink()
        stock_model()
        assert launch_for("add", (64, 16), 4, 100) == default_launch(), "timed with other kernels"


def stock_model(**lora: Any) -> Any:
    config = SHAPES["toy-llama"].to_config()
    torch.manual_seed(1)
    base = transformers.AutoModelForCausalLM.from_config(config)
    settings = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **lora}
    return peft.get_peft_model(base, peft.LoraConfig(**settings)).train()


def test_models_made_inside_are_fast_and_stock_afterwards(device):
    original = peft.PeftModel.__init__
    before = stock_model()
    with patch_hf_training(backend="eager"):
        model = stock_model().to(device)
        assert ledger_of(model).counts()["decoder_layer: fused (eager)"] == 3
        assert_equals_stock(model)
        assert ledger_of(before) is None
        assert isinstance(model, peft.PeftModelForCausalLM)
        assert inspect.signature(peft.PeftModel.__init__) == inspect.signature(original)
    assert ledger_of(model) is None
    assert peft.PeftModel.__init__ is original
    assert ledger_of(stock_model()) is None
    assert gradients_of(model)[1]


def test_its_defaults_are_stocks(device):
    """Same initial adapter, same dtypes, and no checkpointing that was not asked for."""
    torch.manual_seed(0)
    expected = stock_model()
    with patch_hf_training(backend="eager"):
        model = stock_model()
        assert placement_of(model) == ["light"] * 3
    for (name, value), (other_name, other) in zip(expected.named_parameters(), model.named_parameters(), strict=True):
        assert name == other_name
        assert value.dtype == other.dtype
        assert torch.equal(value, other)


def test_an_adapter_is_loaded_fast_too(tmp_path):
    stock = stock_model()
    with torch.no_grad():
        for parameter in stock.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    stock.save_pretrained(tmp_path)
    base = stock_model().unload()
    with patch_hf_training(backend="eager"):
        model = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True).train()
        assert not ledger_of(model).fallbacks
        assert gradients_of(model)[0] == pytest.approx(gradients_of(stock)[0], rel=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_checkpointing_that_was_asked_for_before_is_kept():
    base = transformers.AutoModelForCausalLM.from_config(SHAPES["toy-llama"].to_config())
    base.gradient_checkpointing_enable()
    with patch_hf_training(backend="eager"):
        model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM"))
        assert placement_of(model) == ["full"] * 3
    assert model.is_gradient_checkpointing


def _gpt2() -> Any:
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=512))
    return peft.get_peft_model(base, peft.LoraConfig(target_modules=["c_attn"], task_type="CAUSAL_LM", r=2))


def _olmo2_config() -> Any:
    return transformers.Olmo2Config(
        vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip


def _olmo2(**lora: Any) -> Any:
    base = transformers.AutoModelForCausalLM.from_config(_olmo2_config())
    return peft.get_peft_model(
        base, peft.LoraConfig(**{"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "r": 2, **lora})
    )


def _classifier() -> Any:
    config = SHAPES["toy-llama"].to_config()
    config.pad_token_id = 0
    base = transformers.LlamaForSequenceClassification(config)
    return peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"]))


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*")
@pytest.mark.parametrize(
    ("make", "message", "linears"),
    [(_gpt2, "no layer specification for gpt2", 1), (_classifier, "is no causal language model", 3)],
)
def test_models_without_a_layer_specification_run_part_by_part_and_say_so_once(make, message, linears, caplog):
    with caplog.at_level(logging.INFO, logger="fastft"), patch_hf_training(backend="eager", strict=True):
        model = make()
        counts = ledger_of(model).counts()
        assert counts["linear: fused (eager)"] == linears
        labels = torch.tensor([0] if make is _classifier else [[1, 2, 3]])
        model(input_ids=torch.tensor([[1, 2, 3]]), labels=labels).loss.backward()
        assert ledger_of(model).counts() == counts
    lines = [record.getMessage() for record in caplog.records if record.name == "fastft"]
    assert len(lines) == 1 + (make is _classifier), lines
    assert message in lines[0]
    assert ledger_of(model) is None


def test_what_is_no_hugging_face_model_is_fast_too():
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    with patch_hf_training(backend="eager"):
        model = peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["linear"], r=2)).train()
        model(torch.ones(1, 3)).sum().backward()
        assert ledger_of(model).counts() == {"linear: fused (eager)": 1}


def test_strict_makes_what_stays_stock_an_error():
    with patch_hf_training(backend="eager", strict=True):
        with pytest.raises(BackendError, match="DoRA"):
            stock_model(use_dora=True)
        with pytest.raises(BackendError, match=r"layers\.0\.self_attn\.q_proj.*DoRA"):
            _olmo2(use_dora=True)
        assert stock_model() is not None
        assert _olmo2() is not None


def test_patches_come_off_in_the_reverse_order():
    original = peft.PeftModel.__init__
    outer = patch_hf_training(backend="eager")
    inner = patch_hf_training(backend="eager")
    with pytest.raises(FastftError, match="another patch lies over this one"):
        outer.undo()
    model = stock_model()
    inner.undo()
    assert ledger_of(model) is None
    outer.undo()
    assert peft.PeftModel.__init__ is original
    outer.undo()
    inner.undo()
    assert peft.PeftModel.__init__ is original


def test_an_error_inside_goes_through_and_the_patch_is_off():
    original = peft.PeftModel.__init__
    with pytest.raises(ValueError, match="mine"), patch_hf_training(backend="eager"):
        raise ValueError("mine")
    assert peft.PeftModel.__init__ is original


def test_it_holds_no_model():
    import gc
    import weakref

    with patch_hf_training(backend="eager"):
        model = stock_model()
        reference = weakref.ref(model)
        del model
        gc.collect()
        assert reference() is None


@pytest.mark.parametrize("backend", ["peft", "tritn"])
def test_a_backend_that_patches_nothing_is_refused(backend):
    original = peft.PeftModel.__init__
    with pytest.raises(FastftError, match="backend"):
        patch_hf_training(backend=backend)
    assert peft.PeftModel.__init__ is original


# The package


def test_the_public_names():
    for name in fastft.__all__:
        assert getattr(fastft, name) is not None
    assert fastft.patch_model is patch_model
    with pytest.raises(AttributeError, match="no attribute 'FastLanguageModl'"):
        _ = fastft.FastLanguageModl
