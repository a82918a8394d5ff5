"""Chat templates by name, and labels on answers only: what notebooks import to prepare chats.

    from fastft.chat_templates import get_chat_template, standardize_sharegpt, train_on_responses_only

A tokenizer's own template is kept where it is the one that was asked for; the templates here are for those that have
none.  `fastft train` needs none of this: it renders each sample by the tokenizer's template and labels the answers.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastft.data.encoding import IGNORE_INDEX
from fastft.errors import ConfigError, DataError, unknown_choice

_ALIASES = {
    "human": "user", "user": "user", "input": "user", "gpt": "assistant", "assistant": "assistant",
    "output": "assistant", "model": "assistant", "chatgpt": "assistant", "system": "system",
}  # fmt: skip
_PLAIN = {"role": "role", "content": "content", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class ChatFormat:
    """How turns are written.  `{}` stands for what a turn says."""

    user: str
    assistant: str
    """With what ends the turn: the model learns to say that."""
    generation: str
    """What stands there when the model is asked."""
    end_of_turn: str | None
    """The word of `assistant` that ends a turn; None is the tokenizer's end of sequence."""
    system: str | None
    """None: what the system says comes before the first question, with an empty line between."""
    starts: bool
    """Whether a chat begins with the tokenizer's beginning of sequence."""
    marks: tuple[str, ...]
    """Words by which a tokenizer's own template is known to be this one."""
    trims: bool = False
    """Whether blanks around what a turn says are left out."""


def _headed(head: str, end: str, *, starts: bool, marks: Sequence[str], trims: bool = False) -> ChatFormat:
    """A format whose turns differ in their role only, which is named in `head`."""
    turn = {role: head.format(role) + "{}" + end for role in ("system", "user", "assistant")}
    return ChatFormat(
        turn["user"],
        turn["assistant"],
        head.format("assistant"),
        end.strip(),
        turn["system"],
        starts,
        tuple(marks),
        trims,
    )


_CHATML = _headed("<|im_start|>{}\n", "<|im_end|>\n", starts=False, marks=["<|im_start|>", "<|im_end|>"])
_LLAMA_3 = _headed(
    "<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>", starts=True,
    marks=["<|start_header_id|>", "<|eot_id|>"], trims=True,
)  # fmt: skip
_PHI_3 = _headed("<|{}|>\n", "<|end|>\n", starts=False, marks=["<|user|>", "<|end|>"])
_GEMMA = ChatFormat(
    "<start_of_turn>user\n{}<end_of_turn>\n", "<start_of_turn>model\n{}<end_of_turn>\n", "<start_of_turn>model\n",
    "<end_of_turn>", None, True, ("<start_of_turn>", "<end_of_turn>"), trims=True,
)  # fmt: skip
_MISTRAL = ChatFormat("[INST] {} [/INST]", " {}\0", "", None, None, True, ("[INST]", "[/INST]"))
FORMATS: dict[str, ChatFormat] = {
    "chatml": _CHATML,
    "qwen-2.5": _CHATML,
    "qwen-3": _CHATML,
    "llama-3": _LLAMA_3,
    "llama-3.1": _LLAMA_3,
    "llama-3.2": _LLAMA_3,
    "llama-3.3": _LLAMA_3,
    "gemma": _GEMMA,
    "gemma-2": _GEMMA,
    "gemma-3": _GEMMA,
    "mistral": _MISTRAL,
    "phi-3": _PHI_3,
    "phi-3.5": _PHI_3,
    "phi-4": _headed("<|im_start|>{}<|im_sep|>", "<|im_end|>", starts=False, marks=["<|im_sep|>", "<|im_end|>"]),
    "zephyr": ChatFormat(
        "<|user|>\n{}\0\n", "<|assistant|>\n{}\0\n", "<|assistant|>\n", None, "<|system|>\n{}\0\n", False,
        ("<|user|>", "<|assistant|>"),
    ),
    "vicuna": ChatFormat("USER: {} ", "ASSISTANT: {}\0", "ASSISTANT:", None, "{} ", True, ("USER:", "ASSISTANT:")),
    "alpaca": ChatFormat(
        "### Instruction:\n{}\n\n", "### Response:\n{}\0\n\n", "### Response:\n", None, "{}\n\n", True,
        ("### Instruction:", "### Response:"),
    ),
}  # fmt: skip
"""By name, also without its hyphen.  `\\0` stands for the tokenizer's end of sequence."""


