"""What differs between a stock run and a patched one."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from fastft.errors import FastftError
from situations.axes import Situation, sensible
from situations.running import Observed, observe
from situations.steps import Values

LOSS_ERROR = 2e-5
"""Relative, in fp32: some hundred sums in another order, each off by 6e-8."""
OUTPUT_ERROR = 5e-5
"""Of the largest number of an output in fp32."""
GRADIENT_ERROR = 1e-4
"""Of the largest number of a gradient in fp32: the softmax's backward takes differences of nearly equal numbers."""
GRADIENT_FLOOR = 2e-6
"""Of the largest gradient of all: one that is a sum of nothing but rounding errors proves nothing."""
STOCKS_OWN = 1.5
"""In bf16: how often stock's own error, against fp32 on the same weights, a patched model's may be."""
BF16_FLOOR = 0.08
"""In bf16, relative: twenty roundings.  In 500 situations, all that was right but two came up to 0.8 times what this
allows, and what was wrong began at 10 times."""
_ROUNDS_WORSE = "rounds worse"
_OTHER_SEEDS = (1_000_003, 2_000_003)
"""Added to a seed: where a number rounds the other way by chance (a ReLU near 0), other numbers do not."""
ROUNDED = 1e-4
"""From which relative error on stock itself rounds; below, it is compared as fp32."""
_DROPPED_SO_RARELY = "dropout 1e-9"
"""The adapter that draws random numbers and is deterministic all the same."""


@dataclass
class Result:
    """What came of a situation."""

    situation: Situation
    differences: list[str]
    fused: bool
    """Whether a decoder layer ran fused."""
    parts_fused: bool
    """Whether anything did."""
    stock_error: str | None


def run(given: Situation, *, both_stock: bool = False, cache: bool = False) -> Result:
    """Run a situation with the stock model and with a patched one, and compare.

    Args:
        given: the situation.
        both_stock: patch neither: nothing may differ.
        cache: see `observe`.
    """
    result = _once(given, both_stock, cache)
    if result.differences and all(_ROUNDS_WORSE in line for line in result.differences):
        others = [_once(replace(given, seed=given.seed + more), both_stock, cache) for more in _OTHER_SEEDS]
        if not any(other.differences for other in others):
            result.differences = []
    return result


def _once(given: Situation, both_stock: bool, cache: bool) -> Result:
    stock = observe(given, fast=False, cache=cache)
    fast = observe(given, fast=not both_stock, cache=cache)
    exact = observe(given, fast=False, exact=True, cache=cache) if given.rounds else None
    return Result(
        given,
        list(differences(given, stock, fast, exact)),
        "decoder_layer" in fast.fused,
        bool(fast.fused),
        None if stock.error is None else f"{type(stock.error).__name__}: {stock.error}",
    )


def differences(given: Situation, stock: Observed, fast: Observed, exact: Observed | None) -> Iterator[str]:
    """What differs, a line each."""
    for index, (expected, got) in enumerate(zip(stock.steps, fast.steps, strict=False)):
        reference = exact.steps[index] if exact is not None and index < len(exact.steps) else None
        for line in _of_step(given, expected, got, reference):
            yield f"step {index + 1}, {line}"
    # A recomputation by stock fails where another adapter is active by then; the engine's does not ask.
    stocks_own = isinstance(stock.error, CheckpointError)
    if type(stock.error) is not type(fast.error) and not stocks_own and not _clear_refusal(given, fast.error):
        yield f"error: stock {_shown(stock.error)}; patched {_shown(fast.error)}"


def _clear_refusal(given: Situation, error: BaseException | None) -> bool:
    """Second derivatives may be refused, and what an unseen change of the adapters made impossible: in words."""
    if not isinstance(error, (FastftError, RuntimeError)):
        return False
    if given.backward == "gradient penalty":
        return "deriv" in str(error).lower()
    return "the adapters have changed since" in str(error)


def _shown(error: BaseException | None) -> str:
    return "none" if error is None else f"{type(error).__name__}: {str(error).strip()[:160]!r}"


def _of_step(given: Situation, stock: Values, fast: Values, exact: Values | None) -> Iterator[str]:
    if stock["random"] != fast["random"]:
        yield f"random numbers: stock drew {'some' if stock['random'] else 'none'}, patched did not the same"
    # How often hooks were called is compared by itself.
    names, others = ([name for name in values if not name.startswith("hook")] for values in (stock, fast))
    if names != others:
        missing, new = [name for name in names if name not in fast], [name for name in others if name not in stock]
        yield f"names: not in patched {missing[:4]}, only in patched {new[:4]}"
    structure_only = stock["random"] and given.adapter != _DROPPED_SO_RARELY
    largest = max((_size(value) for name, value in stock.items() if _is_gradient(name)), default=0.0)
    rounding = None if exact is None else _Rounding.of(stock, exact)
    for name, value in stock.items():
        if name not in fast:
            continue
        other = fast[name]
        if isinstance(value, Tensor) and isinstance(other, Tensor):
            line = _of_tensors(name, value, other, rounding, largest, structure_only)
            if line is not None:
                yield f"{name}: {line}"
        elif type(value) is not type(other) or value != other:
            yield f"{name}: stock {_brief(value, other)}, patched {_brief(other, value)}"


