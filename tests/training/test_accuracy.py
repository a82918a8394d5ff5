from importlib.resources import files
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastft.data.arithmetic import generate
from fastft.data.formats import Message, conversation_of
from fastft.errors import DataError
from fastft.models.kv_cache import KV_CACHE
from fastft.training.accuracy import evaluate_exact_match, generate_answers

FOLDER = str(files("fastft.models") / "tiny")
ROWS = generate("test", 8)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER, local_files_only=True, dtype=torch.float32)


def test_generation_agrees_with_transformers(model: Any, tokenizer: Any) -> None:
    """Left padding, positions, cache and stopping, against `model.generate` one prompt at a time."""
    chats = [
        (Message("user", "12 + 7"),),
        (Message("user", "Hello!"),),
        (Message("user", "小明有9个苹果，送给小红4个苹果。小明还剩多少个苹果？"),),
    ]
    answers = generate_answers(model, tokenizer, chats, max_new_tokens=24, batch_size=3)
    for chat, answer in zip(chats, answers, strict=True):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": chat[0].content}],
            add_generation_prompt=True, return_tensors="pt", return_dict=True,
        )  # fmt: skip
        output = model.generate(**prompt, do_sample=False, max_new_tokens=24)
        assert answer == tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answers[0] == "12 + 7 = 19"


def test_evaluation_is_deterministic_and_leaves_no_trace(
    model: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    # What would sample, warn or cut if the generation config had a say.
    generation = model.generation_config
    saved = generation.to_dict()
    generation.update(do_sample=True, temperature=5.0, top_p=0.5, repetition_penalty=3.0, max_length=4)
    tokenizer.padding_side = "right"
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    chats = [conversation_of(row, where="row").messages[:-1] for row in ROWS[:6]]
    try:
        first = generate_answers(model, tokenizer, chats, max_new_tokens=16, batch_size=4)
        assert first == generate_answers(model, tokenizer, chats, max_new_tokens=16, batch_size=4)
        assert any(first)
        assert [module.training for module in model.modules()] == modes
    finally:
        model.eval()
        generation.update(**saved)
    assert tokenizer.padding_side == "right"
    assert all(parameter.grad is None for parameter in model.parameters())
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    assert not caplog.records


def test_evaluation_counts_right_answers(tokenizer: Any) -> None:
    """A model that recites the answers scores 1; with half of them changed it scores a half."""
    rows = ROWS

    def score(answers: list[str]) -> float:
        return evaluate_exact_match(_Recital(tokenizer, rows, answers), tokenizer, rows, batch_size=3)

    right = [row["output"] for row in rows]
    assert score(right) == 1.0
    assert score([answer if index % 2 else "#### 1" for index, answer in enumerate(right)]) == 0.5
    assert score(["" for _ in rows]) == 0.0


def test_nothing_to_evaluate_is_refused(model: Any, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="nothing to evaluate"):
        evaluate_exact_match(model, tokenizer, [])


class _Recital(nn.Module):
    """Answers each known prompt with a fixed text: the logits point at the text's next token."""

    def __init__(self, tokenizer: Any, rows: list[dict[str, str]], answers: list[str]) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.tokenizer = tokenizer
        self.answers = {
            conversation_of(row, where="row").messages[0].content: a for row, a in zip(rows, answers, strict=True)
        }

    def forward(self, input_ids: Any, **given: Any) -> Any:
        rests = given[KV_CACHE]
        if rests is None:
            prompts = self.tokenizer.batch_decode(input_ids)
            texts = [next(a for question, a in self.answers.items() if question in prompt) for prompt in prompts]
            rests = [
                [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]
                for text in texts
            ]
        logits = torch.zeros(len(input_ids), 1, len(self.tokenizer))
        for row, rest in enumerate(rests):
            logits[row, 0, rest.pop(0) if rest else self.tokenizer.pad_token_id] = 1.0
        return type("Output", (), {"logits": logits, KV_CACHE: rests})()
