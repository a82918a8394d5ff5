"""What a training loop does with a model in one step, and what it looks at, for `situations`."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate.utils import convert_to_fp32
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint
from transformers import Cache
from trl.trainer.utils import add_fused_lm_head

_CACHES = ("cache", "past_key_values")
_OF_TRLS_HEAD = ("log_probs", "entropy", "mean_logits", "log_sum_sq_probs")
"""Without `is_top1`, which a rounding decides where two tokens are about as likely."""

Values = dict[str, Any]
"""What was looked at, by name."""

MODES: dict[str, tuple[bool, Callable[[], AbstractContextManager[Any]]]] = {
    "train": (True, contextlib.nullcontext),
    "train, no_grad": (True, torch.no_grad),
    "eval": (False, contextlib.nullcontext),
    "eval, no_grad": (False, torch.no_grad),
    "eval, inference_mode": (False, torch.inference_mode),
    "autocast": (True, lambda: torch.autocast("cpu", dtype=torch.bfloat16)),
    "eval, autocast": (False, lambda: torch.autocast("cpu", dtype=torch.bfloat16)),
}
"""Whether the model trains, and what the call stands in."""


def without_cache(value: Any) -> Any:
    """The same without caches and their names."""
    if isinstance(value, dict):
        kept = {name: each for name, each in value.items() if name not in _CACHES}
        return {name: without_cache(each) for name, each in kept.items()}
    if isinstance(value, (list, tuple)):
        return [without_cache(each) for each in value if not _is_cache(each)]
    return value


def _is_cache(value: Any) -> bool:
    return isinstance(value, Cache) or (isinstance(value, str) and value in _CACHES)


def flatten(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """All that a value holds, with names."""
    if isinstance(value, Cache):
        for index, layer in enumerate(value.layers):
            yield from flatten([getattr(layer, "keys", None), getattr(layer, "values", None)], f"{name}.{index}")
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from flatten(each, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, each in enumerate(value):
            yield from flatten(each, f"{name}.{index}")
    else:
        yield name, value


def _attributes(out: Any) -> Any:
    if isinstance(out, tuple):
        return out
    names = ("loss", "logits", "past_key_values", "cache", "hidden_states", "attentions", *_OF_TRLS_HEAD)
    return {"keys": list(out.keys()), **{name: getattr(out, name, None) for name in names}}


def _by_index(out: Any) -> Any:
    return [out[index] for index in range(len(out))]


def _by_key(out: Any) -> Any:
    if isinstance(out, tuple):
        return out
    return {"in": ["logits" in out, "loss" in out], "get": out.get("logits"), "item": out["logits"], **out}


READINGS: dict[str, Callable[[Any], Any]] = {
    "attributes": _attributes,
    "the loss only": lambda out: {"loss": out[0] if isinstance(out, tuple) else out.loss},
    "mapping": lambda out: out if isinstance(out, tuple) else dict(out.items()),
    "keys": _by_key,
    "index": _by_index,
    "slice": lambda out: out[1:],
    "to_tuple": lambda out: out if isinstance(out, tuple) else out.to_tuple(),
    "values": lambda out: out if isinstance(out, tuple) else [len(out) == len(list(out)), list(out.values())],
    "copy.copy": lambda out: _attributes(copy.copy(out)),
    "rebuilt": lambda out: out if isinstance(out, tuple) else _attributes(type(out)(**out)),
    "convert_to_fp32": lambda out: _attributes(convert_to_fp32(out)),
    "tree_map": lambda out: _attributes(tree_map(lambda leaf: leaf, out)),
    "copied after the backward": _attributes,
    "copied after the step": _attributes,
    "read after the backward": _attributes,
    "read after the step": _attributes,
    "repr": lambda out: {"lines": len(repr(out).splitlines()) > 0, "all": _attributes(out)},
}
"""How an output is read."""
MOMENTS = {
    "copied after the backward": (0, 1),
    "copied after the step": (0, 2),
    "read after the backward": (1, 1),
    "read after the step": (2, 2),
}
"""When an output is read, and when what was read is looked at: after the forward (0, as in all others), after the
backward (1), or after the optimizer's step (2)."""


def _loss_of(values: Values) -> Tensor | None:
    return next((each for each in values.values() if isinstance(each, Tensor) and each.dim() == 0), None)


def _others(values: Values, word: str = "") -> list[Tensor]:
    """All that is differentiable but the loss; with a word in its name, or all if there is none such."""
    found = {
        name: each
        for name, each in values.items()
        if isinstance(each, Tensor) and each.is_floating_point() and each.dim() > 0 and each.requires_grad
    }
    named = [each for name, each in found.items() if word and word in name]
    return named or list(found.values())[:1]


def _of_loss(values: Values) -> Tensor | None:
    loss = _loss_of(values)
    return loss if loss is not None else _of_others(values)


def _of_others(values: Values, word: str = "") -> Tensor | None:
    found = [each.float().square().mean() for each in _others(values, word)]
    return torch.stack(found).sum() if found else None


def _and(word: str) -> Callable[[Values], Tensor | None]:
    def total(values: Values) -> Tensor | None:
        loss, more = _of_loss(values), _of_others(values, word)
        return loss if loss is None or more is None else loss + 1e-2 * more

    return total


