"""Running a situation with the stock model and with a patched one, each for itself."""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastft import patch_hf_training, patch_model
from fastft.engine.ledger import Ledger
from situations.axes import ENGINES, Situation
from situations.batches import make_call
from situations.models import ADAPTERS, make_base
from situations.settings import SETTINGS
from situations.sites import NotHereError, Site
from situations.steps import (
    BACKWARDS,
    BETWEEN,
    MODES,
    MOMENTS,
    OBJECTIVES,
    READINGS,
    Values,
    call_model,
    flatten,
    without_cache,
)
from situations.surgery import GLOBAL_HOOKS, SURGERIES

SPREADS = {False: 0.3, True: 0.15}
"""Of the weights, by whether a situation rounds: in bf16 sharp attention chooses another token by chance."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


@dataclass
class Observed:
    """What one run gave."""

    steps: list[Values] = field(default_factory=list)
    error: BaseException | None = None
    fused: set[str] = field(default_factory=set)
    """The kinds of modules that ran fused in a step."""


ASKED = ("cache", "cache given", "empty cache given")
"""Calls that ask for a cache.  In training fastft builds none otherwise (docs/design.md)."""


def observe(given: Situation, *, fast: bool, exact: bool = False, cache: bool = False) -> Observed:
    """Run a situation on a patched model, or on the stock one.

    Args:
        given: the situation.
        fast: whether the model is patched.
        exact: in fp32, on the same weights.
        cache: look at key/value caches in training too where nobody asked for one.
    """
    seen = Observed()
    with ExitStack() as undo, warnings.catch_warnings(), _fused_into(seen.fused):
        warnings.simplefilter("ignore")
        undo.callback(torch.set_grad_enabled, torch.is_grad_enabled())
        try:
            site = _make(given, fast, exact, undo)
            for index in range(given.steps):
                last = index == given.steps - 1
                if index == 1:
                    _change(given, site, "step")
                if last and not MODES[given.mode][0]:
                    site.net.eval()
                mode = given.mode if last else "train"
                asked = cache or any(name in ASKED for name in given.call)
                site.sees_cache = asked or mode not in ("train", "autocast")
                seen.steps.append(_step(given, site, index, MODES[mode][1], exact))
        except Exception as error:  # what a situation shows may be the error
            seen.error = error
    return seen


@contextmanager
def _fused_into(kinds: set[str]) -> Iterator[None]:
    """Collect the kinds of what the ledger says ran fused."""
    original = Ledger.fused

    def spy(self: Ledger, name: str, kind: str, backend: str) -> None:
        kinds.add(kind)
        original(self, name, kind, backend)

    Ledger.fused = spy  # type: ignore[method-assign]
    try:
        yield
    finally:
        Ledger.fused = original  # type: ignore[method-assign]


def _make(given: Situation, fast: bool, exact: bool, undo: ExitStack) -> Site:
    base = make_base(
        given.family, given.config, given.attention, given.head, DTYPES[given.dtype], 1 + given.seed,
        spread=SPREADS[given.rounds],
    )  # fmt: skip
    site = Site(base, fast=fast, exact=exact, undo=undo, head=given.head)
    whole = given.engine == "patch_hf_training"
    if whole:
        if fast:
            undo.enter_context(patch_hf_training())
        _change(given, site, "before")
    if given.checkpointing == "before the adapter":
        site.net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(given.seed)
    site.net = ADAPTERS[given.adapter](site.net).train()
    if exact:
        site.net.float()
    if not whole:
        _change(given, site, "before")
        if fast:
            patch_model(site.net, backend="eager", **ENGINES[given.engine])
    if given.checkpointing in ("on", "reentrant"):
        reentrant = given.checkpointing == "reentrant"
        site.net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        if reentrant:
            site.net.enable_input_require_grads()
    _change(given, site, "after")
    return site


def _change(given: Situation, site: Site, when: str) -> None:
    for change in given.changes:
        if change.when != when:
            continue
        try:
            if change.part:
                SURGERIES[change.what](site, change.part, change.where)
            elif change.what in GLOBAL_HOOKS:
                GLOBAL_HOOKS[change.what](site)
            else:
                SETTINGS[change.what](site, change.where)
        except NotHereError:
            pass


def _step(given: Situation, site: Site, index: int, context: Any, exact: bool) -> Values:
    args, named = make_call(
        site.net, given.seed + index, mask=given.mask, positions=given.positions, labels=given.labels,
        inputs=given.inputs, call=given.call, head=given.head,
    )  # fmt: skip
    torch.manual_seed(1000 + index)
    before = torch.get_rng_state()
    site.seen.clear()
    found: Values = {}
    looked = _Looked(site, given.reading)
    with context() if not (exact and "autocast" in given.mode) else torch.enable_grad():
        out, first = call_model(site.net, given.backward, args, named)
        total = OBJECTIVES[given.objective](looked.at(0, out) or looked.read("the loss only", out))
        if first is not None and total is not None:
            more = OBJECTIVES["loss"](looked.read("the loss only", first))
            total = total if more is None else total + 0.5 * more
    trained = [parameter for parameter in site.net.parameters() if parameter.requires_grad]
    if total is not None and total.requires_grad and trained:
        found |= BACKWARDS[given.backward](total, trained)
    looked.at(1, out)
    found |= {f"grad of {name}": _copied(p.grad) for name, p in site.net.named_parameters() if _matters(p)}
    if isinstance(named.get("inputs_embeds"), Tensor):
        found["grad of inputs_embeds"] = _copied(named["inputs_embeds"].grad)
    BETWEEN[given.between](trained)
    looked.at(2, out)
    found |= looked.copies
    found["count of what hooks saw"] = len(site.seen)
    found |= {f"hook {number}": tensor for number, tensor in enumerate(site.seen)}
    found["random"] = not torch.equal(before, torch.get_rng_state())
    found["parameters"] = [(name, p.requires_grad, str(p.dtype)) for name, p in site.net.named_parameters()]
    found["training"] = [module.training for module in site.net.modules()]
    return found


class _Looked:
    """What is read of an output, at the moments that a reading has for that."""

    def __init__(self, site: Site, reading: str) -> None:
        self._site, self._reading = site, reading
        self._reads, self._copies = MOMENTS.get(reading, (0, 0))
        self._values: Values = {}
        self.copies: Values = {}

    def at(self, moment: int, out: Any) -> Values:
        """Do what is to be done at this moment; all that was read so far."""
        if moment == self._reads:
            self._values = self.read(self._reading, out)
        if moment == self._copies:
            self.copies = {name: _copied(value) for name, value in self._values.items()}
            tensors = {name: value for name, value in self._values.items() if isinstance(value, Tensor)}
            self.copies |= {f"{name} requires grad": value.requires_grad for name, value in tensors.items()}
        return self._values

    def read(self, reading: str, out: Any) -> Values:
        """What a reading finds in an output, by name."""
        read = READINGS[reading](out)
        return dict(flatten(read if self._site.sees_cache else without_cache(read), "out"))


def _matters(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad or parameter.grad is not None


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
