"""bitsandbytes' Adam over a whole bank of adapters at once.

bitsandbytes updates parameter by parameter, each with a launch and a host synchronisation: some 400 of them a step.
Its kernels do not care where one matrix ends and the next begins, since 8-bit blocks of 256 elements never span two
matrices of a bank (`bank.ALIGNMENT`).  So they are called once for all matrices that follow each other, on the same
numbers, with the same result to the bit.

The optimizer stays the user's.  PyTorch's own hooks around `step` do the update first and hide the gradients of what
was updated, so the optimizer's loop skips it; then they put the gradients back.  The optimizer's state keeps its form,
one entry a parameter, as views: `state_dict` and `load_state_dict` go on working.
"""

import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import increment_version
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fastft.engine.bank import ALIGNMENT, AdapterBank, bank_of
from fastft.engine.deferred import keep_what_waits

_Parameters = list[torch.nn.Parameter]


@dataclass
class _Span:
    """Parameters that follow each other in the bank and have states of one precision."""

    parameters: _Parameters
    start: int
    end: int
    """Elements of the bank's buffer."""
    states: dict[str, torch.Tensor]
    """What the kernel reads and writes for the whole span, by the optimizer's names."""
    addresses: list[int]
    """Of each parameter's view of `state1`."""


@dataclass
class _Flat:
    """One optimizer's states over one bank."""

    bank: weakref.ref[AdapterBank]
    """Patched anew, a model has another one, beside which this one's buffers shall not live until the next step."""
    spans: list[_Span]


_flat: weakref.WeakKeyDictionary[torch.optim.Optimizer, _Flat] = weakref.WeakKeyDictionary()
_hidden: weakref.WeakKeyDictionary[torch.optim.Optimizer, list[tuple[torch.nn.Parameter, torch.Tensor]]] = (
    weakref.WeakKeyDictionary()
)
_handles: list[Any] = []
"""Of the hooks that watch every optimizer."""
_steps = 0


def steps() -> int:
    """How many steps optimizers have made since `install`."""
    return _steps


def install() -> None:
    """Watch every optimizer's `step`, until `uninstall`; those without a bank's parameters go on unchanged."""
    if not _handles:
        _handles.append(register_optimizer_step_pre_hook(_before))
        _handles.append(register_optimizer_step_post_hook(_after))


def uninstall() -> None:
    """Watch no optimizer any more."""
    while _handles:
        _handles.pop().remove()


