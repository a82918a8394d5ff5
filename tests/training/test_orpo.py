"""The one step of TRL's ORPO that is fastft's."""

import gc
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from fastft import ledger_of, patch_hf_training
from fastft.engine.trl_head import trls_head

TINY = str(files("fastft.models") / "tiny")
ROWS = Dataset.from_list([{"prompt": f"{i} and", "chosen": f" {i}" * (1 + i % 3), "rejected": " no"} for i in range(8)])


def make(folder: Path, kind: Any = ORPOTrainer) -> Any:
    return kind(
        TINY,
        args=ORPOConfig(
            output_dir=str(folder), max_steps=2, logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(), bf16=False, model_init_kwargs={"dtype": "float32"},
            per_device_train_batch_size=2, max_length=32,
        ),
        train_dataset=ROWS,
        processing_class=AutoTokenizer.from_pretrained(TINY),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )  # fmt: skip


def test_the_logits_are_never_asked_for(tmp_path, monkeypatch):
    with patch_hf_training(backend="eager"):
        trainer = make(tmp_path)
        vocabulary = trainer.model.get_output_embeddings().weight.shape[0]
        batch = next(iter(trainer.get_train_dataloader()))
        products: list[int] = []
        product = torch.mm
        monkeypatch.setattr(torch, "mm", lambda *a, **k: (made := product(*a, **k), products.append(made.numel()))[0])
        trainer.model.get_base_model().__dict__["_fastft"].settings.loss_chunk_tokens = 4
        loss, metrics = trainer.get_batch_loss_metrics(trainer.model, batch)
        loss.backward()
        assert 4 * vocabulary in products
        tokens = 2 * batch["chosen_input_ids"].shape[1]
        assert all(size < tokens * vocabulary for size in products)
        assert ledger_of(trainer.model).paths["lm_head"].path == "fused (eager)"
        assert metrics["logits/chosen"] != 0


def test_an_undo_gives_trls_step_back(tmp_path):
    init = transformers.Trainer.__init__
    patch = patch_hf_training(backend="eager")
    trainer = make(tmp_path)
    model = trainer.model.get_base_model()
    assert trls_head(model) is not None
    assert "concatenated_forward" in trainer.__dict__
    patch.undo()
    assert transformers.Trainer.__init__ is init
    assert "concatenated_forward" not in trainer.__dict__
    assert "forward" not in model.__dict__
    trainer.train()


def test_a_trainer_with_its_own_step_keeps_it(tmp_path):
    class Own(ORPOTrainer):
        def concatenated_forward(self, model: Any, batch: Any) -> Any:
            return super().concatenated_forward(model, batch)

    with patch_hf_training(backend="eager"):
        trainer = make(tmp_path, Own)
        assert "concatenated_forward" not in trainer.__dict__
        assert trls_head(trainer.model.get_base_model()) is None
        trainer.train()


def test_a_trainer_that_is_gone_is_forgotten(tmp_path):
    with patch_hf_training(backend="eager") as patch:
        trainer = make(tmp_path)
        assert len(patch._adapted) == 1
        trainer.accelerator.free_memory()
        del trainer
        gc.collect()
        assert len(patch._adapted) == 0


def test_other_trainers_are_left_alone(tmp_path):
    with patch_hf_training(backend="eager") as patch:
        transformers.Trainer(
            model=torch.nn.Linear(2, 2), args=transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
        )
        assert not patch._adapted
