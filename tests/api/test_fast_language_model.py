"""`FastLanguageModel`: what people who fine-tune already call."""

import logging
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import Tensor

import fastft
from api_models import assert_equals_stock, gradients_of, load, make_batch, olmo2_config
from fastft import FastLanguageModel, ledger_of, patch_model
from fastft.engine.patch import placement_of
from fastft.engine.state import state_of
from fastft.errors import BackendError, ConfigError, ModelError
from fastft.models.shapes import SHAPES


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
    transformers.AutoModelForCausalLM.from_config(olmo2_config()).save_pretrained(tmp_path)
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


def test_the_public_names():
    for name in fastft.__all__:
        assert getattr(fastft, name) is not None
    assert fastft.patch_model is patch_model
    with pytest.raises(AttributeError, match="no attribute 'FastLanguageModl'"):
        _ = fastft.FastLanguageModl