def _before(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    keep_what_waits()
    # args[0] is the optimizer; accelerate names no closure by giving None.
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is not None or not _is_plain_adam(optimizer):
        return
    for group_index, group in enumerate(optimizer.param_groups):
        bank = next((b for p in group["params"] if (b := bank_of(p)) is not None), None)
        members = {id(p) for p in group["params"]}
        if bank is None or not bank.holds() or not members.issuperset(map(id, bank.parameters)):
            continue
        gradient_N = bank.gradients_in_one()
        if gradient_N is not None:
            _update(optimizer, group, group_index, bank, gradient_N)


def _after(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    global _steps
    _steps += 1
    for parameter, gradient in _hidden.pop(optimizer, ()):
        parameter.grad = gradient


def _is_plain_adam(optimizer: Any) -> bool:
    """Whether this is bitsandbytes' Adam or AdamW, without paging, clipping by norm, or settings of single matrices."""
    module = sys.modules.get("bitsandbytes.optim.optimizer")
    return (
        module is not None
        and isinstance(optimizer, module.Optimizer2State)
        and optimizer.optimizer_name == "adam"
        and not optimizer.is_paged
        and not optimizer.args.max_unorm
        and not optimizer.mng.index2config
        and not optimizer.mng.pid2config
    )


def _update(
    optimizer: Any, group: dict[str, Any], group_index: int, bank: AdapterBank, gradient_N: torch.Tensor
) -> None:
    import bitsandbytes.functional as library

    flat = _flat.get(optimizer)
    if flat is None or flat.bank() is not bank or not _current(optimizer, flat):
        flat = _adopt(optimizer, group, group_index, bank)
        if flat is None:
            return
        _flat[optimizer] = flat
    beta1, beta2, *more = group["betas"]
    beta3, alpha = (more[0] if more else 0.0), group.get("alpha", 0.0)
    for span in flat.spans:
        states = [optimizer.state[p] for p in span.parameters]
        step = states[0]["step"] + 1
        for state in states:
            state["step"] = step
        part = slice(span.start, span.end)
        g, p, s = gradient_N[part], bank.values_N[part], span.states
        if s["state1"].dtype == torch.uint8:
            library.optimizer_update_8bit_blockwise(
                optimizer.optimizer_name, g, p, s["state1"], s["state2"], beta1, beta2, beta3, alpha, group["eps"],
                step, group["lr"], s["qmap1"], s["qmap2"], s["absmax1"], s["absmax2"], group["weight_decay"],
                gnorm_scale=1.0, skip_zeros=optimizer.args.skip_zeros,
            )  # fmt: skip
        else:
            library.optimizer_update_32bit(
                optimizer.optimizer_name, g, p, s["state1"], beta1, group["eps"], step, group["lr"], s["state2"],
                beta2, beta3, alpha, group["weight_decay"], 1.0, None, skip_zeros=optimizer.args.skip_zeros,
            )  # fmt: skip
    _hidden.setdefault(optimizer, []).extend((p, p.grad) for p in bank.parameters if p.grad is not None)
    for parameter in bank.parameters:
        parameter.grad = None
    # Written through the buffer, they would look unchanged to a backward that comes too late.
    increment_version(bank.parameters)


def _current(optimizer: Any, flat: _Flat) -> bool:
    """Whether every parameter's state is still the view that it was made; `load_state_dict` replaces them."""
    return all(
        optimizer.state[p].get("state1") is not None and optimizer.state[p]["state1"].data_ptr() == address
        for span in flat.spans
        for p, address in zip(span.parameters, span.addresses, strict=True)
    )


def _adopt(optimizer: Any, group: dict[str, Any], group_index: int, bank: AdapterBank) -> _Flat | None:
    """Make the states of the bank's parameters (new ones, or what they have) views of one tensor a span."""
    if not optimizer.initialized:
        # What `step` does first: it may move states to the parameters' device.
        optimizer.check_overrides()
        optimizer.to_gpu()
        optimizer.initialized = True
    place = {id(p): index for index, p in enumerate(group["params"])}
    for parameter in bank.parameters:
        if not optimizer.state[parameter]:
            optimizer.init_state(group, parameter, group_index, place[id(parameter)])
    offset_of = {id(p): offset for p, offset in zip(bank.parameters, bank.offsets, strict=True)}
    spans: list[_Span] = []
    for run, start, end in _runs(optimizer, bank):
        states = [optimizer.state[p] for p in run]
        if len({state["step"] for state in states}) != 1 or "unorm_vec" in states[0]:
            return None
        joined = _joined(states, [offset_of[id(p)] - start for p in run], end - start)
        spans.append(_Span(run, start, end, joined, [state["state1"].data_ptr() for state in states]))
    return _Flat(weakref.ref(bank), spans)


def _runs(optimizer: Any, bank: AdapterBank) -> list[tuple[_Parameters, int, int]]:
    """Neighbours whose states have one precision (small matrices keep 32 bits), and where they start and end."""
    runs: list[tuple[_Parameters, int, int]] = []
    ends = [*bank.offsets[1:], bank.values_N.numel()]
    for parameter, start, end in zip(bank.parameters, bank.offsets, ends, strict=True):
        dtype = optimizer.state[parameter]["state1"].dtype
        if runs and optimizer.state[runs[-1][0][0]]["state1"].dtype == dtype:
            runs[-1] = ([*runs[-1][0], parameter], runs[-1][1], end)
        else:
            runs.append(([parameter], start, end))
    return runs


def _joined(states: Sequence[dict[str, Any]], offsets: Sequence[int], elements: int) -> dict[str, torch.Tensor]:
    """One tensor for each tensor of `states`, which become views of it."""
    joined: dict[str, torch.Tensor] = {}
    for name, example in states[0].items():
        if name.startswith("qmap"):
            joined[name] = example  # the same table for all
        elif isinstance(example, torch.Tensor):
            per_block = ALIGNMENT if name.startswith("absmax") else 1
            # Between the matrices, too, an 8-bit code must mean zero: it counts in its block's largest value.
            table = states[0].get(name.replace("state", "qmap")) if example.dtype == torch.uint8 else None
            zero = 0 if table is None else int(table.abs().argmin())
            whole = torch.full((elements // per_block,), zero, dtype=example.dtype, device=example.device)
            for state, offset in zip(states, offsets, strict=True):
                old = state[name]
                view = whole.narrow(0, offset // per_block, old.numel()).view(old.shape)
                view.copy_(old)
                state[name] = view
            joined[name] = whole
    return joined
