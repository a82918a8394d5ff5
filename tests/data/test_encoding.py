"""fastft.data.encoding: what becomes a token, what becomes a target, and what is refused."""

import logging
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from fastft.data.encoding import IGNORE_INDEX, TEMPLATE_DATE, Example, encode
from fastft.data.formats import Conversation, Message
from fastft.errors import DataError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that knows ` yes` as one token and puts <s> before everything it is given."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        ["yes yes user assistant"] * 9,
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", additional_special_tokens=special[2:]
    )


def chat(*contents: str, system: str | None = None) -> Conversation:
    """Question, answer, question, answer … at `rows.jsonl:7`."""
    roles = ["user", "assistant"] * len(contents)
    messages = [Message(role, content) for role, content in zip(roles, contents, strict=False)]  # type: ignore[arg-type]
    return Conversation((*([Message("system", system)] if system else []), *messages), "rows.jsonl:7")


def one(conversation: Conversation, chat_template: str = CHATML, **options: bool) -> Example:
    encoded = encode([conversation], tokenizer(), max_tokens=10_000, chat_template=chat_template, **options)
    return encoded.examples[0]


def targets(example: Example) -> str:
    """The labelled tokens as text; consecutive answers are joined by `|`."""
    runs: list[list[int]] = [[]]
    for label in example.labels:
        if label != IGNORE_INDEX:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return "|".join(tokenizer().decode(run) for run in runs if run)


def test_only_answers_and_their_end_are_targets() -> None:
    example = one(chat("How?", "So.", "Sure?", "Yes!", system="Be brief"))
    assert targets(example) == "So.<|im_end|>|Yes!<|im_end|>"


def test_every_token_but_the_first_is_a_target_without_response_only() -> None:
    example = one(chat("How?", "So."), response_only=False)
    assert example.labels == [IGNORE_INDEX, *example.input_ids[1:]]


CONTENT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<|"), min_size=1, max_size=20)
ANSWER = CONTENT.filter(str.strip)


@given(st.lists(st.tuples(CONTENT, ANSWER), min_size=1, max_size=3))
def test_masking_holds_for_any_text(turns: list[tuple[str, str]]) -> None:
    conversation = chat(*(content for turn in turns for content in turn))
    example = one(conversation)
    messages = [{"role": message.role, "content": message.content} for message in conversation.messages]
    stock = tokenizer().apply_chat_template(messages, chat_template=CHATML, return_dict=False)
    assert example.input_ids == stock
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(*vars(example).values(), strict=True))
    assert targets(example) == "|".join(answer + "<|im_end|>" for _, answer in turns)
    assert one(conversation, CHATML_MARKED) == example


def test_the_bos_token_is_not_doubled() -> None:
    assert tokenizer()("a").input_ids[0] == tokenizer().bos_token_id, "this tokenizer adds it by itself"
    for response_only in (True, False):
        example = one(chat("How?", "So."), "{{ bos_token }}" + CHATML, response_only=response_only)
        assert example.input_ids.count(tokenizer().bos_token_id) == 1


@pytest.mark.parametrize("line_break", ["\n", ""])
def test_a_template_that_appends_eos_to_the_whole_does_not_make_it_a_target(line_break: str) -> None:
    """As Phi 3.5's: the end of sequence is no answer's end of turn."""
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>" + line_break + "' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ '<|im_end|>' }}{% endif %}"
    )
    assert targets(one(chat("a", "b", "c", "d"), template)) == "b<|end|>|d<|end|>"


def test_a_marker_that_is_plain_text_ends_at_the_white_space() -> None:
    template = CHATML.replace("<|im_end|>", " ###END").replace("<|im_start|>", "@")
    assert targets(one(chat("a", "b", "c", "d"), template)) == "b ###END|d ###END"


def test_a_template_without_a_generation_prompt_keeps_the_header_out() -> None:
    template = CHATML[: CHATML.index("{% if add")]
    assert targets(one(chat("a", "b", "c", "d"), template)) == "b<|im_end|>|d<|im_end|>"


def test_a_template_without_an_end_of_turn_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    template = CHATML.replace("<|im_end|>", "")
    with caplog.at_level(logging.WARNING):
        assert targets(one(chat("a", "b", "c", "d"), template)) == "b|d"
    assert "ends 2 answers without an end-of-turn marker" in caplog.text


def test_the_first_word_is_a_target_though_its_token_begins_in_the_prompt() -> None:
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    assert targets(one(chat("a", "yes"), template)) == " yes</s>"


def test_trimmed_content_is_no_change() -> None:
    assert targets(one(chat("a", "\n b  \n"), CHATML.replace("m.content", "m.content | trim"))) == "b<|im_end|>"


