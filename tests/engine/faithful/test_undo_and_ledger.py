"""Undone, beside another model, and what the ledger says of it; the bits of training and evaluation."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from fastft import ledger_of, patch_model, unpatch_model
from fastft.errors import BackendError
from same_as_stock import (
    IDS,
    PADDED,
    PLAIN,
    SMALL,
    Change,
    HalfLayer,
    Same,
    call,
    differences,
    gradients,
    layers,
    own_attention_function,
    settled,
    step,
)


def test_undone_while_outputs_wait(same: Same) -> None:
    def ask(model: Any) -> Any:
        out = call(model, **PADDED, use_cache=True)
        unpatch_model(model)
        keys, logits = out.past_key_values.layers[0].keys, out.logits
        (out.loss + logits.square().mean()).backward()
        return [out.loss, logits, keys, gradients(model), step(model)]

    same(ask)


def test_a_second_peft_model_over_the_same_base(same: Same) -> None:
    def ask(model: Any) -> Any:
        first = step(model)
        torch.manual_seed(4)
        config = peft.LoraConfig(target_modules=["up_proj"], init_lora_weights=False)
        second = peft.get_peft_model(model.unload(), config).train()
        return [first, step(second), step(second, **PADDED)]

    same(ask)


def test_two_models_in_one_process_do_not_disturb_each_other(toy: Callable[..., Any]) -> None:
    stock = [step(toy(family, base=SMALL), **PADDED) for family in ("toy-llama", "toy-qwen2")]
    one, other = (toy(family, base=SMALL) for family in ("toy-llama", "toy-qwen2"))
    patch_model(one, backend="eager", placement="keep")
    patch_model(other, backend="eager", placement="full")
    first, second = call(one, **PADDED), call(other, **PADDED)
    (first.loss + second.loss).backward()
    assert not list(differences(stock, settled([[first.loss, gradients(one)], [second.loss, gradients(other)]])))
    unpatch_model(one)
    assert ledger_of(one) is None
    assert not list(differences(stock[1], step(other, **PADDED)))
    assert not list(differences(stock[0], step(one, **PADDED)))
    assert not ledger_of(other).fallbacks


STOCK: dict[str, Change] = {
    "a hook": lambda model: layers(model)[0].mlp.register_forward_hook(lambda *_: None),
    "a subclass": lambda model: setattr(layers(model)[0], "__class__", HalfLayer),
    "an attention function": own_attention_function,
    "a trained norm": lambda model: setattr(layers(model)[0].input_layernorm.weight, "requires_grad", True),
}


@pytest.mark.parametrize("after_a_step", [False, True], ids=["before a step", "after a step"])
@pytest.mark.parametrize("change", STOCK)
def test_strict_is_an_error_where_the_ledger_says_stock(
    change: str, after_a_step: bool, toy: Callable[..., Any]
) -> None:
    plain, strict = toy(base=SMALL), toy(base=SMALL)
    ledger = patch_model(plain, backend="eager")
    patch_model(strict, backend="eager", strict=True)
    for model in (plain, strict):
        if after_a_step:
            step(model)
        STOCK[change](model)
    step(plain)
    assert ledger.paths["layers.0"].path == "stock"
    with pytest.raises(BackendError, match=r"layers\.0|runs as stock|run as stock"):
        step(strict)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["toy-llama", "toy-qwen3"])
def test_without_gradients_training_and_evaluation_have_the_same_bits(
    family: str, dtype: torch.dtype, toy: Callable[..., Any]
) -> None:
    """Stock's, wherever stock's are the same in both modes."""
    model = toy(family, base={**SMALL, "dtype": dtype})

    def bits() -> list[Tensor]:
        found = []
        with torch.no_grad():
            for given in ({"input_ids": IDS}, PLAIN, PADDED):
                for mode in (True, False):
                    out = call(model.train(mode), **given)
                    found += [out.logits.clone(), *([] if out.loss is None else [out.loss.clone()])]
            with model.train().disable_adapter():
                found.append(call(model, **PADDED).logits.clone())
        return found

    stock = bits()
    patch_model(model, backend="eager")
    step(model.train(), **PADDED)
    assert all(map(torch.equal, stock, bits()))
    assert torch.equal(stock[0], stock[1])
