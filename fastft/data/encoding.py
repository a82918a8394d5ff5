"""Conversations → token ids and labels, by the tokenizer's own chat template.

Which tokens are the answer is decided on the rendered text, which is then tokenized once and in one piece:
masking never changes the tokens that the model sees.  A template with `{% generation %}` markers says itself
what the answer is.  For any other, with `render(messages)` the template's text:

    begin    the length of render(messages before the answer, add_generation_prompt): what stands there when
             the model is asked
    end      where the answer's content ends (everything after it is found by rendering a placeholder in its
             stead), and the end-of-turn marker behind it: what the model must say to stop

The marker is the special token, or without one the word, that follows the content whatever comes next.
"""

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastft.data.formats import Conversation
from fastft.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100
"""The label of a token that is no target, as PyTorch's and transformers' cross-entropy have it."""

TEMPLATE_DATE = "26 Jul 2024"
"""Some templates (Llama 3.2) print today's date, and the same file would give other tokens tomorrow.  This is
the date that Llama 3's templates print when they cannot ask the clock."""

_GENERATION = re.compile(r"{%-?\s*generation\s*-?%}")
_PLACEHOLDER = "\ue000answer\ue000"  # private-use characters: no template strips them, no text holds them

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """One tokenized sample: `labels[t]` is `input_ids[t]` where token t is a target, else `IGNORE_INDEX`.

    The first token is never a target: nothing stands before it to predict it from.
    """

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Encoded:
    """What `encode` made of the samples, in their order."""

    examples: list[Example]
    truncated: int
    """Samples cut to `max_tokens` that kept part of an answer."""
    dropped: int
    """Samples left out because the cut left none of an answer."""
    tokens: int
    """All tokens of the examples."""
    labelled_tokens: int
    """Those that are targets."""


def encode(
    conversations: Iterable[Conversation],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_tokens: int,
    response_only: bool = True,
    chat_template: str | None = None,
) -> Encoded:
    """Tokenize `conversations` and label the answers; longer samples are cut at the end, counted and logged.

    Args:
        conversations: the samples.
        tokenizer: any with a chat template; a fast one if `response_only`, for its character offsets.
        max_tokens: the longest example.
        response_only: only the answers and their end-of-turn markers are targets; otherwise every token is.
        chat_template: Jinja text, or the path of a file that holds it, instead of the tokenizer's own.

    Raises:
        DataError: no sample; no chat template; a template that refuses a sample or does not keep an answer as
            it was; a sample without any target; or no sample with a target left within `max_tokens`.
    """
    template = _ChatTemplate(tokenizer, chat_template, response_only=response_only)
    examples: list[Example] = []
    truncated = dropped = 0
    first: Conversation | None = None
    for conversation in conversations:
        first = first or conversation
        whole = template.example(conversation)
        if _targets(whole.labels) == 0:
            raise DataError(
                f"{conversation.where} has no token to train on", got=f"{len(whole.input_ids)} tokens, none labelled",
                allowed="at least one labelled token", fix="give the row an answer, or check the chat template",
            )  # fmt: skip
        example = Example(whole.input_ids[:max_tokens], whole.labels[:max_tokens])
        if _targets(example.labels) == 0:
            dropped += 1
            continue
        truncated += len(whole.input_ids) > max_tokens
        examples.append(example)
    if first is None:
        raise DataError("there are no samples", fix="give a file with at least one row")
    if not examples:
        raise DataError(
            f"every answer begins after token {max_tokens}, the first in {first.where}",
            got=f"{dropped} samples, none with a label left", fix="raise sequence_tokens",
        )  # fmt: skip
    if truncated or dropped:
        _log.warning(
            "%d of %d samples were cut to %d tokens, and %d were dropped because no token of their answer was left; "
            "raise sequence_tokens to keep them whole",
            truncated, len(examples) + dropped, max_tokens, dropped,
        )  # fmt: skip
    if template.unclosed:
        _log.warning(
            "the chat template ends %d answers without an end-of-turn marker: the model will not learn where to stop",
            template.unclosed,
        )
    return Encoded(
        examples,
        truncated,
        dropped,
        tokens=sum(len(example.input_ids) for example in examples),
        labelled_tokens=sum(_targets(example.labels) for example in examples),
    )


def _targets(labels: Sequence[int]) -> int:
    return sum(label != IGNORE_INDEX for label in labels)


