"""Exact match of generated answers: the task score that says whether fine-tuning taught anything.

B prompts, S positions, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastft.data.arithmetic import is_correct
from fastft.data.encoding import TEMPLATE_DATE
from fastft.data.formats import Message, conversation_of
from fastft.errors import DataError
from fastft.models.kv_cache import KV_CACHE


def evaluate_exact_match(
    model: nn.Module, tokenizer: Any, rows: list[dict[str, str]], max_new_tokens: int = 64, batch_size: int = 32
) -> float:
    """The fraction of `rows` whose greedily decoded answer ends in the right number.

    Args:
        model: a causal language model of transformers, or a PEFT model around one, on any device.
        tokenizer: its tokenizer, with a chat template and an end token.
        rows: rows of `fastft.data.arithmetic`.
        max_new_tokens: where an answer without an end token is cut.
        batch_size: prompts decoded at a time; changes the speed and, in bf16, at most the last bits of the logits.

    Returns:
        Between 0 and 1.  The model's training mode (of every submodule) and the tokenizer are as before.

    Raises:
        DataError: there are no rows, or a row has no final answer.
    """
    if not rows:
        raise DataError("there is nothing to evaluate", got="0 rows", fix="generate some test rows")
    chats = [conversation_of(row, where=f"row {number}").messages[:-1] for number, row in enumerate(rows, 1)]
    answers = generate_answers(model, tokenizer, chats, max_new_tokens, batch_size)
    return sum(is_correct(answer, row) for answer, row in zip(answers, rows, strict=True)) / len(rows)


def generate_answers(
    model: nn.Module,
    tokenizer: Any,
    chats: Sequence[Sequence[Message]],
    max_new_tokens: int = 64,
    batch_size: int = 32,
) -> list[str]:
    """One greedy answer a chat, through the tokenizer's chat template, without special tokens.

    The arg max is taken here instead of by `model.generate`, whose result depends on the sampling options,
    penalties and length limits of the model's own generation config.
    """
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    stop_ids = _stop_ids(model, tokenizer)
    answers: list[str] = []
    model.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(chats), batch_size):
                ids_BS, mask_BS = _left_padded(tokenizer, chats[start : start + batch_size], device)
                new_BS = _greedy(model, ids_BS, mask_BS, max_new_tokens, stop_ids)
                answers += tokenizer.batch_decode(_cut(new_BS, stop_ids), skip_special_tokens=True)
    finally:
        for module, training in modes:
            module.training = training
    return answers


def _left_padded(tokenizer: Any, chats: Sequence[Sequence[Message]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts as (ids_BS, mask_BS), padded on the left so that every answer starts in the same column."""
    encoded = [
        tokenizer.apply_chat_template(
            [{"role": message.role, "content": message.content} for message in chat],
            add_generation_prompt=True, tokenize=True, return_dict=True, date_string=TEMPLATE_DATE,
        )["input_ids"]
        for chat in chats
    ]  # fmt: skip
    width = max(map(len, encoded))
    # Masked out, so any token will do: 0 spares the tokenizer its pad token.
    ids_BS = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in encoded], device=device)
    mask_BS = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in encoded], device=device)
    return ids_BS, mask_BS


def _greedy(model: nn.Module, ids_BS: Tensor, mask_BS: Tensor, max_new_tokens: int, stop_ids: list[int]) -> Tensor:
    """The arg max of each step, until every row has stopped.  What follows a row's stop token is meaningless."""
    stops = torch.tensor(stop_ids, device=ids_BS.device)
    done_B = torch.zeros(len(ids_BS), dtype=torch.bool, device=ids_BS.device)
    positions_BS = (mask_BS.cumsum(-1) - 1).clamp_min(0)
    cache, step_BS, new = None, ids_BS, []
    for _ in range(max_new_tokens):
        output = model(
            input_ids=step_BS, attention_mask=mask_BS, position_ids=positions_BS,
            **{KV_CACHE: cache}, use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        cache = getattr(output, KV_CACHE)
        step_BS = output.logits[:, -1:].argmax(-1)
        new.append(step_BS)
        done_B |= torch.isin(step_BS[:, 0], stops)
        if done_B.all():
            break
        mask_BS = torch.cat([mask_BS, mask_BS.new_ones(len(mask_BS), 1)], dim=1)
        positions_BS = positions_BS[:, -1:] + 1
    return torch.cat(new, dim=1)


def _stop_ids(model: nn.Module, tokenizer: Any) -> list[int]:
    """The end tokens of the generation config and of the tokenizer."""
    config = getattr(model, "generation_config", None)
    configured = getattr(config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    stops = sorted({token for token in [*ids, tokenizer.eos_token_id] if token is not None})
    if not stops:
        raise DataError("the tokenizer has no end token", got="eos_token None", fix="set tokenizer.eos_token")
    return stops


def _cut(new_BS: Tensor, stop_ids: list[int]) -> list[list[int]]:
    """Each row up to its first stop token."""
    rows = []
    for row in new_BS.tolist():
        end = next((index for index, token in enumerate(row) if token in stop_ids), len(row))
        rows.append(row[:end])
    return rows
