"""Putting the engine in and taking it out, next to everybody else who touches the same modules."""

import copy
import functools
import gc
import inspect
import logging
import pickle
import weakref
from collections.abc import Callable
from operator import attrgetter
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastft import ledger_of, patch_model, unpatch_model
from fastft.engine.patch import base_model, placement_of
from fastft.errors import BackendError, ConfigError
from fastft.models.spec import ACTIVATIONS
from peft_models import on_device

TOLERANCE = 5e-5 if torch.cuda.is_available() else 1e-5  # ‖g − stock‖ / ‖stock‖ in fp32


def attributes(model: nn.Module) -> dict[str, set[str]]:
    return {name: set(module.__dict__) for name, module in model.named_modules()}


def identical(gradients: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    """Bit for bit; a GPU's attention may add in another order."""
    return gradients.keys() == others.keys() and all(
        torch.equal(g, others[name]) or (g.is_cuda and torch.allclose(g, others[name], rtol=1e-4, atol=1e-6))
        for name, g in gradients.items()
    )


def reasons(model: Any) -> dict[str, str]:
    """Why what is not a part of something else does not run fused; tests/engine/test_generic.py has the parts."""
    whole = ("decoder_layer", "head_and_loss", "attention")
    return {
        name: path.reason
        for name, path in ledger_of(model).fallbacks.items()
        if path.kind in whole or not name.startswith("layers.")
    }


@pytest.fixture
def same_as_stock(toy, batch_of, step, error_of):
    """Asserts that a change to the model leaves the results stock's; gives the ledger's reasons."""

    def check(change: Callable[[Any], Any], form: str = "right", before: bool = False, **lora: Any) -> dict[str, str]:
        stock, model = toy(**lora), toy(**lora)
        change(stock)
        if before:
            change(model)
            patch_model(model, backend="eager")
        else:
            patch_model(model, backend="eager")
            change(model)
        loss, gradients = step(stock, batch_of(form))
        fused_loss, fused = step(model, batch_of(form))
        assert fused_loss == pytest.approx(loss, rel=1e-5)
        assert error_of(fused, gradients) < TOLERANCE
        return reasons(model)

    return check


# In and out


def test_unpatching_restores_everything(toy, batch_of, step):
    model = toy("toy-qwen2")
    batch = batch_of("left")
    before = attributes(model)
    loss, gradients = step(model, batch)
    patch_model(model, backend="eager", placement="full")
    step(model, batch)
    assert attributes(model) != before
    unpatch_model(model)
    assert attributes(model) == before
    again_loss, again = step(model, batch)
    assert again_loss == loss
    assert identical(again, gradients)
    assert ledger_of(model) is None
    assert placement_of(model) is None
    unpatch_model(model)


def test_patching_twice_replaces_the_settings(toy, batch_of, step):
    model = toy()
    before = attributes(model)
    first = patch_model(model, backend="eager", placement="full")
    second = patch_model(model, backend="triton", placement=["keep", "light", "mlp"])
    assert ledger_of(model) is second is not first
    assert placement_of(model) == ["keep", "light", "mlp"]
    step(model, batch_of("none", B=1, S=3))
    assert second.counts()["decoder_layer: fused (triton)"] == 3
    unpatch_model(model)
    assert attributes(model) == before


def test_the_weights_and_the_state_dict_stay(toy):
    model = toy()
    before = {name: value.data_ptr() for name, value in model.state_dict().items()}
    patch_model(model, backend="eager")
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == before


def test_a_base_model_can_be_patched_through_its_wrapper_or_directly(toy):
    model = toy()
    ledger = patch_model(model.get_base_model(), backend="eager")
    assert ledger_of(model) is ledger
    assert base_model(model) is base_model(model.get_base_model()) is model.get_base_model()


def test_a_deep_copy_is_independent(toy, batch_of, step, shake):
    model = toy()
    batch = batch_of("right")
    patch_model(model, backend="eager", placement="mlp")
    loss, gradients = step(model, batch)
    clone = copy.deepcopy(model)
    shake(clone, 99)
    clone_loss, _ = step(clone, batch)
    assert clone_loss != pytest.approx(loss, rel=1e-3)
    assert all(p.grad is not None for p in clone.parameters() if p.requires_grad)
    unpatch_model(clone)
    assert step(clone, batch)[0] == pytest.approx(clone_loss, rel=1e-5)
    assert ledger_of(clone) is None
    assert ledger_of(model) is not None
    again_loss, again = step(model, batch)
    assert again_loss == loss
    assert identical(again, gradients)


def test_half_of_a_patch_never_stays(toy):
    """What is refused leaves the model as it was."""
    model = toy()
    before = attributes(model)
    model.get_base_model().lm_head.weight.requires_grad_(True)
    with pytest.raises(BackendError):
        patch_model(model, backend="eager", strict=True)
    assert attributes(model) == before


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"backend": "tritn"}, BackendError, "did you mean 'triton'"),
        ({"backend": "peft"}, BackendError, "backend is unknown"),
        ({"placement": "ful"}, ConfigError, "did you mean 'full'"),
        ({"placement": ["full"]}, ConfigError, "1 policies; allowed: 1 or 3"),
        ({"placement": ["full", "keep", "nothing"]}, ConfigError, "policy is unknown; got nothing"),
        ({"attention": "flsh"}, ConfigError, "did you mean 'flash'"),
        ({"loss_chunk_tokens": 0}, ConfigError, "loss_chunk_tokens is not valid; got 0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_changes(arguments, error, message, toy):
    model = toy()
    before = attributes(model)
    with pytest.raises(error, match=message):
        patch_model(model, **{"backend": "eager", **arguments})
    assert attributes(model) == before
    ledger = patch_model(model, backend="eager")
    with pytest.raises(error, match=message):
        patch_model(model, **{"backend": "eager", **arguments})
    assert ledger_of(model) is ledger, "an earlier patch stays"


def test_strict_names_the_module_and_the_reason(toy, batch_of, step):
    model = toy()
    patch_model(model, backend="eager", strict=True)
    step(model, batch_of("none"))
    model.get_base_model().model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(BackendError, match=r"layers\.1 cannot run as asked; got up_proj: it has hooks"):
        step(model, batch_of("none"))
    with pytest.raises(BackendError, match=r"layers\.1"):
        patch_model(model, backend="eager", strict=True)


def test_each_reason_is_logged_once(toy, batch_of, step, caplog):
    model = toy()
    patch_model(model, backend="eager")
    for layer in model.get_base_model().model.layers:
        layer.mlp.register_forward_hook(lambda *_: None)
    with caplog.at_level(logging.WARNING, logger="fastft"):
        step(model, batch_of("none"))
        step(model, batch_of("none"))
    assert [r.getMessage() for r in caplog.records if r.name == "fastft"] == [
        "LlamaForCausalLM: decoder layer 3 of 3 (layers.0, …) runs as stock, because LlamaMLP: it has hooks; "
        "to change that: remove the hooks"
    ]


# What others do to the modules


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("self_attn.q_proj", "q_proj: it has hooks"),
        ("self_attn.o_proj.base_layer", "o_proj: its base layer: it has hooks"),
        ("mlp.down_proj.lora_A.default", "down_proj: its adapter: it has hooks"),
        ("mlp.gate_proj.lora_B.default", "gate_proj: its adapter: it has hooks"),
        ("mlp.up_proj.lora_dropout.default", "up_proj: its adapter: it has hooks"),
        ("input_layernorm", "input_layernorm: it has hooks"),
        ("post_attention_layernorm", "post_attention_layernorm: it has hooks"),
        ("self_attn", "LlamaAttention: it has hooks"),
        ("mlp", "LlamaMLP: it has hooks"),
        ("mlp.act_fn", "SiLUActivation: it has hooks"),
    ],
)
def test_a_hook_inside_a_layer_makes_that_layer_stock_until_it_is_removed(path, reason, same_as_stock, toy, batch_of):
    def double(_: nn.Module, __: Any, output: Any) -> Any:
        return (output[0] * 1.5, *output[1:]) if isinstance(output, tuple) else output * 1.5

    def add(model: Any) -> Any:
        return attrgetter(path)(model.get_base_model().model.layers[1]).register_forward_hook(double)

    assert same_as_stock(add) == {"layers.1": reason}
    assert same_as_stock(add, before=True) == {"layers.1": reason}
    model = toy()
    patch_model(model, backend="eager")
    handle = add(model)
    model(**on_device(model, batch_of("none")))
    assert "layers.1" in reasons(model)
    handle.remove()
    model(**on_device(model, batch_of("none")))
    assert not reasons(model)


