"""Who watches a model, by hooks, modes or surroundings, sees what stock shows."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.modules.module as global_hooks
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from same_as_stock import (
    PADDED,
    PLAIN,
    Same,
    call,
    layers,
    on,
    step,
)

Register = Callable[[nn.Module, Callable[..., Any]], Any]
REGISTERED: dict[str, Register] = {
    "always called": lambda module, hook: module.register_forward_hook(hook, always_call=True),
    "first": lambda module, hook: module.register_forward_hook(hook, prepend=True),
}
WATCHED = ["mlp", "mlp.act_fn", "self_attn.q_proj.lora_A.default", "self_attn.q_proj.base_layer",
           "post_attention_layernorm"]  # fmt: skip


@pytest.mark.parametrize("kind", REGISTERED)
@pytest.mark.parametrize("path", WATCHED)
def test_a_hook_of_another_kind_in_one_layer(path: str, kind: str, same: Same) -> None:
    def ask(model: Any) -> Any:
        step(model)
        seen: list[Any] = []

        def hook(module: nn.Module, given: Any, out: Any) -> None:
            values = [*given, *(out if isinstance(out, tuple) else (out,))]
            seen.append([value.clone() for value in values if isinstance(value, Tensor)])

        handle = REGISTERED[kind](layers(model)[1].get_submodule(path), hook)
        found = step(model)
        handle.remove()
        return [found, seen, step(model)]

    assert same(ask).fast[1]


@pytest.mark.parametrize("register", ["forward_hook", "full_backward_pre_hook"])
def test_a_hook_on_all_modules_sees_as_many(register: str, same: Same) -> None:
    def ask(model: Any) -> Any:
        seen: list[str] = []
        more = {"always_call": True} if register == "forward_hook" else {}
        add = getattr(global_hooks, f"register_module_{register}")
        handle = add(lambda module, *_: seen.append(type(module).__name__), **more)
        try:
            step(model)
        finally:
            handle.remove()
        return [sorted(seen), step(model)]

    assert same(ask).fast[0]


def test_hooks_around_the_layers_see_what_stock_gives(same: Same) -> None:
    def ask(model: Any) -> Any:
        seen: list[Tensor] = []
        causal = model.get_base_model()
        causal.model.norm.register_forward_hook(lambda module, given, out: seen.extend([given[0].clone(), out.clone()]))
        causal.model.rotary_emb.register_forward_hook(lambda module, given, out: seen.append(out[0].clone()))
        causal.lm_head.register_forward_pre_hook(lambda module, given: seen.append(given[0].clone()))
        return [step(model, **PADDED), seen]

    same(ask)


class Looking(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def _in_double_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SURROUNDINGS: dict[str, Callable[[], Any]] = {
    "a dispatch mode": Looking,
    "anomaly mode": torch.autograd.detect_anomaly,
    "deterministic": _deterministic,
    "the mathematical attention": lambda: sdpa_kernel(SDPBackend.MATH),
    "no hooks for saved tensors": lambda: torch.autograd.graph.disable_saved_tensors_hooks("none here"),
    "saved on the host": torch.autograd.graph.save_on_cpu,
    "double by default": _in_double_by_default,
    "autocast that is off": lambda: torch.autocast("cpu", enabled=False),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_in_other_surroundings(name: str, same: Same) -> None:
    def ask(model: Any) -> Any:
        with SURROUNDINGS[name]():
            inside = step(model, **PADDED)
        return [inside, step(model)]

    same(ask)


def test_fake_tensors_have_stocks_shapes(same: Same) -> None:
    def ask(model: Any) -> Any:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode:
            out = model(**{name: mode.from_tensor(on(model, tensor)) for name, tensor in PLAIN.items()})
        return [list(out.loss.shape), list(out.logits.shape), type(out.loss).__name__, step(model)]

    same(ask)


def test_as_many_operations_are_counted_in_a_forward(same: Same) -> None:
    def ask(model: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            call(model)
        return counter.get_total_flops()

    same(ask)


def test_tensors_of_inference_mode_are_trained_on(same: Same) -> None:
    def ask(model: Any) -> Any:
        with torch.inference_mode():
            given = {name: on(model, tensor).clone() for name, tensor in PADDED.items()}
            first = model(**given)
            facts = [first.loss, first.logits, first.loss.is_inference(), first.logits.is_inference()]
        return [facts, step(model, **given), model(**given).logits]

    same(ask)
