"""What every test of this folder asks by: the same of a stock and of a patched model."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastft import ledger_of, patch_hf_training
from same_as_stock import (
    SMALL,
    Answers,
    Ask,
    Change,
    Same,
    differences,
    settled,
)


@pytest.fixture
def same(toy: Callable[..., Any], toy_base: Callable[..., Any]) -> Same:
    """Asks a stock and a patched model, and asserts that they say the same."""

    def answer(ask: Ask, fast: bool, adapt: Change | None, family: str, base: dict[str, Any], lora: Any) -> Any:
        with patch_hf_training(backend="eager") if fast else contextlib.nullcontext():
            settings = {**SMALL, **base}
            model = toy(family, base=settings, **lora) if adapt is None else adapt(toy_base(family, **settings))
            torch.manual_seed(5)
            found = settled(ask(model.train()))
            ledger = ledger_of(model)
            paths = {} if ledger is None else {name: path.reason or path.path for name, path in ledger.paths.items()}
            return found, paths

    def check(
        ask: Ask,
        *,
        family: str = "toy-llama",
        adapt: Change | None = None,
        base: dict[str, Any] | None = None,
        **lora: Any,
    ) -> Answers:
        (stock, _), (fast, ledger) = (answer(ask, each, adapt, family, base or {}, lora) for each in (False, True))
        assert not list(differences(stock, fast))
        return Answers(stock, fast, ledger)

    return check
