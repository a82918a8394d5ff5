"""Walks that are not walked: what the quick methods give is what the originals give, whatever happens between."""

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn

from fastft import patch_model, unpatch_model
from fastft.engine import walks

QUICK = ("train", "parameters", "num_parameters")


@pytest.fixture
def patched(toy):
    model = toy()
    patch_model(model, backend="eager")
    return model


@pytest.fixture
def walked(monkeypatch) -> list[str]:
    """Grows by one where an original walks."""
    calls: list[str] = []
    for name in ("train", "parameters"):
        original = getattr(nn.Module, name)

        def spy(self: Any, *args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            if isinstance(self, peft.PeftModel):
                calls.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(nn.Module, name, spy)
    return calls


def modes_of(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def same_parameters(model: Any) -> bool:
    theirs = list(nn.Module.parameters(model))
    mine = list(model.parameters())
    return len(mine) == len(theirs) and all(a is b for a, b in zip(mine, theirs, strict=True))


def test_what_does_not_change_is_walked_once(patched, walked):
    patched.train()
    list(patched.parameters())
    walked.clear()
    for _ in range(3):
        assert patched.train() is patched
        assert same_parameters(patched)
        patched.zero_grad()
    assert walked == ["parameters"] * 3  # those of the comparison


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
    assert not pickle.loads(file.getvalue()).holds()


def test_unpatched_it_has_its_own_methods_again(toy):
    model = toy()
    before = set(model.__dict__)
    patch_model(model, backend="eager")
    assert set(QUICK) <= set(model.__dict__)
    patch_model(model, backend="eager", placement="mlp")
    unpatch_model(model)
    assert set(model.__dict__) == before


def test_a_scripted_module_is_walked_each_time(walked):
    model = nn.Sequential(torch.jit.script(nn.Linear(2, 3)), nn.Dropout())
    walks.install(model)
    model.eval()
    assert not model[1].training
    model.train()
    assert model[1].training
    assert same_parameters(model)