@pytest.mark.parametrize("kind", ["forward_pre", "full_backward", "full_backward_pre"])
def test_every_kind_of_hook_is_seen(kind, same_as_stock):
    calls = []

    def add(model: Any) -> None:
        linear = model.get_base_model().model.layers[2].self_attn.v_proj
        getattr(linear, f"register_{kind}_hook")(lambda *_: calls.append(1))

    assert same_as_stock(add) == {"layers.2": "v_proj: it has hooks"}
    assert len(calls) == 2, "once in stock, once in the patched model"


@pytest.mark.parametrize("path", ["model.layers.1", "model.norm", "model", "model.embed_tokens", ""])
def test_hooks_around_what_is_patched_fire_and_all_stays_fused(path, same_as_stock):
    calls = []

    def add(model: Any) -> None:
        base = model.get_base_model()
        module = attrgetter(path)(base) if path else base
        module.register_forward_hook(lambda *_: calls.append(1))
        if path == "model.layers.1":
            module.register_full_backward_hook(lambda *_: calls.append(1))

    assert not same_as_stock(add)
    assert len(calls) == (4 if path == "model.layers.1" else 2)


def test_a_hook_on_the_head_makes_the_loss_stock(same_as_stock):
    def add(model: Any) -> None:
        model.get_output_embeddings().register_forward_hook(lambda _, __, output: output * 0.5)

    assert same_as_stock(add) == {"lm_head": "the head: it has hooks"}


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("mlp.up_proj", "up_proj: its forward was replaced"),
        ("mlp", "LlamaMLP: its forward was replaced"),
        ("self_attn", "LlamaAttention: its forward was replaced"),
        ("input_layernorm", "input_layernorm: its forward was replaced"),
    ],
)
@pytest.mark.parametrize("before", [False, True])
def test_a_forward_that_somebody_replaced_is_called(path, reason, before, same_as_stock):
    """As accelerate does for offloading, X-LoRA for its gates, and people in notebooks."""

    def replace(model: Any) -> None:
        module = attrgetter(path)(model.get_base_model().model.layers[0])
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            return (output[0] * 0.5, *output[1:]) if isinstance(output, tuple) else output * 0.5

        module.forward = forward

    assert same_as_stock(replace, before=before) == {"layers.0": reason}


