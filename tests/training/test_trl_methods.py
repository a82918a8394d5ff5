"""TRL's own trainers, stock and with fastft's one line: every number that they log is the same, and all runs fused."""

import contextlib
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
import trl.experimental.orpo
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer

from fastft import ledger_of, patch_hf_training

TINY = str(files("fastft.models") / "tiny")
UPDATES = 5
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LN_2 = 0.6931472


def _sums(number: int) -> tuple[str, str, str]:
    """A prompt, a right answer, and a wrong one, each of another length."""
    right = f" {number + 3}" * (1 + number % 4)
    return f"{number} and 3 make", right, f" {number}" * (1 + number % 3)


def _digits(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(letter.isdigit() for letter in completion)) for completion in completions]


def _rows(method: str) -> Dataset:
    made = []
    for number in range(32):
        prompt, right, wrong = _sums(number)
        made.append({
            "sft": {"text": prompt + right},
            "dpo": {"prompt": prompt, "chosen": right, "rejected": wrong},
            "orpo": {"prompt": prompt, "chosen": right, "rejected": wrong},
            "reward": {"chosen": prompt + right, "rejected": prompt + wrong},
            "kto": {"prompt": prompt, "completion": right if number % 2 else wrong, "label": bool(number % 2)},
        }.get(method, {"prompt": prompt}))  # fmt: skip
    return Dataset.from_list(made)


_SAMPLED = {"max_completion_length": 8, "num_generations": 4, "temperature": 0.9, "beta": 0.05}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("SFT", {"max_length": 64}),
    "sft packed": ("SFT", {"max_length": 64, "packing": True}),
    "sft padding-free": ("SFT", {"max_length": None, "padding_free": True}),
    "sft dft": ("SFT", {"max_length": 64, "loss_type": "dft"}),
    "dpo": ("DPO", {"max_length": 64}),
    "dpo precomputed": ("DPO", {"max_length": 64, "precompute_ref_log_probs": True}),
    "dpo ipo": ("DPO", {"max_length": 64, "loss_type": "ipo"}),
    "kto": ("KTO", {"max_length": 64}),
    "reward": ("Reward", {"max_length": 64}),
    "orpo": ("ORPO", {"max_length": 64, "model_init_kwargs": {"dtype": "float32"}}),
    "grpo": ("GRPO", _SAMPLED),
    "grpo entropy": ("GRPO", {**_SAMPLED, "top_entropy_quantile": 0.5}),
    "rloo": ("RLOO", _SAMPLED),
}


def train(method: str, folder: Path, *, fast: bool, **more: Any) -> tuple[list[dict[str, Any]], Any]:
    """What a trainer logged, and its model."""
    kind, settings = METHODS[method]
    name = kind.lower()
    torch.manual_seed(0)
    with patch_hf_training(backend="eager") if fast else contextlib.nullcontext():
        arguments: dict[str, Any] = {
            "output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": UPDATES, "logging_steps": 1,
            "learning_rate": 1e-3, "report_to": [], "save_strategy": "no", "seed": 1, "disable_tqdm": True,
            "use_cpu": not torch.cuda.is_available(), "bf16": False, "optim": "sgd", **settings, **more,
        }  # fmt: skip
        given = {"reward_funcs": _digits} if name in ("grpo", "rloo") else {}
        home = trl.experimental.orpo if name == "orpo" else trl
        if name == "orpo":  # it wants the tokenizer, and on a CPU its default is bf16
            given["processing_class"] = AutoTokenizer.from_pretrained(TINY)
        trainer = getattr(home, f"{kind}Trainer")(
            TINY,
            args=getattr(home, f"{kind}Config")(**arguments),
            train_dataset=_rows(name),
            peft_config=LoraConfig(
                r=8, lora_alpha=16, target_modules=ALL, task_type="SEQ_CLS" if name == "reward" else "CAUSAL_LM"
            ),
            **given,
        )
        trainer.train()
        ledger = ledger_of(trainer.model)
        if fast:
            assert not ledger.fallbacks
            assert all(path.path.startswith("fused") for path in ledger.paths.values())
        return trainer.state.log_history, trainer.model


def numbers(log: dict[str, Any]) -> dict[str, float]:
    return {
        name: value
        for name, value in log.items()
        if isinstance(value, float) and not any(word in name for word in ("time", "second", "flos"))
    }


@pytest.fixture
def both(tmp_path: Path) -> Callable[..., tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    def run(method: str, **more: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        stock, fast = (train(method, tmp_path, fast=fast, **more)[0] for fast in (False, True))
        return stock, fast

    return run


@pytest.mark.parametrize("method", METHODS)
def test_all_that_a_trainer_logs_is_stocks(method, both):
    stock, fast = both(method)
    assert len(stock) == UPDATES + 1
    assert any(log.get("grad_norm") for log in stock), "nothing was trained"
    for one, other in zip(stock, fast, strict=True):
        expected, found = numbers(one), numbers(other)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if name.endswith("accuracies") and abs(expected["rewards/margins"]) < 1e-6:
                continue  # of equal rewards, rounding says which is larger
            # Differences of log-probabilities lose what both have in common.
            assert found[name] == pytest.approx(value, rel=2e-5, abs=2e-5), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_first_dpo_loss_is_ln_2_under_autocast(checkpointing, tmp_path):
    """fp32 weights computed in bf16: TRL's default on a GPU."""
    log, model = train("dpo", tmp_path, fast=True, bf16=True, gradient_checkpointing=checkpointing)
    assert log[0]["loss"] == pytest.approx(LN_2, abs=1e-6)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_trls_defaults_run_fused_under_autocast(tmp_path):
    stock, _ = train("sft", tmp_path, fast=False, bf16=True)
    fast, _ = train("sft", tmp_path, fast=True, bf16=True)
    for one, other in zip(stock[:-1], fast[:-1], strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=5e-3)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=5e-2)


def test_a_ref_adapter_is_the_reference_of_one_that_is_trained_further(tmp_path):
    """TRL copies a trained adapter as `ref`, and switches to it for the reference."""
    _, first = train("dpo", tmp_path / "first", fast=False)
    first.save_pretrained(tmp_path / "adapter")
    results = []
    for fast in (False, True):
        torch.manual_seed(0)
        with patch_hf_training(backend="eager") if fast else contextlib.nullcontext():
            from peft import AutoPeftModelForCausalLM

            model = AutoPeftModelForCausalLM.from_pretrained(
                tmp_path / "adapter", is_trainable=True, dtype=torch.float32
            )
            trainer = trl.DPOTrainer(
                model,
                args=trl.DPOConfig(
                    output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=3, logging_steps=1, report_to=[],
                    save_strategy="no", seed=1, use_cpu=not torch.cuda.is_available(), bf16=False, max_length=64,
                    disable_tqdm=True, optim="sgd", learning_rate=1e-3,
                ),
                train_dataset=_rows("dpo"),
            )  # fmt: skip
            trainer.train()
            results.append([numbers(log) for log in trainer.state.log_history])
            assert "ref" in trainer.model.peft_config
            assert fast == (ledger_of(trainer.model) is not None)
    assert results[1][0]["loss"] == pytest.approx(LN_2, abs=1e-6)
    for one, other in zip(*results, strict=True):
        assert other == pytest.approx(one, rel=2e-5, abs=2e-5)