class _ChatTemplate:
    """A tokenizer with the template that is in force."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", chat_template: str | None, *, response_only: bool) -> None:
        if response_only and not tokenizer.is_fast:
            raise DataError(
                "the tokenizer gives no character offsets, which masking the prompt needs",
                got=type(tokenizer).__name__, allowed="a fast tokenizer (one with a tokenizer.json)",
                fix="load the fast tokenizer, or set response_only = false",
            )  # fmt: skip
        self._tokenizer = tokenizer
        self._text = template_text(tokenizer, chat_template)
        self._marks_answers = _GENERATION.search(self._text) is not None
        self._response_only = response_only
        special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
        self._special = sorted((token for token in special if token.strip()), key=len, reverse=True)
        self.unclosed = 0
        """Answers after which no end-of-turn marker was found."""

    def example(self, conversation: Conversation) -> Example:
        """The whole conversation as tokens and labels."""
        if self._response_only and self._marks_answers:
            output = self._apply(conversation, _chat(conversation), tokenize=True, return_assistant_tokens_mask=True)
            input_ids, is_target = list(output["input_ids"]), [bool(bit) for bit in output["assistant_masks"]]
        else:
            text = self._render(conversation, _chat(conversation))
            # The template has written the special tokens already: adding them here would double the first one.
            output = self._tokenizer(
                text, add_special_tokens=False, return_offsets_mapping=self._response_only, verbose=False
            )
            input_ids, is_target = list(output["input_ids"]), [True] * len(output["input_ids"])
            if self._response_only:
                spans = self._answer_spans(conversation, text)
                # A token that begins in the prompt's last space and holds the answer's first word is a target.
                is_target = [
                    any(first < end and last > begin for begin, end in spans)
                    for first, last in output["offset_mapping"]
                ]
        labels = [token if target else IGNORE_INDEX for token, target in zip(input_ids, is_target, strict=True)]
        labels[:1] = [IGNORE_INDEX] * len(labels[:1])
        return Example(input_ids, labels)

    def _answer_spans(self, conversation: Conversation, text: str) -> list[tuple[int, int]]:
        """The characters of `text` that the model must say: half-open intervals, in order."""
        return [
            self._answer_span(conversation, text, index)
            for index, message in enumerate(conversation.messages)
            if message.role == "assistant"
        ]

    def _answer_span(self, conversation: Conversation, text: str, index: int) -> tuple[int, int]:
        chat = _chat(conversation)
        before, after = chat[:index], chat[index + 1 :]
        placeholder = {"role": "assistant", "content": _PLACEHOLDER}
        prompt = self._render(conversation, before, add_generation_prompt=True)
        head, _, tail = self._render(conversation, [*before, placeholder, *after]).partition(_PLACEHOLDER)
        begin, content_end = len(prompt), len(text) - len(tail)
        kept = text.startswith(prompt) and text.endswith(tail)
        if not kept or _squeezed(chat[index]["content"]) not in _squeezed(text[begin:content_end]):
            raise DataError(
                f"{conversation.where}: the chat template changes, drops or moves text up to message {index + 1}, "
                "so this answer cannot be told from its prompt",
                allowed="a rendered prompt that is the beginning of the rendered conversation",
                fix="split the conversation so that this answer is its last message, or give chat_template= a "
                "template with {% generation %} markers",
            )  # fmt: skip
        if text.startswith(head) and len(head) > begin and prompt == self._render(conversation, before):
            begin = len(head)  # the template knows no generation prompt: the header of the answer's turn is prompt too
        # What follows the content here, and in another continuation: what both share belongs to the answer's turn.
        other = self._render(conversation, [*before, placeholder], add_generation_prompt=not after)
        shared = _shared_prefix(tail, other.partition(_PLACEHOLDER)[2])
        marker = shared.lstrip()
        word = marker.split(maxsplit=1)[0] if marker else ""
        closing = next((token for token in self._special if marker.startswith(token)), word)
        if not closing:
            self.unclosed += 1
            return begin, content_end
        return begin, content_end + len(shared) - len(marker) + len(closing)

    def _render(
        self, conversation: Conversation, chat: list[dict[str, str]], *, add_generation_prompt: bool = False
    ) -> str:
        return str(self._apply(conversation, chat, tokenize=False, add_generation_prompt=add_generation_prompt))

    def _apply(self, conversation: Conversation, chat: list[dict[str, str]], **options: Any) -> Any:
        from jinja2 import TemplateError

        try:
            return self._tokenizer.apply_chat_template(
                chat, chat_template=self._text, date_string=TEMPLATE_DATE, **options
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise DataError(
                f"the chat template refuses {conversation.where}", got=f"{type(error).__name__}: {error}",
                fix="change the row to what the template takes, or give another chat_template=",
            ) from error  # fmt: skip


def _chat(conversation: Conversation) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in conversation.messages]


def _shared_prefix(left: str, right: str) -> str:
    differing = (index for index, (a, b) in enumerate(zip(left, right, strict=False)) if a != b)
    return left[: next(differing, min(len(left), len(right)))]


def _squeezed(text: str) -> str:
    """`text` without white space, which templates may trim."""
    return "".join(text.split())


def template_text(tokenizer: "PreTrainedTokenizerBase", chat_template: str | None) -> str:
    """The Jinja text of `chat_template`, which is that text or the path of a file; None takes the tokenizer's own.

    Raises:
        DataError: there is none, or the file cannot be read.
    """
    if chat_template is None:
        try:
            return tokenizer.get_chat_template()
        except ValueError as error:
            raise DataError(
                "the tokenizer has no chat template", got=type(tokenizer).__name__,
                fix="give chat_template=, the text or the path of a Jinja template that fits the model",
            ) from error  # fmt: skip
    if "{" in chat_template:
        return chat_template
    try:
        return Path(chat_template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read the chat template {chat_template}", got=str(error), allowed="Jinja text, or a file of it",
            fix="check the path",
        ) from error  # fmt: skip
