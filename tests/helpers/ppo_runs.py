"""Small PPO runs for tests: the embedded model, and what a test changes of them."""

import contextlib
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fastft import PPOConfig, PPOTrainer, patch_hf_training

TINY = str(files("fastft.models") / "tiny")
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROMPTS = [{"prompt": f"{number} and {number + 3}" + " make" * (number % 3)} for number in range(32)]
TOKENIZER = AutoTokenizer.from_pretrained(TINY)


def digits(completions: list[str], **_: Any) -> list[float]:
    """One, and how many digits each has: responses differ, and none is worth nothing."""
    return [1.0 + sum(letter.isdigit() for letter in completion) for completion in completions]


def base() -> Any:
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)


def classifier(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained(TINY, num_labels=1, dtype=torch.float32)


def lora(**more: Any) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=ALL, task_type="CAUSAL_LM", **more)


def settings(folder: Path, **more: Any) -> PPOConfig:
    return PPOConfig(**{
        "output_dir": str(folder), "use_cpu": not torch.cuda.is_available(), "bf16": False, "report_to": [],
        "save_strategy": "no", "disable_tqdm": True, "seed": 1, "learning_rate": 1e-3, "max_steps": 2,
        "per_device_train_batch_size": 4, "response_length": 6, "stop_token": "eos", "temperature": 1.0,
        "gradient_checkpointing": False, "num_ppo_epochs": 2, **more,
    })  # fmt: skip


def make(folder: Path, *, model: Any = None, peft_config: Any = "lora", **given: Any) -> PPOTrainer:
    trainers_own = (
        "ref_model",
        "reward_model",
        "value_model",
        "data_collator",
        "eval_dataset",
        "callbacks",
        "reward_funcs",
    )
    own = {name: given.pop(name) for name in trainers_own if name in given}
    if "reward_model" not in own:
        own.setdefault("reward_funcs", digits)
    rows = given.pop("train_dataset", PROMPTS)
    model = base() if model is None else model
    config = lora() if isinstance(peft_config, str) else peft_config
    tokenizer = given.pop("processing_class", TOKENIZER)
    return PPOTrainer(settings(folder, **given), tokenizer, model, train_dataset=rows, peft_config=config, **own)


def fused(fast: bool) -> Any:
    return patch_hf_training(backend="eager") if fast else contextlib.nullcontext()


def trained_state(trainer: PPOTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def logs(trainer: PPOTrainer) -> list[dict[str, float]]:
    return [{name: value for name, value in log.items() if name != "eps"} for log in trainer.state.log_history]
