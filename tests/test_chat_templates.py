"""Chat templates by name, ShareGPT's messages, and labels on answers only."""

from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from datasets import Dataset

from fastft.chat_templates import FORMATS, get_chat_template, standardize_sharegpt, train_on_responses_only
from fastft.errors import ConfigError, DataError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One and one?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "And one?"},
    {"role": "assistant", "content": "Three."},
]
WORDS = [
    "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>",
]  # fmt: skip


def tokenizer(words: list[str] = WORDS) -> Any:
    """One token a character, and the words."""
    letters = {chr(code): number for number, code in enumerate([10, *range(32, 127)])}
    vocabulary = {**letters, **{word: len(letters) + n for n, word in enumerate(["<unk>", "<s>", "</s>"])}}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>"))
    made.decoder = tokenizers.decoders.Fuse()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.add_special_tokens({"additional_special_tokens": words})
    return fast


def text_of(made: Any, chat: list[dict[str, str]], **more: Any) -> str:
    return made.apply_chat_template(chat, tokenize=False, **more)


EXPECTED = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne and one?<|im_end|>\n"
    "<|im_start|>assistant\nTwo.<|im_end|>\n",
    "llama-3.1": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nOne and one?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nTwo.<|eot_id|>",
    "gemma": "<s><start_of_turn>user\nBe brief.\n\nOne and one?<end_of_turn>\n"
    "<start_of_turn>model\nTwo.<end_of_turn>\n",
    "mistral": "<s>[INST] Be brief.\n\nOne and one? [/INST] Two.</s>",
    "phi-3": "<|system|>\nBe brief.<|end|>\n<|user|>\nOne and one?<|end|>\n<|assistant|>\nTwo.<|end|>\n",
    "phi-4": "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>One and one?<|im_end|>"
    "<|im_start|>assistant<|im_sep|>Two.<|im_end|>",
    "zephyr": "<|system|>\nBe brief.</s>\n<|user|>\nOne and one?</s>\n<|assistant|>\nTwo.</s>\n",
    "vicuna": "<s>Be brief. USER: One and one? ASSISTANT: Two.</s>",
    "alpaca": "<s>Be brief.\n\n### Instruction:\nOne and one?\n\n### Response:\nTwo.</s>\n\n",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_template_by_its_name(name):
    made = get_chat_template(tokenizer(), name)
    assert text_of(made, CHAT[:3]) == EXPECTED[name]
    assert made.eos_token == (FORMATS[name].end_of_turn or "</s>")
    asked = text_of(made, CHAT[:2], add_generation_prompt=True)
    assert EXPECTED[name].startswith(asked), "what is asked is what the answer follows"
    assert EXPECTED[name].startswith(text_of(made, CHAT[:2]))


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_writes_every_turn_once(name):
    text = text_of(get_chat_template(tokenizer(), name), CHAT)
    assert [text.count(message["content"]) for message in CHAT] == [1] * 5
    assert text.index("Two.") < text.index("And one?") < text.index("Three.")


@pytest.mark.parametrize("name", ["qwen2.5", "Llama_3", "PHI-3"])
def test_names_as_people_write_them(name):
    assert get_chat_template(tokenizer(), name).chat_template


def test_a_tokenizers_own_template_is_kept_where_it_is_the_one():
    own = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{# its own #}"
    made = tokenizer()
    made.chat_template = own
    assert get_chat_template(made, "chatml").chat_template == own
    assert made.eos_token == "<|im_end|>"
    assert get_chat_template(made, "chatml", system_message="Be kind.").chat_template != own
    made.chat_template = own
    assert get_chat_template(made, "phi-3").chat_template != own


def test_messages_of_other_names():
    made = get_chat_template(
        tokenizer(), "chatml", {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}
    )
    chat = [{"from": "human", "value": "One and one?"}, {"from": "gpt", "value": "Two."}]
    assert text_of(made, chat) == "<|im_start|>user\nOne and one?<|im_end|>\n<|im_start|>assistant\nTwo.<|im_end|>\n"
    with pytest.raises(ConfigError, match="rolle"):
        get_chat_template(tokenizer(), "chatml", {"rolle": "from"})


def test_what_the_system_says_by_default():
    made = get_chat_template(tokenizer(), "chatml", system_message='Say "yes".')
    assert text_of(made, CHAT[1:2]).startswith('<|im_start|>system\nSay "yes".<|im_end|>')
    assert text_of(made, CHAT[:2]).startswith("<|im_start|>system\nBe brief.")


def test_bad_input():
    with pytest.raises(ConfigError, match="did you mean 'chatml'"):
        get_chat_template(tokenizer(), "chatmll")
    with pytest.raises(ConfigError, match=r"<\|im_end\|> ends a turn.*no token"):
        get_chat_template(tokenizer(words=["<|end|>"]), "chatml")
    with pytest.raises(Exception, match="a chat has no role tool"):
        text_of(get_chat_template(tokenizer(), "chatml"), [{"role": "tool", "content": "3"}])


def test_a_template_of_ones_own_with_its_end():
    made = get_chat_template(tokenizer(), ("{{ messages[0].content }}", "<|end|>"))
    assert (made.chat_template, made.eos_token) == ("{{ messages[0].content }}", "<|end|>")
    assert get_chat_template(tokenizer(), "chatml", map_eos_token=False).eos_token == "</s>"


OFFICIAL = {
    "qwen-2.5": "Qwen-Qwen2.5-7B-Instruct.jinja", "gemma-2": "google-gemma-2-2b-it.jinja",
    "phi-3.5": "microsoft-Phi-3.5-mini-instruct.jinja",
}  # fmt: skip


@pytest.mark.skipif(not (SHARED / "chat_templates").exists(), reason="the published templates are not here")
@pytest.mark.parametrize("name", OFFICIAL)
def test_against_the_published_templates(name):
    published, ours = tokenizer(), get_chat_template(tokenizer(), name)
    published.chat_template = (SHARED / "chat_templates" / OFFICIAL[name]).read_text()
    published.eos_token = ours.eos_token
    chat = CHAT[1:] if name == "gemma-2" else CHAT
    for more in ({}, {"add_generation_prompt": True}):
        asked = chat[:-1] if more else chat
        expected = text_of(published, asked, **more)
        if name == "phi-3.5" and not more:
            expected = expected.removesuffix(published.eos_token)  # it ends the text, too
        assert text_of(ours, asked, **more) == expected


def test_sharegpt_rows_become_messages():
    rows = [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}]
    done = standardize_sharegpt(Dataset.from_list(rows))
    expected = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert done[0]["conversations"] == expected
    assert standardize_sharegpt(done) is done
    with pytest.raises(DataError, match="no column conversations"):
        standardize_sharegpt(Dataset.from_list([{"text": "a"}]))
    with pytest.raises(DataError, match="no role that is known"):
        standardize_sharegpt(Dataset.from_list([{"conversations": [{"from": "bird", "value": "tweet"}]}]))


