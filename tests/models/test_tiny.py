import hashlib
import importlib.util
import math
import sys
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastft.data.arithmetic import generate
from fastft.data.encoding import IGNORE_INDEX, encode
from fastft.data.sources import embedded_conversations
from fastft.training.accuracy import evaluate_exact_match

FOLDER = Path(str(files("fastft.models"))) / "tiny"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER, local_files_only=True, dtype=torch.float32)


@pytest.fixture(scope="module")
def build_tiny() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "tools" / "build_tiny.py"
    spec = importlib.util.spec_from_file_location("build_tiny", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["build_tiny"] = module
    spec.loader.exec_module(module)
    return module


def test_the_folder_is_small_and_complete() -> None:
    names = {path.name for path in FOLDER.iterdir()}
    assert names == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 8 * 2**20


def test_the_shape(model: Any, tokenizer: Any) -> None:
    assert 1_000_000 <= model.num_parameters() <= 3_000_000
    config = model.config
    assert config.model_type == "llama"
    assert config.head_dim % 8 == 0
    assert config.num_attention_heads % config.num_key_value_heads == 0
    assert config.num_key_value_heads < config.num_attention_heads
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert len(tokenizer) == config.vocab_size == 2048


def test_the_model_card_names_these_weights() -> None:
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name in ("model.safetensors", "tokenizer.json"):
        assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() in card
    assert "license: apache-2.0" in card


@pytest.mark.parametrize("text", ["小明有12个苹果，又买了7个。", "Tom's box: 12 + 7 = 19", "龘 🦊 ñ\n\ttab  two"])
def test_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_every_digit_is_one_token(tokenizer: Any) -> None:
    assert tokenizer.tokenize("1234567890") == list("1234567890")


def test_the_chat_template(tokenizer: Any) -> None:
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 + 3?"},
        {"role": "assistant", "content": "5"},
    ]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False)
    assert rendered == (
        "<|bos|><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2 + 3?<|im_end|>\n"
        "<|im_start|>assistant\n5<|im_end|>\n"
    )
    prompt = tokenizer.apply_chat_template(chat[:2], tokenize=False, add_generation_prompt=True)
    assert rendered.startswith(prompt)
    assert prompt.endswith("<|im_start|>assistant\n")
    # The special tokens are single tokens, and tokenizing the text adds no second bos.
    ids = tokenizer(rendered)["input_ids"]
    assert ids == tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids.count(tokenizer.eos_token_id) == 3


def test_only_the_answer_is_labelled(tokenizer: Any) -> None:
    conversations = embedded_conversations("train", 64, 0)
    encoded = encode(conversations, tokenizer, max_tokens=256)
    assert encoded.truncated == encoded.dropped == 0
    lengths = []
    for conversation, example in zip(conversations, encoded.examples, strict=True):
        labelled = [label for label in example.labels if label != IGNORE_INDEX]
        assert tokenizer.decode(labelled) == conversation.messages[-1].content + "<|im_end|>"
        lengths.append(len(example.input_ids))
    assert 80 <= sum(lengths) / len(lengths) <= 200
    assert max(lengths) <= 200


@torch.no_grad()
def test_the_base_knows_arithmetic_sentences(model: Any, tokenizer: Any) -> None:
    for text in ("Tom has 12 apples. Anna gives Tom 7 more apples. So 12 + 7 = 19 apples.", "小明有9个苹果。9 - 4 = 5"):
        ids_BS = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
        loss = model(input_ids=ids_BS, labels=ids_BS).loss.item()
        assert loss < 0.35 * math.log(model.config.vocab_size)


def test_the_base_fails_the_task(model: Any, tokenizer: Any) -> None:
    assert evaluate_exact_match(model, tokenizer, generate("test", 24)) < 0.2


def test_building_twice_gives_the_same_weights(build_tiny: ModuleType, tmp_path: Path) -> None:
    recipe = build_tiny.Pretraining(steps=2, batch_size=2, corpus_documents=6000, seed=5)
    losses = [build_tiny.build(tmp_path / name, recipe) for name in ("a", "b")]
    assert losses[0] == losses[1]
    for name in ("model.safetensors", "tokenizer.json", "config.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    other = build_tiny.Pretraining(steps=2, batch_size=2, corpus_documents=6000, seed=6)
    build_tiny.build(tmp_path / "c", other)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() != (tmp_path / "c" / "model.safetensors").read_bytes()