def _entropy(values: Values) -> Tensor | None:
    logits = _others(values, "logits")
    return logits[0].float().logsumexp(-1).mean() if logits else _of_loss(values)


OBJECTIVES: dict[str, Callable[[Values], Tensor | None]] = {
    "loss": _of_loss,
    "loss and logits": _and("logits"),
    "logits only": _entropy,
    "loss and hidden states": _and("hidden_states"),
    "loss and attentions": _and("attentions"),
    "loss × 1000": lambda values: None if (loss := _of_loss(values)) is None else 1000 * loss,
}
"""What is differentiated."""


def _once(total: Tensor, trained: list[nn.Parameter]) -> Values:
    total.backward()
    return {}


def _twice(total: Tensor, trained: list[nn.Parameter]) -> Values:
    total.backward(retain_graph=True)
    total.backward()
    return {}


def _by_grad(total: Tensor, trained: list[nn.Parameter]) -> Values:
    found = torch.autograd.grad(total, trained, allow_unused=True)
    return {f"gradient {index}": each for index, each in enumerate(found)}


def _penalty(total: Tensor, trained: list[nn.Parameter]) -> Values:
    found = [g for g in torch.autograd.grad(total, trained, create_graph=True, allow_unused=True) if g is not None]
    (total + 0.01 * torch.stack([g.float().square().sum() for g in found]).sum()).backward()
    return {}


def _with_anomalies(total: Tensor, trained: list[nn.Parameter]) -> Values:
    with torch.autograd.detect_anomaly(check_nan=False):
        total.backward()
    return {}


def _some_inputs(total: Tensor, trained: list[nn.Parameter]) -> Values:
    total.backward(inputs=trained[:2])
    return {}


BACKWARDS: dict[str, Callable[[Tensor, list[nn.Parameter]], Values]] = {
    "once": _once,
    "twice": _twice,
    "autograd.grad": _by_grad,
    "gradient penalty": _penalty,
    "anomalies": _with_anomalies,
    "for some": _some_inputs,
    "two forwards": _once,
    "two forwards, one without adapters": _once,
    "one forward thrown away": _once,
    "all checkpointed": _once,
    "functional_call": _once,
    "saved on the host": _once,
    "TRL's head": _once,
    "TRL's head, and a reference": _once,
}
"""How it is differentiated; the last ones call the model otherwise (see `call_model`)."""


def call_model(net: Any, how: str, args: list[Any], named: Values) -> tuple[Any, Any]:
    """The output, and that of a first call whose loss counts too, if there was one."""
    if how.startswith("TRL's head") and named.get("labels") is not None:
        return _by_trls_head(net, args, named, reference="reference" in how), None
    if how == "one forward thrown away":
        net(*args, **named)
    if how == "two forwards":
        return net(*args, **named), net(*args, **{**named, "use_cache": False})
    if how == "two forwards, one without adapters" and hasattr(net, "disable_adapter"):
        with net.disable_adapter():
            first = net(*args, **named)
        return net(*args, **named), first
    if how == "all checkpointed":
        return checkpoint(lambda *given: net(*given, **named), *args, use_reentrant=False), None
    if how == "functional_call":
        weights = dict(net.named_parameters()) | dict(net.named_buffers())
        return torch.func.functional_call(net, weights, tuple(args), named), None
    if how == "saved on the host":
        with torch.autograd.graph.save_on_cpu():
            return net(*args, **named), None
    return net(*args, **named), None


def _by_trls_head(net: Any, args: list[Any], named: Values, *, reference: bool) -> Any:
    """What TRL's head gives; less that of the model without its adapters, as preference losses have it."""
    causal = net.get_base_model() if hasattr(net, "get_base_model") else net
    if "has_trls_head" not in causal.__dict__:
        add_fused_lm_head(causal, temperature=0.9, outputs=_OF_TRLS_HEAD)
        causal.__dict__["has_trls_head"] = True
    out = net(*args, **named, fused_lm_head=True)
    if reference and hasattr(net, "disable_adapter"):
        with torch.no_grad(), net.disable_adapter():
            of_reference = net(*args, **named, fused_lm_head=True)
        out.log_probs = out.log_probs - of_reference.log_probs
    return out


def _sgd(parameters: list[nn.Parameter]) -> None:
    with torch.no_grad():
        for parameter in parameters:
            if parameter.grad is not None:
                # Small: what differs in the last bits must not grow.
                parameter.sub_(0.01 * parameter.grad / (1e-3 + parameter.grad.abs().max()))
            parameter.grad = None


def _adamw(parameters: list[nn.Parameter]) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=0.01, eps=0.01)
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def _new_data(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.data = 0.9 * parameter.data
        parameter.grad = None


BETWEEN: dict[str, Callable[[list[nn.Parameter]], None]] = {
    "sgd": _sgd,
    "adamw": _adamw,
    "new data": _new_data,
    "gradients add up": lambda parameters: None,
    "nothing": lambda parameters: [setattr(parameter, "grad", None) for parameter in parameters] and None,
}
"""What is done to the trained parameters between two steps."""
