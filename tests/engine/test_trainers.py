"""transformers' and TRL's trainers, written for stock PEFT: the same losses step by step with the patch as without."""

import contextlib
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import tokenizers
import torch
import transformers
from torch import Tensor

from fastft import ledger_of, patch_hf_training
from fastft.engine.bank import bank_of

STEPS = 3
LORA = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}


def ragged_rows() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(5)
    rows = []
    for index in range(24):
        ids = torch.randint(0, 512, (4 + (7 * index) % 17,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return rows


def pad(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    width = max(len(row["input_ids"]) for row in rows)

    def column(name: str, filler: int) -> Tensor:
        return torch.tensor([row[name] + [filler] * (width - len(row[name])) for row in rows])

    mask = torch.tensor([[1] * len(r["input_ids"]) + [0] * (width - len(r["input_ids"])) for r in rows])
    return {"input_ids": column("input_ids", 0), "labels": column("labels", -100), "attention_mask": mask}


def common(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 0.02,
        "logging_steps": 1, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "seed": 7,
        "use_cpu": not torch.cuda.is_available(),
    }  # fmt: skip


def history(trainer: Any) -> list[tuple[float, float]]:
    return [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log]


def assert_equal_histories(stock: list[Any], fused: list[Any], rel: float) -> None:
    assert len(stock) == len(fused) == STEPS
    assert abs(stock[0][0] - stock[-1][0]) > 0.1, "nothing was learnt, so equal losses prove little"
    for expected, got in zip(stock, fused, strict=True):
        assert got == pytest.approx(expected, rel=rel)


def patched(on: bool) -> Any:
    return patch_hf_training(backend="eager") if on else contextlib.nullcontext()


def banked(model: Any) -> int:
    """How many adapter matrices lie in one buffer: whatever a trainer holds, none may be refused for it."""
    banks = [bank_of(p) for p in model.parameters() if p.requires_grad]
    return sum(bank is not None and bank.holds() for bank in banks)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_transformers_trainer(checkpointing, toy_base, tmp_path):
    """Accumulation over ragged micro-batches: the loss counts tokens, not batches."""
    histories, adapters, ledgers = [], [], []
    for on in (False, True):
        with patched(on):
            model = peft.get_peft_model(toy_base(), peft.LoraConfig(**LORA, target_modules="all-linear"))
            trainer = transformers.Trainer(
                model=model,
                args=transformers.TrainingArguments(
                    **common(tmp_path), gradient_accumulation_steps=2, gradient_checkpointing=checkpointing
                ),
                train_dataset=ragged_rows(),
                data_collator=pad,
            )
            trainer.train()
            assert banked(model) == (42 if on else 0)
            histories.append(history(trainer))
            ledgers.append(ledger_of(model))
            folder = tmp_path / f"adapter-{on}"
            trainer.save_model(str(folder))
        adapters.append(peft.PeftModel.from_pretrained(toy_base(), folder))
    assert ledgers[0] is None
    assert ledgers[1].counts() == {
        "decoder_layer: fused (eager)": 3, "head_and_loss: fused (eager)": 1, "norm: fused (eager)": 1,
    }  # fmt: skip
    assert_equal_histories(*histories, rel=1e-4)
    batch = {name: tensor.to(adapters[0].device) for name, tensor in pad(ragged_rows()[:3]).items()}
    with torch.no_grad():
        stock_logits, fused_logits = (model.eval()(**batch).logits for model in adapters)
    torch.testing.assert_close(fused_logits, stock_logits, rtol=1e-2, atol=1e-2)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_evaluation_inside_training(toy_base, tmp_path):
    losses = []
    for on in (False, True):
        with patched(on):
            model = peft.get_peft_model(toy_base(), peft.LoraConfig(**LORA, target_modules="all-linear"))
            trainer = transformers.Trainer(
                model=model,
                args=transformers.TrainingArguments(**common(tmp_path), eval_strategy="steps", eval_steps=1),
                train_dataset=ragged_rows()[:16],
                eval_dataset=ragged_rows()[16:],
                data_collator=pad,
                compute_metrics=lambda prediction: {"width": prediction.predictions.shape[-1]},
            )
            trainer.train()
            logs = [log for log in trainer.state.log_history if "eval_loss" in log]
            assert all(log["eval_width"] == 512 for log in logs)
            losses.append([log["eval_loss"] for log in logs])
    assert len(losses[0]) == STEPS
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """One token a letter."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + [" ", "."]
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{letter: 3 + n for n, letter in enumerate(letters)}}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


@pytest.mark.parametrize("options", [{}, {"packing": True, "max_length": 32}, {"bf16": True}], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_trl_sft_trainer(options, tokenizer, toy_base, tmp_path):
    """With its defaults, gradient checkpointing among them; TRL puts its own head over the model's `forward`."""
    trl = pytest.importorskip("trl")
    words = ["the cat sat on the mat.", "a dog ran.", "birds sing in the morning light.", "we read."] * 6
    histories, ledgers = [], []
    for on in (False, True):
        rows = datasets.Dataset.from_list([{"prompt": text[:5], "completion": text[5:]} for text in words])
        with patched(on):
            trainer = trl.SFTTrainer(
                model=toy_base(),
                args=trl.SFTConfig(**common(tmp_path), **{"bf16": False, **options}),
                train_dataset=rows,
                processing_class=tokenizer,
                peft_config=peft.LoraConfig(**LORA, target_modules="all-linear"),
            )
            assert trainer.args.gradient_checkpointing
            trainer.train()
            assert banked(trainer.model) == (42 if on else 0)
            histories.append(history(trainer))
            ledgers.append(ledger_of(trainer.model))
            folder = tmp_path / f"adapter-{on}"
            trainer.save_model(str(folder))
        loaded = peft.PeftModel.from_pretrained(toy_base(), folder)
        assert sum("lora_B" in name and bool(p.any()) for name, p in loaded.named_parameters()) == 21
    assert ledgers[0] is None
    assert {path.path for path in ledgers[1].paths.values()} == {"fused (eager)"}
    assert_equal_histories(*histories, rel=1e-2 if options.get("bf16") else 1e-4)
