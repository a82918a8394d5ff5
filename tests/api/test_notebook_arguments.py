"""Arguments and names of notebooks that were written for Unsloth."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import fastft
from fastft import FastLanguageModel, FastModel, ledger_of
from fastft.engine.patch import placement_of
from fastft.errors import ConfigError, ModelError

CPU: dict[str, Any] = {"model_name": "tiny", "max_seq_length": 64, "device": "cpu"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"full_finetuning": True}, "full_finetuning is not possible"),
        ({"fast_inference": True}, "vLLM"),
        ({"load_in_fp8": True}, "load_in_fp8 is not possible"),
    ],
)
def test_what_fastft_does_not_do_is_an_error_before_anything_is_loaded(given, message, monkeypatch):
    monkeypatch.setattr("fastft.api.load_model", None)
    with pytest.raises(ConfigError, match=message):
        FastLanguageModel.from_pretrained(**CPU, **given)


def test_what_notebooks_pass_by_default_changes_nothing():
    model, _ = FastLanguageModel.from_pretrained(
        **CPU, load_in_16bit=True, full_finetuning=False, fast_inference=False, gpu_memory_utilization=0.6, token=None,
        device_map="sequential", rope_scaling=None, random_state=3407, max_lora_rank=64, fix_tokenizer=True,
    )  # fmt: skip
    assert next(model.parameters()).dtype == torch.float32
    assert not getattr(model, "is_loaded_in_4bit", False), "load_in_16bit wins over the default of 4 bits"
    adapted = FastLanguageModel.get_peft_model(
        model, r=4, target_modules=["q_proj"], lora_alpha=8, lora_dropout=0, bias="none", max_seq_length=32,
        use_gradient_checkpointing="unsloth", random_state=3407, use_rslora=False, loftq_config=None, use_dora=False,
        modules_to_save=None, finetune_language_layers=True, finetune_vision_layers=False,
    )  # fmt: skip
    assert adapted.peft_config["default"].r == 4
    assert not ledger_of(adapted).fallbacks


def test_modules_are_left_out_by_target_modules():
    model, _ = FastLanguageModel.from_pretrained(**CPU, load_in_4bit=False)
    with pytest.raises(ConfigError, match=r"finetune_mlp_modules.*target_modules"):
        FastLanguageModel.get_peft_model(model, finetune_mlp_modules=False)
    with pytest.raises(ConfigError, match="vision models"):
        FastLanguageModel.get_peft_model(model, finetune_vision_layers=True)


def test_without_a_random_state_the_generator_is_left_as_it_is():
    drawn = []
    for seed in (1, 1, 2):
        model, _ = FastLanguageModel.from_pretrained(**CPU, load_in_4bit=False)
        torch.manual_seed(seed)
        adapted = FastLanguageModel.get_peft_model(model, r=4, random_state=None)
        drawn.append(next(p for name, p in adapted.named_parameters() if "lora_A" in name).detach().clone())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_checkpointing_may_be_told_when_the_model_is_loaded():
    model, _ = FastLanguageModel.from_pretrained(**CPU, load_in_4bit=False, use_gradient_checkpointing=True)
    assert set(placement_of(FastLanguageModel.get_peft_model(model, r=2)) or ()) == {"full"}


def test_the_folder_of_a_saved_adapter_opens_with_its_model(tmp_path: Path):
    from importlib.resources import files

    base = str(files("fastft.models") / "tiny")
    model, tokenizer = FastModel.from_pretrained(base, max_seq_length=64, load_in_4bit=False, device="cpu")
    adapted = FastModel.get_peft_model(model, r=4, target_modules=["q_proj", "down_proj"])
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    ids = torch.arange(5, 25).unsqueeze(0)
    expected = FastModel.for_inference(adapted)(input_ids=ids).logits
    adapted.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    opened, its_tokenizer = FastLanguageModel.from_pretrained(
        str(tmp_path), max_seq_length=64, load_in_4bit=False, device="cpu"
    )
    assert isinstance(opened, PeftModel)
    assert opened.training
    assert its_tokenizer.get_vocab() == tokenizer.get_vocab()
    loss = FastModel.for_training(opened)(input_ids=ids, labels=ids).loss
    loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in opened.parameters())
    assert not ledger_of(opened).fallbacks
    torch.testing.assert_close(FastModel.for_inference(opened)(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ModelError, match="has adapters already"):
        FastLanguageModel.get_peft_model(opened)


def test_patches_that_nobody_needs_do_nothing():
    assert fastft.PatchDPOTrainer() is None
    assert fastft.PatchKTOTrainer() is None
    assert fastft.FastModel is FastLanguageModel