def _brief(value: Any, other: Any) -> str:
    if isinstance(value, list) and isinstance(other, list) and len(value) == len(other):
        value = [a for a, b in zip(value, other, strict=True) if a != b]
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else str(value)[:120]


def _size(value: Any) -> float:
    finite = value[value.isfinite()].abs() if isinstance(value, Tensor) and value.is_floating_point() else None
    return float(finite.max()) if finite is not None and finite.numel() else 0.0


@dataclass
class _Rounding:
    """How far stock itself is off in bf16, by the root of the mean square: single numbers are off by chance."""

    exact: Values
    """What stock gave in fp32 on the same weights."""
    gradients: float = 0.0
    """The root mean square of the largest gradient."""
    own: dict[bool, float] = field(default_factory=lambda: {True: 0.0, False: 0.0})
    """The largest relative error of gradients (True), and of all else."""

    @classmethod
    def of(cls, stock: Values, exact: Values) -> "_Rounding":
        made = cls(exact, max((_rms(value) for name, value in exact.items() if _is_gradient(name)), default=0.0))
        for name, value in stock.items():
            if isinstance(value, Tensor) and made.knows(name, value):
                made.own[_is_gradient(name)] = max(made.own[_is_gradient(name)], made.error(name, value))
        return made

    @property
    def rounds(self) -> bool:
        return max(self.own.values()) > ROUNDED

    def knows(self, name: str, value: Tensor) -> bool:
        """Whether there is something to compare with."""
        reference = self.exact.get(name)
        return isinstance(reference, Tensor) and value.is_floating_point() and reference.shape == value.shape

    def error(self, name: str, value: Tensor) -> float:
        """How far a tensor is off, relative to what it should be."""
        reference = self.exact[name].double()
        size = max(_rms(reference), 1e-6, 0.1 * self.gradients * _is_gradient(name))
        return _rms(value.double() - reference) / size

    def verdict(self, name: str, value: Tensor) -> str | None:
        """What is wrong with a patched model's tensor, if anything."""
        own = self.own[_is_gradient(name)]
        error, allowed = self.error(name, value), STOCKS_OWN * own + BF16_FLOOR
        return (
            None if error <= allowed else f"{_ROUNDS_WORSE}: by {error:.2e}, stock by {own:.2e}, allowed {allowed:.1e}"
        )


def _is_gradient(name: str) -> bool:
    return name.startswith("grad")


def _rms(value: Any) -> float:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return 0.0
    finite = value[value.isfinite()].double()
    return float(finite.square().mean().sqrt()) if finite.numel() else 0.0


def _of_tensors(
    name: str, stock: Tensor, fast: Tensor, rounding: _Rounding | None, largest: float, structure_only: bool
) -> str | None:
    if stock.shape != fast.shape or stock.dtype != fast.dtype:
        return f"stock {tuple(stock.shape)} {stock.dtype}, patched {tuple(fast.shape)} {fast.dtype}"
    if structure_only or not stock.numel():
        return None
    if not stock.is_floating_point():
        return None if torch.equal(stock, fast) else "other values"
    a, b = stock.double(), fast.double()
    if not torch.equal(a.isfinite(), b.isfinite()) or not torch.equal(a.isnan(), b.isnan()):
        return f"{int((~a.isfinite()).sum())} numbers are not finite in stock, {int((~b.isfinite()).sum())} in patched"
    if rounding is not None and rounding.rounds and rounding.knows(name, stock):
        return rounding.verdict(name, fast)
    gradient = _is_gradient(name)
    relative = GRADIENT_ERROR if gradient else LOSS_ERROR if stock.dim() == 0 else OUTPUT_ERROR
    allowed = relative * max(_size(a), 1e-3) + (GRADIENT_FLOOR * largest if gradient else 0.0)
    error = _error(a, b)
    return None if error <= allowed else f"off by {error:.2e} of {_size(a):.2e}, allowed {allowed:.1e}"


def _error(a: Tensor, b: Tensor) -> float:
    difference = (a - b)[(a.isfinite() & b.isfinite())].abs()
    return float(difference.max()) if difference.numel() else 0.0


def smallest(given: Situation, compare: Callable[[Situation], Result] = run) -> Result:
    """The situation with the fewest unusual things that still differs: one thing is left out at a time."""
    worst = compare(given)
    while worst.differences:
        simpler = (
            compare(each) for each in map(sensible, worst.situation.simpler()) if each.size < worst.situation.size
        )
        found = next((result for result in simpler if result.differences), None)
        if found is None:
            break
        worst = found
    return worst
