"""`fastft.SFTTrainer` and `fastft.Trainer`: the arguments of older tutorials, and else nothing but today's trainers."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trl
from datasets import Dataset

import fastft
import fastft.hardware
import fastft.trainer as named
from fastft import FastLanguageModel, SFTTrainer, Trainer
from fastft.errors import ConfigError

ROWS = [{"text": f"{i} and 1 make {i + 1}"} for i in range(16)]


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(named, "_said", set())


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return FastLanguageModel.from_pretrained("tiny", max_seq_length=64, load_in_4bit=False, device="cpu")


@pytest.fixture(scope="module")
def model(loaded: tuple[Any, Any]) -> Any:
    return FastLanguageModel.get_peft_model(loaded[0], r=4)


def arguments(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "max_steps": 2, "logging_steps": 1, "report_to": [], "use_cpu": True, "seed": 3,
        "learning_rate": 1e-3, "save_strategy": "no", "disable_tqdm": True, **more,
    }  # fmt: skip


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage() for record in caplog.records if record.name == "fastft" and record.levelname == "WARNING"
    ]


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def test_an_older_recipe_trains_as_todays(loaded, model, tmp_path, caplog):
    plain = transformers.TrainingArguments(**arguments(tmp_path))
    old = SFTTrainer(
        model=model, tokenizer=loaded[1], train_dataset=ROWS, dataset_text_field="text", max_seq_length=32,
        packing=False, args=transformers.TrainingArguments(**arguments(tmp_path)),
    )  # fmt: skip
    assert isinstance(old, trl.SFTTrainer)
    assert isinstance(old.args, trl.SFTConfig)
    assert (old.args.max_length, old.args.packing, old.args.dataset_text_field) == (32, False, "text")
    # What TrainingArguments said by default holds, not what SFTConfig would.
    same = ("gradient_checkpointing", "bf16", "logging_steps", "lr_scheduler_type", "warmup_steps", "optim", "seed")
    assert {name: getattr(old.args, name) for name in same} == {name: getattr(plain, name) for name in same}
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    before = losses(old)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state[name])
    today = trl.SFTTrainer(
        model=model, processing_class=loaded[1], train_dataset=Dataset.from_list(ROWS),
        args=trl.SFTConfig(**arguments(tmp_path, max_length=32, gradient_checkpointing=False, bf16=False)),
    )  # fmt: skip
    assert losses(today) == pytest.approx(before, rel=1e-5)
    assert warnings(caplog) == [
        "tokenizer is called processing_class today",
        "TrainingArguments are taken for an SFTConfig with the same values",
        "dataset_text_field, max_seq_length (max_length), packing: fields of SFTConfig today",
    ]


def test_todays_arguments_are_handed_on_in_silence(loaded, model, tmp_path, caplog):
    config = trl.SFTConfig(**arguments(tmp_path, max_length=32, bf16=False))
    trainer = SFTTrainer(model, config, train_dataset=Dataset.from_list(ROWS), processing_class=loaded[1])
    assert trainer.args is config
    assert not warnings(caplog)


def test_two_values_for_one_thing_are_an_error(loaded, model, tmp_path):
    config = trl.SFTConfig(**arguments(tmp_path, max_length=32, bf16=False))
    with pytest.raises(ConfigError, match="max_length is given twice"):
        SFTTrainer(model=model, args=config, tokenizer=loaded[1], train_dataset=ROWS, max_seq_length=48)
    assert config.max_length == 32
    with pytest.raises(ConfigError, match="tokenizer and processing_class"):
        SFTTrainer(model=model, args=config, tokenizer=loaded[1], processing_class=object(), train_dataset=ROWS)
    with pytest.raises(ConfigError, match="tokenizer and processing_class"):
        Trainer(model=model, tokenizer=loaded[1], processing_class=object())


def test_what_has_no_effect_any_more_is_said(loaded, model, tmp_path, caplog):
    config = trl.SFTConfig(**arguments(tmp_path, max_length=32, bf16=False))
    SFTTrainer(model=model, args=config, tokenizer=loaded[1], train_dataset=ROWS, chars_per_token=3.6)
    assert "chars_per_token has no effect" in caplog.text


def test_what_nobody_knows_is_an_error_of_trls(loaded, model, tmp_path):
    config = trl.SFTConfig(**arguments(tmp_path, max_length=32, bf16=False))
    with pytest.raises(TypeError, match="max_sequence"):
        SFTTrainer(model=model, args=config, train_dataset=ROWS, max_sequence=3)


def test_the_plain_trainer_takes_a_tokenizer_and_rows(loaded, model, tmp_path):
    rows = [{"input_ids": [5 + i] * 8, "labels": [5 + i] * 8} for i in range(8)]
    trainer = Trainer(
        model=model, tokenizer=loaded[1], train_dataset=rows, eval_dataset=rows[:2],
        args=transformers.TrainingArguments(**arguments(tmp_path)),
    )  # fmt: skip
    assert isinstance(trainer, transformers.Trainer)
    assert trainer.processing_class is loaded[1]
    assert len(losses(trainer)) == 2


def test_bf16_trains_on_a_cpu(monkeypatch):
    monkeypatch.setattr("fastft.hardware.detect_device", lambda _: fastft.hardware.Device("cpu", "C", None, None, 1, 1))
    assert fastft.is_bfloat16_supported()
    for capability, supported in (("7.5", False), ("8.0", True), ("9.0", True)):
        device = fastft.hardware.Device("cuda", "G", capability, 1, 1, 1)
        monkeypatch.setattr("fastft.hardware.detect_device", lambda _, device=device: device)
        assert fastft.is_bfloat16_supported() is supported
