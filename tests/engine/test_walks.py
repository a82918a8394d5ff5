"""Walks that are not walked: what the quick methods give is what the originals give, whatever happens between."""

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from fastft import patch_model, unpatch_model
from fastft.engine import walks
from fastft.engine.patch import forget_the_gone

QUICK = ("train", "parameters", "modules", "num_parameters")


@pytest.fixture
def patched(toy):
    model = toy()
    patch_model(model, backend="eager")
    return model


@pytest.fixture(autouse=True)
def _classes_as_they_were() -> Iterator[None]:
    yield
    walks.uninstall()


@pytest.fixture
def walked(monkeypatch) -> list[str]:
    """Grows by one where an original walks."""
    calls: list[str] = []
    for name, walks_by in {"train": "children", "parameters": "named_parameters"}.items():
        original = getattr(nn.Module, walks_by)

        def spy(self: Any, *args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            if isinstance(self, peft.PeftModel):
                calls.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(nn.Module, walks_by, spy)
    return calls


def modes_of(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def same_parameters(model: Any) -> bool:
    theirs = list(nn.Module.parameters(model))
    mine = list(model.parameters())
    same_modules = list(model.modules()) == list(nn.Module.modules(model))
    return same_modules and len(mine) == len(theirs) and all(a is b for a, b in zip(mine, theirs, strict=True))


def test_what_does_not_change_is_walked_once(patched, walked):
    patched.train()
    list(patched.parameters())
    walked.clear()
    for _ in range(3):
        assert patched.train() is patched
        assert same_parameters(patched)
        patched.zero_grad()
    assert walked == ["parameters"] * 3  # those of the comparison
    patched.eval()
    assert walked[3:] == ["train"], "the spy sees a walk"


def test_modes_are_set_wherever_one_differs(patched):
    for mode in (True, False, True):
        assert patched.train(mode) is patched
        assert set(modes_of(patched).values()) == {mode}
    assert patched.eval() is patched
    assert set(modes_of(patched).values()) == {False}
    patched.train()
    dropout = next(m for m in patched.modules() if isinstance(m, nn.Dropout | nn.Identity))
    dropout.eval()
    patched.train()
    assert dropout.training
    patched.eval()
    dropout.train()
    patched.eval()
    assert not dropout.training


CHANGES: dict[str, Callable[[Any], None]] = {
    "a new module": lambda model: model.add_module("more", nn.Linear(2, 3)),
    "a new parameter": lambda model: model.register_parameter("more", nn.Parameter(torch.ones(2))),
    "a module replaced": lambda model: setattr(model.base_model.model.model, "norm", nn.LayerNorm(64)),
    "a parameter replaced": lambda model: setattr(
        model.base_model.model.model.norm, "weight", nn.Parameter(torch.ones(64))
    ),
    "a module gone": lambda model: delattr(model.base_model.model.model, "norm"),
    "another adapter": lambda model: model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"])),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_a_change_is_seen(change, patched):
    patched.train()
    assert same_parameters(patched)
    base = patched.get_base_model()
    patched.num_parameters()
    change(patched)
    assert same_parameters(patched)
    assert patched.num_parameters() == type(base).num_parameters(base)
    patched.eval()
    assert set(modes_of(patched).values()) == {False}
    patched.train()
    assert set(modes_of(patched).values()) == {True}


def test_a_module_that_moved_to_the_next_one_is_seen(patched):
    """All modules have what they had, in the order that they had: only, not in the same place."""
    layer = patched.get_base_model().model.layers[0]
    layer.input_layernorm.add_module("more", nn.Identity())
    assert same_parameters(patched)
    layer.post_attention_layernorm.add_module("more", layer.input_layernorm._modules.pop("more"))
    assert same_parameters(patched)


class _PassingOn(nn.Module):
    """Has whatever the module inside has."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inside"), name)


def _of_another_class(module: nn.Module) -> None:
    module.__class__ = type("Other", (type(module),), {"gradient_checkpointing": False})


CHECKPOINTED: dict[str, Callable[[Any], None]] = {
    "nothing": lambda base: None,
    "a layer less": lambda base: base.model.layers.__delitem__(1),
    "a part that can be": lambda base: base.model.layers[0].mlp.__dict__.update(gradient_checkpointing=False),
    "a part of a class that can be": lambda base: _of_another_class(base.model.layers[0].mlp),
    "a part that passes attributes on": lambda base: setattr(
        base.model, "norm", _PassingOn(GradientCheckpointingLayer())
    ),
    "a new part": lambda base: base.add_module("more", GradientCheckpointingLayer()),
}


@pytest.mark.parametrize("change", CHECKPOINTED.values(), ids=list(CHECKPOINTED))
def test_gradient_checkpointing_is_set_where_stock_sets_it(change, toy):
    """Whatever was changed, before a first time or after it."""

    def flags(model: Any) -> list[tuple[str, Any, bool]]:
        found = [(name, module.__dict__) for name, module in nn.Module.named_modules(model)]
        names = "gradient_checkpointing", "_gradient_checkpointing_func"
        return [(name, own.get(names[0]), names[1] in own) for name, own in found if any(each in own for each in names)]

    seen: list[list[Any]] = [[], []]
    for of, fast in zip(seen, (False, True), strict=True):
        model = toy()
        if fast:
            patch_model(model, backend="eager")
        for turn in range(2):
            model.gradient_checkpointing_enable()
            of += [flags(model), model.is_gradient_checkpointing]
            model.gradient_checkpointing_disable()
            of += [flags(model), model.is_gradient_checkpointing]
            if not turn:
                change(model.get_base_model())
        assert "modules" not in model.get_base_model().__dict__
    assert seen[0] == seen[1]


def test_checkpointing_is_set_without_a_walk(patched, monkeypatch):
    patched.gradient_checkpointing_enable()
    walked: list[nn.Module] = []
    named_modules = nn.Module.named_modules

    def spy(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        walked.append(self)
        return named_modules(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "named_modules", spy)
    patched.gradient_checkpointing_disable()
    patched.gradient_checkpointing_enable()
    assert not walked
    list(nn.Module.modules(patched))
    assert walked, "the spy sees a walk"


def test_whether_anything_is_checkpointed_is_asked_of_what_can_be(patched, monkeypatch):
    base = patched.get_base_model()
    assert base.is_gradient_checkpointing is False
    asked: list[type] = []
    answer = nn.Module.__getattr__

    def spy(self: nn.Module, name: str) -> Any:
        if name == "gradient_checkpointing":
            asked.append(type(self))
        return answer(self, name)

    monkeypatch.setattr(nn.Module, "__getattr__", spy)
    monkeypatch.setattr(walks, "_ANSWERS", spy)
    assert base.is_gradient_checkpointing is patched.is_gradient_checkpointing is False
    assert not asked
    base.gradient_checkpointing_enable()
    assert base.is_gradient_checkpointing is True
    with pytest.raises(AttributeError, match="setter"):
        base.is_gradient_checkpointing = False


def test_nothing_is_kept_alive(toy):
    model = toy()
    walks.install(model)
    model.train()
    base = model.get_base_model().model
    gone = [weakref.ref(base.norm), weakref.ref(base.norm.weight), weakref.ref(base.layers[0].input_layernorm.weight)]
    base.norm = nn.LayerNorm(64)
    base.layers[0].input_layernorm.weight = nn.Parameter(torch.ones(64))
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3
    assert same_parameters(model)


def test_gradients_are_set_to_nothing_or_zero(patched):
    for p in nn.Module.parameters(patched):
        if p.requires_grad:
            p.grad = torch.ones_like(p)
    patched.zero_grad(set_to_none=False)
    gradients = [p.grad for p in nn.Module.parameters(patched) if p.requires_grad]
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)
    patched.zero_grad()
    assert all(p.grad is None for p in nn.Module.parameters(patched))


def test_the_rest_of_the_methods_is_the_originals(patched):
    base = patched.get_base_model()
    own = list(nn.Module.parameters(patched, recurse=False))
    assert list(patched.parameters(recurse=False)) == own
    for exclude in (False, True):
        for only in (False, True):
            found = patched.num_parameters(only_trainable=only, exclude_embeddings=exclude)
            assert found == type(base).num_parameters(base, only_trainable=only, exclude_embeddings=exclude)
    for p in nn.Module.parameters(patched):
        p.requires_grad = False
    assert patched.num_parameters(only_trainable=True) == 0


def test_a_copy_is_a_model_of_its_own(patched):
    patched.train()
    twin = copy.deepcopy(patched)
    twin.eval()
    assert set(modes_of(patched).values()) == {True}
    assert set(modes_of(twin).values()) == {False}
    assert same_parameters(twin)
    assert all(a is not b for a, b in zip(twin.parameters(), patched.parameters(), strict=True))


def test_what_was_found_is_not_saved(patched):
    patched.train()
    file = io.BytesIO()
    pickle.dump(patched.__dict__["_fastft_walk"], file)
    assert len(file.getvalue()) < 200
    assert pickle.loads(file.getvalue()).now() is None


def test_unpatched_it_has_its_own_methods_again(toy):
    model = toy()
    gc.collect()
    forget_the_gone()
    before, of_class = set(model.__dict__), set(vars(type(model)))
    patch_model(model, backend="eager")
    assert set(QUICK) <= set(vars(type(model))) - of_class
    patch_model(model, backend="eager", placement="mlp")
    unpatch_model(model)
    assert set(model.__dict__) == before
    assert set(vars(type(model))) == of_class


def test_a_scripted_module_is_walked_each_time(walked):
    model = nn.Sequential(torch.jit.script(nn.Linear(2, 3)), nn.Dropout())
    walks.install(model)
    model.eval()
    assert not model[1].training
    model.train()
    assert model[1].training
    assert same_parameters(model)


def counting(kind: type[nn.Module]) -> tuple[type[nn.Module], list[bool]]:
    """A class that notes with what `train` is called."""
    calls: list[bool] = []

    class Counting(kind):  # type: ignore[misc,valid-type]
        def train(self, mode: bool = True) -> Any:
            calls.append(mode)
            return super().train(mode)

    return Counting, calls


@pytest.mark.parametrize("where", ["a class", "a module", "the model"])
def test_somebodys_own_train_is_called_each_time(where, toy, monkeypatch):
    """Stock calls it whether or not the mode is another one: it may do anything."""
    seen = []
    for fast in (False, True):
        model = toy()
        part = model if where == "the model" else model.get_base_model().model.layers[0].mlp.act_fn
        kind, calls = counting(type(part))
        if fast:
            patch_model(model, backend="eager")
            model.train()
        calls.clear()
        if where == "a module":
            monkeypatch.setitem(part.__dict__, "train", lambda mode=True, calls=calls: calls.append(mode))
        else:
            part.__class__ = kind
        for call in (model.train, model.train, model.eval, model.eval, model.train):
            call()
        seen.append((calls, set(modes_of(model).values())))
    assert seen[0] == seen[1]
    assert len(seen[0][0]) == 5


def test_sizes_that_changed_are_counted(patched):
    """Pruning a rank gives a parameter other data; it stays the same object."""
    base, before = patched.get_base_model(), patched.num_parameters()
    parameter = next(p for p in patched.parameters() if p.requires_grad)
    parameter.data = parameter.data[:1]
    assert patched.num_parameters() == type(base).num_parameters(base) < before


def test_registries_that_are_replaced_are_seen(patched):
    """DeepSpeed gives modules another dict of parameters."""
    list(patched.parameters())
    norm = patched.get_base_model().model.norm
    norm._parameters = {"weight": nn.Parameter(torch.ones(64))}
    assert same_parameters(patched)
    patched.get_base_model()._modules = {**patched.get_base_model()._modules, "more": nn.Linear(2, 3)}
    assert same_parameters(patched)
    patched.eval()
    assert set(modes_of(patched).values()) == {False}


def test_a_model_that_nobody_else_holds_survives_its_methods(toy):
    def make() -> Any:
        model = toy()
        patch_model(model, backend="eager")
        return model

    assert make().train().training
    assert not make().eval().training
    assert len(list(make().parameters())) == len(list(toy().parameters()))
    assert make().num_parameters() == toy().num_parameters()


def test_what_is_not_patched_has_its_own_methods(patched, toy, walked):
    other = toy()
    for name in QUICK:
        assert getattr(other, name).__func__ is not getattr(patched, name).__func__
        assert getattr(type(other), name, None) in (getattr(nn.Module, name, None), None)
    assert not hasattr(nn.Sequential(), "num_parameters")
    walked.clear()
    other.train()
    assert walked == ["train"]