@pytest.mark.parametrize("name", ["chatml", "llama-3", "mistral", "alpaca"])
def test_answers_are_all_that_is_labelled(name):
    made = get_chat_template(tokenizer(), name)
    text = text_of(made, CHAT)
    chosen = FORMATS[name]
    question, answer = chosen.user.partition("{}")[0], chosen.assistant.partition("{}")[0]
    if name == "mistral":
        answer = " [/INST]"
    label = train_on_responses_only(None, question, answer, made, return_function=True)
    ids = made(text, add_special_tokens=False)["input_ids"]
    (labels,) = label({"input_ids": [ids]})["labels"]
    answers = made.decode([token for token in labels if token != -100])
    assert all(says in answers for says in ("Two.", "Three."))
    assert not any(says in answers for says in ("Be brief.", "One and one?", "And one?"))
    assert all(token in (-100, number) for token, number in zip(labels, ids, strict=True))
    ends = made.eos_token
    assert answers.count(ends) == 2, "the end of a turn is learned"


class _Trainer:
    def __init__(self, train: Any, evaluation: Any = None) -> None:
        self.train_dataset, self.eval_dataset = train, evaluation
        self.processing_class = get_chat_template(tokenizer(), "chatml")


def test_a_trainers_datasets_are_labelled():
    made = get_chat_template(tokenizer(), "chatml")
    ids = made(text_of(made, CHAT), add_special_tokens=False)["input_ids"]
    rows = Dataset.from_list([{"input_ids": ids, "labels": ids}])
    parts = ("<|im_start|>user\n", "<|im_start|>assistant\n")
    trainer = train_on_responses_only(_Trainer(rows, {"one": rows}), *parts)
    for dataset in (trainer.train_dataset, trainer.eval_dataset["one"]):
        assert 0 < sum(label != -100 for label in dataset[0]["labels"]) < len(ids) / 2
    with pytest.raises(DataError, match="no answer was found"):
        train_on_responses_only(_Trainer(rows), "### Question", "### Answer")
    with pytest.raises(ConfigError, match="a part is empty"):
        train_on_responses_only(_Trainer(rows), "", "x")
    with pytest.raises(ConfigError, match="is not tokenized"):
        train_on_responses_only(_Trainer(Dataset.from_list([{"text": "a"}])), *parts)


@pytest.mark.skipif(not (SHARED / "tokenizer_qwen2").exists(), reason="the tokenizer is not here")
def test_a_real_tokenizer_whose_tokens_span_the_parts():
    made = transformers.AutoTokenizer.from_pretrained(SHARED / "tokenizer_qwen2")
    turns = [("Say it.\n\n", "\nYes — здравствуй!\n\n"), ("Again.\n\n", "No.")]
    text = "".join(f"### Instruction:\n{asked}### Response:\n{answer}" for asked, answer in turns)
    ids = made(text)["input_ids"]
    label = train_on_responses_only(None, "### Instruction:\n", "### Response:\n", made, return_function=True)
    (labels,) = label({"input_ids": [ids]})["labels"]
    learned = made.decode([token for token in labels if token != -100])
    assert "Yes — здравствуй!" in learned
    assert "No." in learned
    assert "Say it" not in learned
    assert "Again" not in learned