def get_chat_template(
    tokenizer: Any,
    chat_template: str | tuple[str, str] = "chatml",
    mapping: Mapping[str, str] | None = None,
    map_eos_token: bool = True,
    system_message: str | None = None,
) -> Any:
    """The tokenizer, with a chat template of that name.

    Its own is kept where that is the one asked for and reads messages of `role` and `content`.  The word that ends a
    turn becomes its end of sequence, so that no other is appended, and labelled, behind it.

    Args:
        tokenizer: is changed, and returned.
        chat_template: one of `FORMATS`, or Jinja text and the word that ends a turn.
        mapping: what messages have for `role`, `content`, `user` and `assistant`, such as `{"role": "from", "content":
            "value", "user": "human", "assistant": "gpt"}`.
        map_eos_token: whether the word that ends a turn becomes the end of sequence.
        system_message: what the system says where a chat says nothing of its own.

    Raises:
        ConfigError: an unknown name or key, or a word that is no token of the tokenizer.
    """
    names = {**_PLAIN, **(mapping or {})}
    unknown = names.keys() - _PLAIN.keys()
    if unknown:
        raise unknown_choice("key of mapping", min(unknown), _PLAIN, ConfigError)
    if isinstance(chat_template, tuple):
        text, end_of_turn = chat_template
        _end_with(tokenizer, end_of_turn, change=map_eos_token)
        tokenizer.chat_template = text
        return tokenizer
    chosen = _format_of(chat_template)
    own = getattr(tokenizer, "chat_template", None)
    as_it_is = isinstance(own, str) and names == _PLAIN and system_message is None
    end_of_turn = chosen.end_of_turn or tokenizer.eos_token
    _end_with(tokenizer, end_of_turn, change=map_eos_token)
    if not (as_it_is and all(mark in own for mark in chosen.marks)):  # type: ignore[operator]
        tokenizer.chat_template = jinja_of(chosen, names, system_message)
    return tokenizer


def jinja_of(chosen: ChatFormat, names: Mapping[str, str] = _PLAIN, system_message: str | None = None) -> str:
    """A chat template in Jinja that writes turns so."""
    role, content = (f"message[{json.dumps(names[key])}]" for key in ("role", "content"))
    user, assistant = json.dumps(names["user"]), json.dumps(names["assistant"])

    def written(turn: str, says: str) -> str:
        before, _, after = turn.partition("{}")
        pieces = [json.dumps(before), f"({says} | trim)" if chosen.trims else says, *_with_eos(after)]
        return "{{ " + " + ".join(piece for piece in pieces if piece != '""') + " }}"

    first = f"messages[0][{json.dumps(names['role'])}] == 'system'"
    default = "none" if system_message is None else json.dumps(system_message)
    opening = [
        "{%- if " + first + " -%}",
        "{%- set system = messages[0][" + json.dumps(names["content"]) + "] -%}{%- set turns = messages[1:] -%}",
        "{%- else -%}{%- set system = " + default + " -%}{%- set turns = messages -%}{%- endif -%}",
        "{{ bos_token or '' }}" if chosen.starts else "",
    ]
    question = written(chosen.user, content)
    if chosen.system is not None:
        opening.append("{%- if system is not none %}" + written(chosen.system, "system") + "{% endif -%}")
    else:
        joined = "(system + " + json.dumps("\n\n") + f" + {content})"
        with_system = written(chosen.user, joined)
        question = "{% if loop.first and system is not none %}" + with_system + "{% else %}" + question + "{% endif %}"
    return "".join([
        *opening,
        "{%- for message in turns -%}",
        "{%- if " + role + " == " + user + " %}" + question,
        "{%- elif " + role + " == " + assistant + " %}" + written(chosen.assistant, content),
        "{%- else -%}{{ raise_exception('a chat has no role ' + " + role + ") }}{%- endif -%}",
        "{%- endfor -%}",
        "{%- if add_generation_prompt %}{{ " + json.dumps(chosen.generation) + " }}{% endif -%}",
    ])  # fmt: skip


def standardize_sharegpt(dataset: Any) -> Any:
    """A dataset whose column `conversations` has messages of `role` and `content`, from ShareGPT's `from` and `value`.

    Roles are `user`, `assistant` and `system`.  A dataset that is so already is returned as it is.

    Raises:
        DataError: there is no such column, or a role that is not known.
    """
    if "conversations" not in dataset.column_names:
        raise DataError(
            "the dataset has no column conversations", got=", ".join(dataset.column_names), fix="rename the column"
        )

    def standard(row: dict[str, Any]) -> dict[str, Any]:
        return {"conversations": [_message(message) for message in row["conversations"]]}

    if len(dataset) and standard(dataset[0])["conversations"] == dataset[0]["conversations"]:
        return dataset
    return dataset.map(standard, desc="Standardizing the conversations")


