"""Random situations in which a patched model must do what stock does (tests/helpers/situations)."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.nn.modules.module as global_hooks
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from situations import Change, Result, Situation, run, running, situation, smallest

CHUNKS, CHUNK = 20, 25


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_a_patched_model_does_what_stock_does(chunk):
    results = [run(situation(seed)) for seed in range(chunk * CHUNK, (chunk + 1) * CHUNK)]
    wrong = [f"{result.situation}\n    {line}" for result in results for line in result.differences[:2]]
    assert not wrong, "\n".join(wrong)
    assert sum(result.fused for result in results) >= CHUNK / 2, "too little ran fused to compare anything"
    assert sum(result.stock_error is not None for result in results) <= CHUNK / 5, "stock itself fails too often"


@pytest.mark.parametrize("chunk", range(2))
def test_two_stock_models_do_the_same(chunk):
    """Else a difference would say nothing about the engine."""
    seeds = range(1000 + chunk * CHUNK, 1000 + (chunk + 1) * CHUNK)
    assert not [line for seed in seeds for line in run(situation(seed), both_stock=True).differences]


def test_a_seed_is_one_situation_in_one_line():
    lines = [str(situation(seed)) for seed in range(200)]
    assert lines == [str(situation(seed)) for seed in range(200)]
    assert len({line.partition(": ")[2] for line in lines}) > 180
    assert not any("\n" in line for line in lines)


def _scaled_head(net: Any) -> None:
    with torch.no_grad():
        net.get_output_embeddings().weight.mul_(1.001)


def _scaled_gradient(net: Any) -> None:
    next(p for p in net.parameters() if p.requires_grad).register_hook(lambda gradient: 1.001 * gradient)


def _wrapping(change: Callable[[Any], Any]) -> Callable[[Any], None]:
    def fault(net: Any) -> None:
        forward = net.forward
        net.forward = lambda *args, **kwargs: change(forward(*args, **kwargs))

    return fault


def _draw(out: Any) -> Any:
    torch.rand(1)
    return out


def _without_logits(out: Any) -> Any:
    del out["logits"]
    return out


def _detached_logits(out: Any) -> Any:
    out.logits = out.logits.detach()
    return out


def _raise(out: Any) -> Any:
    raise KeyError("never")


FAULTS: dict[str, Callable[[Any], None]] = {
    "logits off by a thousandth": _scaled_head,
    "a gradient off by a thousandth": _scaled_gradient,
    "a random number drawn": _wrapping(_draw),
    "an output missing": _wrapping(_without_logits),
    "an output without its gradient": _wrapping(_detached_logits),
    "an error": _wrapping(_raise),
    "a module that is not in training": lambda net: net.get_base_model().model.layers[0].mlp.eval() and None,
    "a hook that sees nothing": lambda net: net.get_base_model().model.layers[0].mlp._forward_hooks.clear(),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(fault, monkeypatch):
    monkeypatch.setattr(running, "patch_model", lambda net, **settings: FAULTS[fault](net))
    hook = Change("forward hook", "mlp", "all", "before")
    assert run(Situation(seed=3, engine="patch_model", changes=(hook,))).differences


def test_no_fault_is_seen_where_none_is(monkeypatch):
    monkeypatch.setattr(running, "patch_model", lambda net, **settings: None)
    hook = Change("forward hook", "mlp", "all", "before")
    assert not run(Situation(seed=3, engine="patch_model", changes=(hook,))).differences


def _reached() -> list[Any]:
    """What changes reach beyond a model."""
    hooks = [
        getattr(global_hooks, name) for name in vars(global_hooks) if name.startswith("_global_") and "hook" in name
    ]
    return [
        modeling_llama.LlamaMLP.forward, modeling_llama.apply_rotary_pos_emb, nn.Linear.forward, nn.functional.linear,
        ALL_ATTENTION_FUNCTIONS["sdpa"], peft.PeftModel.__init__, torch.is_grad_enabled(),
        *(len(each) for each in hooks if isinstance(each, dict)),
    ]  # fmt: skip


def test_nothing_stays_behind_even_after_an_error(monkeypatch):
    changes = (
        Change("forward of the class", "mlp"),
        *map(Change, ("apply_rotary_pos_emb", "nn.Linear.forward", "F.linear", "attention function of the registry")),
        Change("global forward hook on all"),
    )
    before = _reached()
    during: list[Any] = []

    def fail(*args: Any) -> None:
        during.extend(_reached())
        raise KeyError("never")

    monkeypatch.setattr(running, "call_model", fail)
    assert not run(Situation(seed=1, mode="train, no_grad", changes=changes)).differences
    assert during[: len(before)] != before
    assert _reached() == before


def test_the_smallest_situation_has_what_is_needed_only():
    def compare(given: Situation) -> Result:
        wrong = given.mask == "right" and any(change.what == "F.silu" for change in given.changes)
        return Result(given, ["wrong"] * wrong, fused=True, parts_fused=True, stock_error=None)

    given = Situation(
        seed=1, family="gemma2", attention="eager", mask="right", dtype="bf16", steps=2,
        changes=(Change("F.linear"), Change("F.silu", "", "first", "step")),
    )  # fmt: skip
    found = smallest(given, compare)
    assert found.situation == Situation(seed=1, mask="right", changes=(Change("F.silu"),))
    assert found.differences == ["wrong"]