@pytest.mark.parametrize(("path", "name"), [("model.layers.1", "layers.1"), ("model.norm", "norm"), ("", "lm_head")])
def test_a_forward_replaced_before_the_patch_is_not_lost(path, name, same_as_stock):
    def replace(model: Any) -> None:
        base = model.get_base_model()
        module = attrgetter(path)(base) if path else base
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            if isinstance(output, Tensor):
                return output * 0.5
            output.loss = output.loss * 0.5
            return output

        module.forward = forward

    assert same_as_stock(replace, before=True) == {name: "its forward was replaced"}


def _wrap(model: nn.Module, *, like_functools: bool) -> list[int]:
    """A trainer's way: hold what stands there and put a method over it."""
    original = model.forward
    calls: list[int] = []

    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    model.forward = MethodType(functools.wraps(original)(wrapper) if like_functools else wrapper, model)
    return calls


@pytest.mark.parametrize("like_functools", [False, True])
def test_a_wrapper_over_the_patch_goes_on_working(like_functools, toy, batch_of, step, error_of):
    model = toy()
    batch = batch_of("right")
    loss, gradients = step(model, batch)
    patch_model(model, backend="eager")
    calls = _wrap(model.get_base_model(), like_functools=like_functools)
    ids = on_device(model, batch)["input_ids"]

    def check(note: str) -> None:
        calls.clear()
        fused_loss, fused = step(model, batch)
        assert fused_loss == pytest.approx(loss, rel=1e-5), note
        assert error_of(fused, gradients) < TOLERANCE, note
        with torch.no_grad():
            assert model(input_ids=ids).logits.isfinite().all(), note
        assert len(calls) == 2, note

    check("wrapped")
    unpatch_model(model)
    assert placement_of(model) is None
    check("unpatched")
    ledger = patch_model(model, backend="eager", placement="full")
    check("patched again")
    assert ledger_of(model) is ledger
    assert ledger.counts()["head_and_loss: fused (eager)"] == 1
    assert not ledger.fallbacks


def test_a_trained_norm_makes_its_layer_stock(same_as_stock):
    def train(model: Any) -> None:
        model.get_base_model().model.layers[0].input_layernorm.weight.requires_grad_(True)
        model.get_base_model().model.norm.weight.requires_grad_(True)

    assert same_as_stock(train) == {
        "layers.0": "input_layernorm: its weight is trained", "norm": "its weight is trained",
    }  # fmt: skip


def test_trained_base_weights_make_their_layers_stock(same_as_stock):
    def train(model: Any) -> None:
        layers = model.get_base_model().model.layers
        layers[0].mlp.up_proj.base_layer.weight.requires_grad_(True)
        layers[2].self_attn.q_proj.base_layer.bias.requires_grad_(True)

    assert same_as_stock(train, base={"attention_bias": True}) == {
        "layers.0": "up_proj: its base weight is trained", "layers.2": "q_proj: its bias is trained",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"hidden_act": "relu"}, f"the activation is ReLU, not one of {', '.join(ACTIVATIONS)}"),
        ({"attention_dropout": 0.1}, "attention has dropout"),
    ],
)
def test_other_layers_run_as_stock(config, reason, toy):
    ledger = patch_model(toy(base=config), backend="eager")
    assert {path.reason for path in ledger.fallbacks.values()} == {reason}