def train_on_responses_only(
    trainer: Any,
    instruction_part: str,
    response_part: str,
    tokenizer: Any = None,
    return_function: bool = False,
) -> Any:
    """The trainer, whose datasets label the answers only: what stands between `response_part` and the next
    `instruction_part`.

    Args:
        trainer: has tokenized datasets; they are replaced.  None with `return_function`.
        instruction_part: what begins a question, such as `"<|im_start|>user\\n"`.
        response_part: what begins an answer, such as `"<|im_start|>assistant\\n"`.
        tokenizer: the trainer's own where None.
        return_function: give the function from a batch with `input_ids` to its `labels` instead.

    Raises:
        ConfigError: an empty part, or a trainer whose datasets are not tokenized.
        DataError: a dataset in which no answer was found.
    """
    if not instruction_part or not response_part:
        raise ConfigError("a part is empty", got=repr((instruction_part, response_part)), fix="give what begins a turn")
    tokenizer = trainer.processing_class if tokenizer is None else tokenizer
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor's
    piece = functools.cache(_piece_of(tokenizer))

    def labelled(batch: dict[str, Any]) -> dict[str, Any]:
        rows = batch["input_ids"]
        return {"labels": [_labels(list(row), piece, instruction_part, response_part) for row in rows]}

    if return_function:
        return labelled
    for name in ("train_dataset", "eval_dataset"):
        given = getattr(trainer, name, None)
        if given is None:
            continue
        many = given if isinstance(given, dict) else {"": given}
        done = {key: _with_labels(each, labelled, name, response_part) for key, each in many.items()}
        setattr(trainer, name, done if isinstance(given, dict) else done[""])
    return trainer


def _format_of(name: str) -> ChatFormat:
    same = {known.replace("-", ""): chosen for known, chosen in FORMATS.items()}
    chosen = same.get(name.lower().replace("-", "").replace("_", ""))
    if chosen is None:
        raise unknown_choice("chat template", name, FORMATS, ConfigError)
    return chosen


def _end_with(tokenizer: Any, word: str | None, *, change: bool) -> None:
    if word is None or word == tokenizer.eos_token:
        return
    number = tokenizer.convert_tokens_to_ids(word)
    if number is None or number == tokenizer.unk_token_id:
        raise ConfigError(
            f"{word} ends a turn of this chat template, and is no token of the tokenizer", got=type(tokenizer).__name__,
            allowed="a template of words that it has", fix="choose alpaca, vicuna or zephyr, which end with its own",
        )  # fmt: skip
    if change:
        tokenizer.eos_token = word


def _with_eos(text: str) -> list[str]:
    """The pieces of a Jinja sum for what stands behind a turn's content."""
    before, found, after = text.partition("\0")
    return [json.dumps(before), *(["(eos_token or '')", json.dumps(after)] if found else [])]


def _message(message: Mapping[str, Any]) -> dict[str, str]:
    role, content = (message.get(new, message.get(old)) for new, old in (("role", "from"), ("content", "value")))
    if role is None or content is None or str(role).lower() not in _ALIASES:
        raise DataError(
            "a message has no role that is known, or says nothing", got=str(dict(message))[:80],
            allowed=f"from and value, or role and content; {', '.join(_ALIASES)}", fix="rename its keys, or its role",
        )  # fmt: skip
    return {"role": _ALIASES[str(role).lower()], "content": str(content)}


def _piece_of(tokenizer: Any) -> Callable[[int], str]:
    """What a token adds to a text: behind a letter, so that no decoder takes its leading blank away."""
    (letter, *_) = tokenizer.encode("a", add_special_tokens=False)
    alone = tokenizer.decode([letter])

    def piece(token: int) -> str:
        text: str = tokenizer.decode([letter, token], clean_up_tokenization_spaces=False)
        return text[len(alone) :]

    return piece


def _labels(ids: list[int], piece: Callable[[int], str], instruction: str, response: str) -> list[int]:
    """The tokens of answers, and `IGNORE_INDEX` for all others; a token that begins before an answer and ends in it is
    part of it."""
    pieces = [piece(token) for token in ids]
    text, labels = "".join(pieces), [IGNORE_INDEX] * len(ids)
    spans, end = [], 0
    while (found := text.find(response, end)) >= 0:
        start = found + len(response)
        end = text.find(instruction, start)
        end = len(text) if end < 0 else end
        spans.append((start, end))
    position, here = 0, iter(spans)
    span = next(here, None)
    for index, each in enumerate(pieces):
        begins, ends = position, position + len(each)
        position = ends
        while span is not None and begins >= span[1]:
            span = next(here, None)
        if span is not None and ends > span[0] and begins < span[1]:
            labels[index] = ids[index]
    return labels


def _with_labels(dataset: Any, labelled: Callable[[dict[str, Any]], dict[str, Any]], name: str, response: str) -> Any:
    if "input_ids" not in (getattr(dataset, "column_names", None) or ()):
        raise ConfigError(
            f"{name} is not tokenized", got=type(dataset).__name__, allowed="a dataset with input_ids",
            fix="give it to SFTTrainer, which tokenizes it, before this",
        )  # fmt: skip
    done = dataset.map(labelled, batched=True)
    if hasattr(done, "__len__") and not any(label != IGNORE_INDEX for row in done["labels"] for label in row):
        raise DataError(
            f"no answer was found in {name}", got=f"{response!r} in none of {len(done)} rows",
            fix="give response_part as the chat template writes it",
        )  # fmt: skip
    return done
