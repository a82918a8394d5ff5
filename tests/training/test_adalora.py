"""AdaLoRA through a `Trainer`: PEFT's own allocation, stock and patched."""

import contextlib
from importlib.resources import files
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from fastft import AdaLoraCallback, ledger_of, patch_hf_training
from fastft.engine.state import state_of
from fastft.errors import ConfigError

TINY = str(files("fastft.models") / "tiny")
STEPS = 12


def make(folder: Path, *, callback: bool = True, config: Any = None, **lora: Any) -> Any:
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    chosen = config or peft.AdaLoraConfig(
        init_r=6, target_r=2, tinit=2, tfinal=3, deltaT=1, total_step=STEPS, task_type="CAUSAL_LM",
        target_modules=["q_proj", "v_proj", "down_proj"], **lora,
    )  # fmt: skip
    model = peft.get_peft_model(base, chosen)
    generator = torch.Generator().manual_seed(1)
    rows = [{"input_ids": (ids := torch.randint(3, 500, (24,), generator=generator)), "labels": ids} for _ in range(64)]
    return transformers.Trainer(
        model=model,
        train_dataset=rows,
        callbacks=[AdaLoraCallback()] if callback else [],
        args=transformers.TrainingArguments(
            output_dir=str(folder), max_steps=STEPS, logging_steps=1, report_to=[], save_strategy="no", seed=1,
            use_cpu=not torch.cuda.is_available(), learning_rate=5e-3, disable_tqdm=True,
            per_device_train_batch_size=4,
        ),
    )  # fmt: skip


def ranks(model: Any) -> dict[str, int]:
    """How many singular values are left of each adapter."""
    values = {name: p for name, p in model.named_parameters() if name.endswith("lora_E.default")}
    return {name: int((value != 0).sum()) for name, value in values.items()}


def test_ranks_and_losses_are_those_of_stock_peft(tmp_path):
    results = []
    for fast in (False, True):
        with patch_hf_training(backend="eager") if fast else contextlib.nullcontext():
            trainer = make(tmp_path)
            trainer.train()
            results.append((ranks(trainer.model), [log["loss"] for log in trainer.state.log_history if "loss" in log]))
            if fast:
                # The model's loss has AdaLoRA's penalty in it, by PEFT's own code.
                assert ledger_of(trainer.model).paths["lm_head"].path == "fused (eager)"
                reading = state_of(trainer.model.get_base_model()).settings.reading
                assert reading.count <= 3, "a step makes nothing be read anew"
    (stock, losses), (fast_ranks, fast_losses) = results
    assert fast_ranks == stock
    assert fast_losses == pytest.approx(losses, rel=1e-5)
    assert sum(stock.values()) == 2 * len(stock), "the budget"
    assert len(set(stock.values())) > 1, "some adapters got more than others"


def test_without_the_callback_nothing_is_pruned(tmp_path):
    trainer = make(tmp_path, callback=False)
    trainer.train()
    assert set(ranks(trainer.model).values()) == {6}


def test_a_schedule_of_another_length_is_an_error(tmp_path):
    config = peft.AdaLoraConfig(
        total_step=STEPS + 1, tinit=2, tfinal=3, task_type="CAUSAL_LM", target_modules=["q_proj"]
    )
    with pytest.raises(ConfigError, match=r"total_step is not the number.*12"):
        make(tmp_path, config=config).train()


def test_another_adapter_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="needs a model with an AdaLoRA adapter"):
        make(tmp_path, config=peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).train()
