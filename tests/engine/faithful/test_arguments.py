"""Nothing that was given is dropped: masks, positions, keywords."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from same_as_stock import EMBEDDINGS, IDS, LABELS, MASK, PADDED, PLAIN, B, S, Same, call, layers, step

ALLOWED_SS = torch.ones(S, S, dtype=torch.bool).tril()
ADDED_SS = torch.zeros(S, S).masked_fill(~ALLOWED_SS, -1e9)
PREFIX_SS = ALLOWED_SS | (torch.arange(S) < 4)
MASKS: dict[str, Tensor] = {
    "numbers of documents": torch.tensor([[1] * 6 + [2] * 6] * B),
    "negative": -MASK,
    "halves": 0.5 * MASK,
    "uint8": MASK.to(torch.uint8),
    "int8, left": MASK.flip(1).to(torch.int8),
    "a hole": (torch.arange(S) != 4).long().expand(B, -1),
    "no token": torch.zeros_like(MASK),
    "4-D, one for all rows": ADDED_SS[None, None],
    "4-D, one a head": ADDED_SS.expand(B, 4, S, S),
    "4-D, a prefix is seen by all": torch.zeros(S, S).masked_fill(~PREFIX_SS, -1e9).expand(B, 1, S, S),
    "4-D, infinite": torch.zeros(S, S).masked_fill(~ALLOWED_SS, float("-inf")).expand(B, 1, S, S),
}
POSITIONS: dict[str, Tensor] = {
    "negative": torch.arange(S)[None] - 3,
    "floats": torch.arange(S)[None].float(),
    "int32": torch.arange(S, dtype=torch.int32)[None],
    "late": torch.arange(S)[None] + 1000,
    "each twice": (torch.arange(S) // 2)[None].expand(B, -1),
    "rows differ": torch.stack([torch.arange(S), torch.arange(S) % 5]),
}


@pytest.mark.parametrize(
    ("mask", "attention"),
    [*((mask, "sdpa") for mask in MASKS), *((mask, "eager") for mask in MASKS if mask.startswith(("4-D", "a hole")))],
)
def test_a_mask_reaches_fused_and_stock_layers(mask: str, attention: str, same: Same) -> None:
    def ask(model: Any) -> Any:
        given = {"input_ids": IDS, "labels": IDS, "attention_mask": MASKS[mask]}
        found = [step(model, **given), call(model, **given).logits]
        handle = layers(model)[1].mlp.register_forward_hook(lambda *_: None)  # that layer is stock now
        found += [step(model, **given), step(model, **given, output_hidden_states=True)]
        handle.remove()
        return [*found, step(model, **given)]

    same(ask, base={"attn_implementation": attention})


@pytest.mark.parametrize("positions", POSITIONS)
def test_positions_reach_fused_and_stock_layers(positions: str, same: Same) -> None:
    """Without a cache stock takes what starts anew for documents; with one it does not."""

    def ask(model: Any) -> Any:
        given = {"position_ids": POSITIONS[positions]}
        calls = [{"use_cache": True}, {"use_cache": False}, {**PADDED, "use_cache": False}]
        found = [step(model, **given, **more) for more in calls]
        layers(model)[0].mlp.register_forward_hook(lambda *_: None)
        return [*found, *(step(model, **given, **more) for more in calls)]

    same(ask)


@pytest.mark.parametrize("family", ["toy-llama", "toy-qwen2", "toy-gemma2"])
def test_who_watches_a_layer_sees_all_that_stock_hands_over(family: str, same: Same) -> None:
    def ask(model: Any) -> Any:
        seen: list[Any] = []

        def hook(module: nn.Module, args: Any, named: dict[str, Any]) -> None:
            tensors = {name: value.clone() for name, value in named.items() if isinstance(value, Tensor)}
            seen.append([len(args), sorted(set(named) - {"return_dict"}), tensors])

        for module in (model.get_base_model().model, layers(model)[0], layers(model)[1].self_attn):
            module.register_forward_pre_hook(hook, with_kwargs=True)
        step(model, **PADDED, something=3, num_items_in_batch=9)
        step(model, use_cache=False)
        return seen

    attention = "eager" if family == "toy-gemma2" else "sdpa"
    same(ask, family=family, base={"attn_implementation": attention})


def test_an_attention_function_gets_the_callers_keywords(same: Same) -> None:
    def ask(model: Any) -> Any:
        seen: list[Any] = []

        def attend(*args: Any, **kwargs: Any) -> Any:
            seen.append({name: value for name, value in sorted(kwargs.items()) if isinstance(value, (int, float, str))})
            return ALL_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)

        ALL_ATTENTION_FUNCTIONS.register("watched_for_a_test", attend)
        model.get_base_model().config._attn_implementation = "watched_for_a_test"
        return [step(model, told="something"), seen]

    assert same(ask).fast[1]


@pytest.mark.parametrize(
    "more",
    [
        {"shift_labels": LABELS.roll(-1, 1)}, {"cache_position": torch.arange(S)}, {"return_loss": True},
        {"cu_seq_lens_q": torch.tensor([0, S, B * S], dtype=torch.int32), "max_length_q": S},
        {"num_items_in_batch": torch.tensor([30])}, {"num_items_in_batch": 0}, {"logits_to_keep": S},
    ],
    ids=["shift_labels", "cache_position", "return_loss", "cu_seq_lens", "items of one", "no items", "all kept"],
)  # fmt: skip
def test_further_arguments(more: dict[str, Any], same: Same) -> None:
    same(lambda model: [step(model, **PADDED, **more), call(model, **PADDED, **more).logits])


BAD: dict[str, dict[str, Any]] = {
    "neither ids nor embeddings": {"input_ids": None},
    "both": {"input_ids": IDS, "inputs_embeds": EMBEDDINGS},
    "ids of another type": {**PLAIN, "input_ids": IDS.float()},
    "labels as a list": {**PLAIN, "labels": IDS.tolist()},
    "fewer logits than labels": {**PLAIN, "logits_to_keep": 3},
    "embeddings of another dtype": {"inputs_embeds": EMBEDDINGS.double(), "labels": IDS},
}


@pytest.mark.parametrize("bad", BAD)
def test_what_stock_refuses_is_refused_as_stock_does(bad: str, same: Same) -> None:
    def ask(model: Any) -> Any:
        with pytest.raises(Exception) as caught:  # noqa: PT011
            call(model, **BAD[bad])
        return [type(caught.value).__name__, step(model)]

    same(ask)