def attached(model: Any) -> dict[str, nn.Module]:
    """The modules whose `forward` is the engine's."""
    return {name: module for name, module in model.named_modules() if "forward" in module.__dict__}


@pytest.fixture(params=["layers", "parts"])
def patched_as(request, monkeypatch):
    """Whether a model runs layer by layer, or part by part."""
    if request.param == "parts":
        monkeypatch.setattr("fastft.engine.patch._why_unspecified", lambda *_: "it is to run part by part")


@pytest.mark.usefixtures("patched_as")
def test_what_is_replaced_looks_as_it_did(toy):
    """Trainers choose columns by signatures; others look for names, or for whose method it is."""
    stock, model = toy(), toy()
    patch_model(model, backend="eager")
    of_stock = dict(stock.named_modules())
    assert len(attached(model)) > 5
    for name, module in attached(model).items():
        theirs = of_stock[name].forward
        assert inspect.signature(module.forward) == inspect.signature(theirs), name
        assert inspect.getsource(module.forward) == inspect.getsource(theirs), name
        for what in ("__name__", "__qualname__", "__doc__"):
            assert getattr(module.forward, what) == getattr(theirs, what), (name, what)
        assert module.forward.__self__ is module
    for name in ("train", "parameters", "num_parameters"):
        assert (
            inspect.signature(getattr(model, name)).parameters.keys()
            == inspect.signature(getattr(stock, name)).parameters.keys()
        ), name


def test_a_wrapper_that_copies_attributes_is_not_taken_for_the_engines(same_as_stock):
    """`functools.wraps` copies what an object has of its own."""

    def wrap(model: Any) -> None:
        layer = base_model(model).model.layers[0]
        inner = layer.forward

        @functools.wraps(inner)
        def doubled(*args: Any, **kwargs: Any) -> Any:
            return inner(*args, **kwargs) * 2

        layer.forward = doubled

    same_as_stock(wrap)


def test_methods_go_with_their_module(toy):
    model = toy()
    patch_model(model, backend="eager")
    backbone = base_model(model).model
    forward = backbone.forward
    copied = copy.deepcopy(forward)
    assert copied.__self__ is not backbone
    assert type(copied.__self__) is type(backbone)
    assert copy.deepcopy(model).get_base_model().model.forward.__self__ is not backbone
    again = pickle.loads(pickle.dumps(forward))
    assert type(again.__self__) is type(backbone)
    del model, backbone
    with pytest.raises(ReferenceError, match="keep the module"):
        forward()


ENDINGS: dict[str, Callable[..., Any]] = {
    "before a step": lambda model, train: None,
    "after steps": lambda model, train: train(model, 3),
    "after steps, patched anew": lambda model, train: (
        train(model, 1), patch_model(model, backend="eager"), train(model, 1),
    ),
    "after steps, unpatched": lambda model, train: (train(model, 1), unpatch_model(model)),
    "after steps of stock's": lambda model, train: (unpatch_model(model), train(model, 1)),
    "after evaluation": lambda model, train: (train(model, 1), model.eval(), model.num_parameters(), model.train()),
    "after a copy": lambda model, train: (train(model, 1), train(copy.deepcopy(model), 1)),
}  # fmt: skip


@pytest.mark.usefixtures("patched_as")
@pytest.mark.parametrize("ending", ENDINGS.values(), ids=list(ENDINGS))
def test_a_model_is_freed_with_its_last_reference(ending, toy, batch_of):
    """As stock is, without Python's collector: on a GPU the next model needs the memory at once."""

    def train(model: Any, steps: int) -> None:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(steps):
            model.train()
            output = model(**on_device(model, batch_of("right")))
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    for fast in (False, True):
        model = toy()
        if fast:
            patch_model(model, backend="eager")
        ending(model, train) if fast else train(model, 1)
        base = base_model(model)
        parameters = list(base.parameters())
        layer = next(m for name, m in base.named_modules() if name.endswith(".0"))
        there = [weakref.ref(each) for each in (model, base, layer, *parameters)]
        del base, layer, parameters
        gc.collect()
        gc.disable()
        try:
            del model
            alive = [ref() for ref in there]
        finally:
            gc.enable()
        assert all(each is None for each in alive), [type(each) for each in alive if each is not None]


def test_an_output_keeps_what_it_needs_and_no_more(toy, batch_of):
    model = toy()
    patch_model(model, backend="eager")
    output = model(**on_device(model, batch_of("none")))
    there = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert there() is None
        assert output.logits.shape[-1] == 512
        output.loss.backward()
        layer = weakref.ref(output)
        del output
        assert layer() is None
    finally:
        gc.enable()