# As Qwen 3's: the last answer gets a thinking block, earlier answers lose theirs.
THINKING = (
    "{% for m in messages %}{% set text = m.content %}{% if m.role == 'assistant' %}"
    "{% if '</think>' in text %}{% set text = text.split('</think>')[-1] %}{% endif %}"
    "{% if loop.last %}{% set text = '<think>\n\n</think>\n\n' + text %}{% endif %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_what_the_template_adds_to_an_answer_belongs_to_it() -> None:
    assert targets(one(chat("a", "b", "c", "d"), THINKING)) == "b<|im_end|>|<think>\n\n</think>\n\nd<|im_end|>"


@pytest.mark.parametrize(
    ("conversation", "template"),
    [
        (chat("a", "<think>hm</think>b", "c", "d"), THINKING),
        (chat("a", "b"), CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'")),
        # As Mistral Nemo's: the system message stands in the last message, if that is a question.
        (
            chat("a", "b", system="s"),
            "{% for m in messages %}{% if m.role != 'system' %}"
            "{{ m.role + (messages[0].content if loop.last and m.role == 'user' else '') + m.content + '</s>' }}"
            "{% endif %}{% endfor %}",
        ),
        (chat("a", "b"), "{% for m in messages %}{{ m.content | upper }}{% endfor %}"),
        (chat("a", "b"), "{% for m in messages %}{{ m.content + m.content }}{% endfor %}"),
    ],
    ids=["dropped thinking", "prompt not kept", "moved system message", "upper case", "said twice"],
)  # fmt: skip
def test_a_template_that_changes_what_was_said_is_refused(conversation: Conversation, template: str) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:7.*cannot be told from its prompt.*generation"):
        one(conversation, template)


def test_the_date_in_a_template_is_fixed() -> None:
    template = "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}" + CHATML
    assert TEMPLATE_DATE in tokenizer().decode(one(chat("a", "b"), template).input_ids)


def test_markers_around_nothing_are_refused() -> None:
    template = CHATML_MARKED.replace("{{ m.content + '<|im_end|>' }}{% endgen", "{% endgen")
    with pytest.raises(DataError, match=r"rows\.jsonl:7 has no token to train on"):
        one(chat("a", "b"), template)


@pytest.mark.parametrize("template", ["{{ raise_exception('no system role') }}", "{% for %}", "{{ messages + 1 }}"])
def test_a_template_that_fails_names_the_sample(template: str) -> None:
    with pytest.raises(DataError, match=r"refuses rows\.jsonl:7") as caught:
        one(chat("a", "b"), template)
    assert caught.value.__cause__ is not None


def test_the_template_is_the_tokenizers_own_a_text_or_a_file(tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text(CHATML)
    conversation = chat("a", "b")
    assert one(conversation, str(path)) == one(conversation, CHATML)
    with pytest.raises(DataError, match="cannot read the chat template"):
        one(conversation, str(tmp_path / "none.jinja"))
    with pytest.raises(DataError, match=r"no chat template.*fix: give chat_template="):
        encode([conversation], tokenizer(), max_tokens=9)
    own = PreTrainedTokenizerFast(tokenizer_object=tokenizer().backend_tokenizer)
    own.chat_template = CHATML
    assert encode([conversation], own, max_tokens=99).examples == [one(conversation)]


def test_a_tokenizer_without_offsets_can_only_train_on_everything() -> None:
    slow = ByT5Tokenizer()
    with pytest.raises(DataError, match="no character offsets"):
        encode([chat("a", "b")], slow, max_tokens=99, chat_template=CHATML)
    assert encode([chat("a", "b")], slow, max_tokens=99, chat_template=CHATML, response_only=False).labelled_tokens


@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.integers(1, 40))
def test_truncation_is_counted_and_never_drops_an_answer_in_silence(lengths: list[int], max_tokens: int) -> None:
    conversations = [chat("q" * length, "a" * 5) for length in lengths]
    whole = [one(conversation) for conversation in conversations]
    kept = [
        Example(example.input_ids[:max_tokens], example.labels[:max_tokens])
        for example in whole
        if any(label != IGNORE_INDEX for label in example.labels[:max_tokens])
    ]
    if not kept:
        with pytest.raises(DataError, match=rf"begins after token {max_tokens}, the first in rows\.jsonl:7"):
            encode(conversations, tokenizer(), max_tokens=max_tokens, chat_template=CHATML)
        return
    encoded = encode(conversations, tokenizer(), max_tokens=max_tokens, chat_template=CHATML)
    assert encoded.examples == kept
    assert encoded.dropped == len(whole) - len(kept)
    assert encoded.truncated == sum(example not in whole for example in kept)
    assert encoded.tokens == sum(len(example.input_ids) for example in kept)
    assert encoded.labelled_tokens == sum(label != IGNORE_INDEX for example in kept for label in example.labels)


def test_truncation_is_logged_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    conversations = [chat("q", "a"), chat("q", "a" * 30), chat("q" * 60, "a")]
    with caplog.at_level(logging.WARNING):
        encode(conversations, tokenizer(), max_tokens=20, chat_template=CHATML)
    assert [record.getMessage() for record in caplog.records] == [
        "1 of 3 samples were cut to 20 tokens, and 1 were dropped because no token of their answer was left; "
        "raise sequence_tokens to keep them whole"
    ]
    caplog.clear()
    encode(conversations[:1], tokenizer(), max_tokens=20, chat_template=CHATML)
    assert not caplog.records


def test_no_samples_is_an_error() -> None:
    with pytest.raises(DataError, match="there are no samples"):
        encode([], tokenizer(), max_tokens=9, chat_template=CHATML)


def test_a_sample_of_just_the_length_is_not_cut():
    conversation = chat("a", "b c")
    length = len(encode([conversation], tokenizer(), max_tokens=10_000, chat_template=CHATML).examples[0].input_ids)
    counts = [
        encode([conversation], tokenizer(), max_tokens=most, chat_template=CHATML).truncated
        for most in (length + 1, length, length - 1)
    ]
    assert counts == [0, 0, 1]
