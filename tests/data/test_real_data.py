"""Real rows through real templates and tokenizers: the labelled tokens are the answers, word for word."""

import json
import unicodedata
from functools import cache
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fastft.data.encoding import IGNORE_INDEX, TEMPLATE_DATE, Example, encode
from fastft.data.formats import Conversation, conversation_of, load_rows
from fastft.errors import DataError

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the shared test data is not here")

# What closes an answer, and the special tokens of the model that the template belongs to.
TEMPLATES = {
    "Qwen-Qwen2.5-7B-Instruct": ("<|im_end|>", []),
    "google-gemma-2-2b-it": ("<end_of_turn>", ["<start_of_turn>", "<end_of_turn>"]),
    "meta-llama-Llama-3.1-8B-Instruct": ("<|eot_id|>", ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]),
    "meta-llama-Llama-3.2-3B-Instruct": ("<|eot_id|>", ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]),
    "meta-llama-Llama-3.3-70B-Instruct": ("<|eot_id|>", ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]),
    "microsoft-Phi-3.5-mini-instruct": ("<|end|>", ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]),
    "mistralai-Mistral-Nemo-Instruct-2407": ("eos", ["[INST]", "[/INST]"]),
}
TOKENIZERS = {"qwen2": "tokenizer_qwen2", "stories260K": "stories260K/hf"}


@cache
def tokenizer(name: str, special: tuple[str, ...] = ()) -> PreTrainedTokenizerBase:
    loaded = AutoTokenizer.from_pretrained(DATA / TOKENIZERS[name], local_files_only=True)
    loaded.add_special_tokens({"additional_special_tokens": list(special)})
    return loaded


def gsm8k() -> list[Conversation]:
    return load_rows(DATA / "gsm8k" / "test.jsonl")[::50]


def sharegpt() -> list[Conversation]:
    return load_rows(DATA / "fastchat_sharegpt" / "dummy_conversation.json")[::20]


def belle() -> list[Conversation]:
    lines = (DATA / "belle_zh" / "eval_set.json").read_text(encoding="utf-8").split("\n")[:400:20]
    rows = [json.loads(line) for line in lines]
    return [
        conversation_of({"question": row["question"], "answer": row["std_answer"]}, where=f"belle:{number}")
        for number, row in enumerate(rows, 1)
        if row["std_answer"].strip()
    ]


ROWS = {"gsm8k": gsm8k, "sharegpt": sharegpt, "belle": belle}


def labelled_runs(example: Example, decoder: PreTrainedTokenizerBase) -> list[str]:
    runs: list[list[int]] = [[]]
    for label in example.labels:
        if label != IGNORE_INDEX:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [decoder.decode(run, clean_up_tokenization_spaces=False) for run in runs if run]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_labelled_tokens_are_the_answers(template: str, name: str, rows: str) -> None:
    closing, special = TEMPLATES[template]
    chosen = tokenizer(name, tuple(special))
    closing = str(chosen.eos_token) if closing == "eos" else closing
    conversations = ROWS[rows]()
    path = DATA / "chat_templates" / f"{template}.jinja"
    encoded = encode(conversations, chosen, max_tokens=100_000, chat_template=str(path))
    assert encoded.truncated == encoded.dropped == 0
    for conversation, example in zip(conversations, encoded.examples, strict=True):
        answers = [message.content for message in conversation.messages if message.role == "assistant"]
        if template.startswith(("google", "meta")):
            answers = [answer.strip() for answer in answers]
        if name == "qwen2":
            answers = [unicodedata.normalize("NFC", answer) for answer in answers]  # as its tokenizer does
        found = [run.strip() for run in labelled_runs(example, chosen)]
        assert found == [(answer + closing).strip() for answer in answers]

        messages = [{"role": message.role, "content": message.content} for message in conversation.messages]
        stock = chosen.apply_chat_template(
            messages, chat_template=path.read_text(), return_dict=False, date_string=TEMPLATE_DATE
        )
        assert example.input_ids == stock
        assert not chosen.bos_token or chosen.decode(example.input_ids).count(chosen.bos_token) <= 1


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_foreign_tokenizer_labels_the_answers_though_it_cuts_the_marker_into_pieces(template: str) -> None:
    """Without the template's special tokens, the last token may reach a few characters past the marker."""
    plain = tokenizer("qwen2")
    closing = {"eos": str(plain.eos_token)}.get(TEMPLATES[template][0], TEMPLATES[template][0])
    conversations = sharegpt()
    encoded = encode(
        conversations, plain, max_tokens=9999, chat_template=str(DATA / "chat_templates" / f"{template}.jinja")
    )
    for conversation, example in zip(conversations, encoded.examples, strict=True):
        answers = [message.content.strip() for message in conversation.messages if message.role == "assistant"]
        for answer, run in zip(answers, labelled_runs(example, plain), strict=True):
            assert run.lstrip().startswith(answer + closing)
            assert len(run.strip()) <= len(answer + closing) + 1


def test_qwens_own_template_is_the_one_that_is_used() -> None:
    chosen = tokenizer("qwen2")
    encoded = encode(gsm8k(), chosen, max_tokens=9999)
    assert all(run.endswith("<|im_end|>") for each in encoded.examples for run in labelled_runs(each, chosen))
    with pytest.raises(DataError, match="no chat template"):
        encode(gsm8k(), tokenizer("stories260K"), max_tokens=9999)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("google-gemma-2-2b-it", "System role not supported"),
        ("mistralai-Mistral-Nemo-Instruct-2407", "cannot be told from its prompt"),
    ],
)
def test_a_system_message_that_a_template_refuses_or_moves_is_an_error(template: str, message: str) -> None:
    row = [("system", "Be brief"), ("user", "Who are you?"), ("assistant", "I am.")]
    conversation = conversation_of(
        {"messages": [{"role": role, "content": text} for role, text in row]}, where="rows.jsonl:1"
    )
    with pytest.raises(DataError, match=message):
        encode(
            [conversation], tokenizer("qwen2"), max_tokens=99,
            chat_template=str(DATA / "chat_templates" / f"{template}.jinja"),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("vqa_small/vqa.jsonl", r"vqa\.jsonl:1 has unknown keys; got image"),
        ("vqa_small/vqa_messages.jsonl", r"vqa_messages\.jsonl:1 has unknown keys; got images"),
        ("oasst_en_100/en_100_tree.jsonl", "no known format"),
        ("fastchat_sharegpt/mt_bench_question.jsonl", "no known format"),
        ("self_instruct/seed_tasks.jsonl", "has no 'output'"),
        ("belle_zh/eval_set.json", "has no 'answer'"),
        ("stories260K/tok512.bin", "is not UTF-8|is not JSON"),
    ],
)
def test_real_files_of_another_kind_are_refused_with_a_reason(file: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_rows(DATA / file)


@pytest.mark.parametrize("file", ["gsm8k/train.jsonl", "gsm8k/test.jsonl"])
def test_every_row_of_a_real_file_is_read(file: str) -> None:
    path = DATA / file
    assert len(load_rows(path)) == len(path.read_bytes().splitlines())
