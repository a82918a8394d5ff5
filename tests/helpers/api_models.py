"""Models as the public API makes them, and whether they train as stock PEFT does."""

import copy
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

from fastft import FastLanguageModel, unpatch_model
from fastft.models.shapes import SHAPES
from peft_models import gradients_on, randomize_adapters

# Looser than in tests/engine: with the shapes' own small weights, k's gradient is a difference of nearly equal numbers.
TOLERANCE = 1e-4


def load(model: str = "toy-llama", **more: Any) -> Any:
    return FastLanguageModel.from_pretrained(
        model, **{"max_seq_length": 64, "load_in_4bit": False, "dtype": "fp32", **more}
    )[0]


def stock_model(**lora: Any) -> Any:
    config = SHAPES["toy-llama"].to_config()
    torch.manual_seed(1)
    base = transformers.AutoModelForCausalLM.from_config(config)
    settings = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **lora}
    return peft.get_peft_model(base, peft.LoraConfig(**settings)).train()


def olmo2_config() -> Any:
    return transformers.Olmo2Config(
        vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip


def make_batch(model: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids_BS = torch.randint(0, 512, (3, 15), generator=generator)
    mask_BS = torch.ones_like(ids_BS)
    mask_BS[1, 9:] = 0
    batch = {"input_ids": ids_BS, "labels": ids_BS.masked_fill(mask_BS == 0, -100), "attention_mask": mask_BS}
    return {name: tensor.to(next(model.parameters()).device) for name, tensor in batch.items()}


def gradients_of(model: Any) -> tuple[float, dict[str, Tensor]]:
    return gradients_on(model, make_batch(model))


def assert_equals_stock(model: Any) -> None:
    """With B ≠ 0: at first B is zero, and so is A's gradient."""
    randomize_adapters(model)
    stock = copy.deepcopy(model)
    unpatch_model(stock)
    loss, gradients = gradients_of(model)
    expected_loss, expected = gradients_of(stock)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        assert (gradients[name] - gradient).norm() < TOLERANCE * gradient.norm(), name
