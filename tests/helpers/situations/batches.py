"""What a model is called with: tokens, masks, positions, labels and further arguments, for `situations`.

Legend: B rows, S tokens a row, P tokens in a cache that was filled before.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from fastft.models.kv_cache import KV_CACHE
from situations.models import HIDDEN, VOCABULARY

IGNORED = -100
CACHED = 3
"""P, where a cache is given."""


def _lengths(B: int, S: int) -> Tensor:
    return torch.linspace(S, S // 3, B).round().long()


def _right(B: int, S: int, generator: torch.Generator) -> Tensor:
    return (torch.arange(S) < _lengths(B, S)[:, None]).long()


def _left(B: int, S: int, generator: torch.Generator) -> Tensor:
    return _right(B, S, generator).flip(1)


def _holes(B: int, S: int, generator: torch.Generator) -> Tensor:
    mask_BS = (torch.rand(B, S, generator=generator) > 0.3).long()
    mask_BS[:, 0] = 1
    return mask_BS


def _allowed(B: int, S: int, generator: torch.Generator) -> Tensor:
    """B × 1 × S × S, true where a query may look: causal, with some more left out."""
    causal = torch.ones(S, S, dtype=torch.bool).tril()
    left_out = torch.rand(B, 1, S, S, generator=generator) < 0.2
    return (causal & ~left_out) | torch.eye(S, dtype=torch.bool)


def _added(B: int, S: int, generator: torch.Generator) -> Tensor:
    allowed = _allowed(B, S, generator)
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)


def _soft(B: int, S: int, generator: torch.Generator) -> Tensor:
    """A bias of the scores, as ALiBi has one, and no mask proper."""
    return _added(B, S, generator) + torch.randn(B, 1, S, S, generator=generator).bfloat16().float()


def _ends_early(B: int, S: int, generator: torch.Generator) -> Tensor:
    mask_BS = torch.ones(B, S, dtype=torch.long)
    mask_BS[-1] = 0
    return mask_BS


MASKS: dict[str, Callable[[int, int, torch.Generator], Any]] = {
    "none": lambda B, S, generator: None,
    "ones": lambda B, S, generator: torch.ones(B, S, dtype=torch.long),
    "right": _right,
    "left": _left,
    "right, as bool": lambda B, S, generator: _right(B, S, generator).bool(),
    "right, as float": lambda B, S, generator: _right(B, S, generator).float(),
    "right, all rows": lambda B, S, generator: _right(1, S, generator).new_ones(B, S).index_fill(
        1, torch.arange(S - 4, S), 0
    ),
    "holes": _holes,
    "row of padding": _ends_early,
    "4-D bool": _allowed,
    "4-D float": _added,
    "4-D bias": _soft,
    "dict": lambda B, S, generator: dict.fromkeys(
        ("full_attention", "sliding_attention"), _allowed(B, S, generator)
    ),
}  # fmt: skip


def _documents(S: int, *ends: int) -> Tensor:
    bounds = [0, *ends, S]
    return torch.cat([torch.arange(b - a) for a, b in pairwise(bounds)])


def _jumping(S: int) -> Tensor:
    return torch.cat([torch.arange(S // 2), torch.arange(S - S // 2) + 100])


POSITIONS: dict[str, Callable[[int, int, Any], Any]] = {
    "none": lambda B, S, mask: None,
    "counted": lambda B, S, mask: torch.arange(S)[None],
    "counted, every row": lambda B, S, mask: torch.arange(S).expand(B, S).contiguous(),
    "later": lambda B, S, mask: torch.arange(S)[None] + 7,
    "jumping": lambda B, S, mask: _jumping(S)[None].expand(B, S),
    "packed": lambda B, S, mask: _documents(S, S // 3)[None].expand(B, S),
    "packed, one row for all": lambda B, S, mask: _documents(S, S // 2)[None],
    "packed, rows differ": lambda B, S, mask: torch.stack([_documents(S, 2 + row, S - 3) for row in range(B)]),
    "packed, starting at 1": lambda B, S, mask: _documents(S, S // 3)[None].expand(B, S) + 1,
    "of the mask": lambda B, S, mask: (
        (mask.long().cumsum(-1) - 1).clamp(min=0)
        if isinstance(mask, Tensor) and mask.dim() == 2
        else torch.arange(S)[None]
    ),
    "backwards": lambda B, S, mask: torch.arange(S).flip(0)[None],
    "all equal": lambda B, S, mask: torch.zeros(B, S, dtype=torch.long),
    "with cu_seq_lens": lambda B, S, mask: _documents(S, S // 3)[None].expand(B, S),
}


def _told(B: int, S: int) -> dict[str, Any]:
    """Where documents start, in the arguments of flash attention, for rows of two documents each."""
    starts = torch.tensor([row * S + start for row in range(B) for start in (0, S // 3)] + [B * S], dtype=torch.int32)
    longest = S - S // 3
    return {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}


LABELS: dict[str, Callable[[Tensor, Any], dict[str, Any]]] = {
    "none": lambda ids, mask: {},
    "all": lambda ids, mask: {"labels": _padded(ids, mask)},
    "padding too": lambda ids, mask: {"labels": ids},
    "without the prompt": lambda ids, mask: {"labels": _from(_padded(ids, mask), 4)},
    "only the last": lambda ids, mask: {"labels": _from(ids, ids.shape[1] - 1)},
    "no token": lambda ids, mask: {"labels": torch.full_like(ids, IGNORED)},
    "one row only": lambda ids, mask: {"labels": torch.cat([ids[:1], torch.full_like(ids[1:], IGNORED)])},
    "shifted": lambda ids, mask: {"labels": ids, "shift_labels": _from(ids.roll(-1, 1), 2)},
    "items": lambda ids, mask: {"labels": _padded(ids, mask), "num_items_in_batch": 50},
    "items, a tensor": lambda ids, mask: {"labels": _padded(ids, mask), "num_items_in_batch": torch.tensor(50)},
    "items, a float": lambda ids, mask: {"labels": _padded(ids, mask), "num_items_in_batch": 50.0},
    "another ignore_index": lambda ids, mask: {"labels": ids.masked_fill(ids % 3 == 0, -1), "ignore_index": -1},
}


def _padded(ids: Tensor, mask: Any) -> Tensor:
    return ids.masked_fill(mask == 0, IGNORED) if isinstance(mask, Tensor) and mask.shape == ids.shape else ids


def _from(ids: Tensor, first: int) -> Tensor:
    return ids.masked_fill(torch.arange(ids.shape[1]) < first, IGNORED)


CALLS: dict[str, dict[str, Any]] = {
    "keep 3": {"logits_to_keep": 3},
    "keep some": {"logits_to_keep": torch.tensor([1, 4, 5])},
    "hidden states": {"output_hidden_states": True},
    "attentions": {"output_attentions": True},
    "tuple": {"return_dict": False},
    "cache": {"use_cache": True},
    "no cache": {"use_cache": False},
    "cache as config": {"use_cache": None},
    "is_causal False": {"is_causal": False},
    "is_causal True": {"is_causal": True},
    "softcap": {"softcap": 1.0},
    "position_bias": {"position_bias": None},
    "unknown argument": {"never_heard_of": 3},
    "cache given": {},
    "empty cache given": {},
    "positional": {},
}
"""Further arguments of a call, by name; the last three are made in `make_call`."""


def make_call(
    net: Any, seed: int, *, mask: str, positions: str, labels: str, inputs: str, call: tuple[str, ...], head: str
) -> tuple[list[Any], dict[str, Any]]:
    """The arguments, by position and by name."""
    generator = torch.Generator().manual_seed(seed)
    B, S = 2 + seed % 2, 11 + seed % 5
    ids = torch.randint(6, VOCABULARY, (B, S), generator=generator)
    base = next(iter(net.parameters()))
    mask_value = MASKS[mask](B, S, generator)
    named: dict[str, Any] = {"attention_mask": _in_dtype(mask_value, base.dtype) if "4-D" in mask else mask_value}
    named["position_ids"] = POSITIONS[positions](B, S, mask_value)
    named |= _told(B, S) if positions == "with cu_seq_lens" else {}
    named |= LABELS[labels](ids, mask_value) if head == "causal" else {}
    if head != "causal" and labels != "none":
        named["labels"] = torch.randint(0, 3, (B,) if head == "classification" else (B, S), generator=generator)
    if inputs == "ids":
        named["input_ids"] = ids
    else:
        embeds = torch.randn(B, S, HIDDEN, generator=generator).bfloat16().to(base.dtype)
        named["inputs_embeds"] = embeds.requires_grad_("gradient" in inputs)
    for name in call:
        named |= CALLS[name]
    if "cache given" in call or "empty cache given" in call:
        named[KV_CACHE] = _filled(net, B, generator, 0 if "empty cache given" in call else CACHED)
        if isinstance(mask_value, Tensor) and mask_value.dim() == 2 and "cache given" in call:
            named["attention_mask"] = torch.cat([mask_value.new_ones(B, CACHED), mask_value], 1)
    named = {name: value for name, value in named.items() if value is not None or name in ("use_cache",)}
    if "positional" in call and "input_ids" in named and "attention_mask" in named:
        return [named.pop("input_ids"), named.pop("attention_mask")], named
    return [], named


def _in_dtype(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if not mask.is_floating_point():
        return mask
    return mask.clamp(min=torch.finfo(dtype).min).to(dtype)


def _filled(net: Any, B: int, generator: torch.Generator, tokens: int) -> Any:
    cache = DynamicCache()
    if tokens:
        ids = torch.randint(6, VOCABULARY, (B, tokens), generator=generator)
        mode = net.training
        with torch.no_grad():
            net.eval()(input_ids=ids, **{KV_CACHE: cache, "use_cache": True})
        net.train(mode)
    return cache
