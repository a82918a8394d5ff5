"""`disable_adapter` of a patched model: whatever the situation, all that PEFT's own does, without its walks."""

import copy
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer

from fastft.engine.patch import patch_model, unpatch_model


def _model(**config: Any) -> PeftModel:
    shape = transformers.Qwen2Config(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    torch.manual_seed(0)
    made = transformers.Qwen2ForCausalLM(shape)
    adapted: Any = get_peft_model(made, LoraConfig(r=2, task_type="CAUSAL_LM", **config))  # type: ignore[arg-type]
    return adapted


def _state(model: Any) -> list[Any]:
    """All that PEFT may switch, of every module."""
    return [
        (
            name, module.__dict__.get("_disable_adapters"), module.__dict__.get("_active_adapter"),
            [p.requires_grad for p in module._parameters.values() if p is not None],
        )
        for name, module in model.named_modules()
    ] + [model._adapters_disabled, model.active_adapters]  # fmt: skip


def _plain(model: Any, told: list[Any]) -> None:
    with model.disable_adapter():
        told.append(_state(model))


def _twice(model: Any, told: list[Any]) -> None:
    for _ in range(2):
        _plain(model, told)
        told.append(_state(model))


def _nested(model: Any, told: list[Any]) -> None:
    with model.disable_adapter(), model.disable_adapter():
        told.append(_state(model))


def _raising(model: Any, told: list[Any]) -> None:
    with suppress(ZeroDivisionError), model.disable_adapter():
        raise ZeroDivisionError


def _switching_inside(model: Any, told: list[Any]) -> None:
    with model.disable_adapter():
        model.set_adapter("other")
        told.append(_state(model))


def _training_inside(model: Any, told: list[Any]) -> None:
    with model.disable_adapter():
        next(p for n, p in model.named_parameters() if "lora_A" in n).requires_grad_(True)


def _adding_inside(model: Any, told: list[Any]) -> None:
    with model.disable_adapter():
        model.add_adapter("third", LoraConfig(r=2))


def _as_decorator(model: Any, told: list[Any]) -> None:
    @model.disable_adapter()
    def inside() -> None:
        told.append(_state(model))

    inside()


def _nothing(model: Any) -> None: ...


def _two(model: Any) -> None:
    model.add_adapter("other", LoraConfig(r=2))


def _one_frozen(model: Any) -> None:
    next(p for n, p in model.named_parameters() if "lora_A" in n).requires_grad_(False)


def _for_inference(model: Any) -> None:
    model.set_adapter("default", inference_mode=True)


def _off(model: Any) -> None:
    model.base_model.disable_adapter_layers()


def _one_off(model: Any) -> None:
    next(m for m in model.modules() if isinstance(m, BaseTunerLayer)).enable_adapters(False)


BEFORE: dict[str, Callable[[Any], None]] = {
    "nothing": _nothing, "two adapters": _two, "one matrix frozen": _one_frozen, "for inference": _for_inference,
    "already off": _off, "one layer off": _one_off,
}  # fmt: skip
WITHIN: dict[str, Callable[[Any, list[Any]], None]] = {
    "plain": _plain, "twice": _twice, "nested": _nested, "raising": _raising, "switching": _switching_inside,
    "training": _training_inside, "adding": _adding_inside, "decorator": _as_decorator,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {}, "bias": {"bias": "lora_only"}, "saved module": {"modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]}, "dora": {"use_dora": True},
}  # fmt: skip


@pytest.mark.parametrize("within", WITHIN.values(), ids=WITHIN)
@pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_switch_is_as_pefts_own_leaves_it(
    config: dict[str, Any], before: Callable[[Any], None], within: Callable[[Any, list[Any]], None]
) -> None:
    told: list[tuple[list[Any], list[str]]] = []
    for patched in (False, True):
        model: Any = _model(**config)
        if within is _switching_inside and before is not _two:
            model.add_adapter("other", LoraConfig(r=2))
        if patched:
            patch_model(model, backend="eager")
        before(model)
        states: list[Any] = []
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            within(model, states)
        told.append(([*states, _state(model)], [str(each.message) for each in heard]))
    assert told[0] == told[1]


def test_no_layer_is_asked_for_its_status() -> None:
    model: Any = _model()
    asked = []
    own = model.get_model_status
    model.get_model_status = lambda: asked.append(1) or own()
    patch_model(model, backend="eager")
    for _ in range(4):
        with model.disable_adapter():
            pass
    assert not asked


def test_somebody_elses_method_is_called() -> None:
    """A method of another class may do more."""
    model: Any = _model()
    patch_model(model, backend="eager")
    _plain(model, [])
    layer = next(m for m in model.modules() if isinstance(m, LoraLayer))
    called = []
    layer.__class__ = type("Own", (type(layer),), {"enable_adapters": lambda self, on: called.append(on)})
    _plain(model, [])
    assert called == [False, True]


def test_without_the_patch_peft_is_as_it_was() -> None:
    model: Any = _model()
    patch_model(model, backend="eager")
    assert "disable_adapter" in model.__dict__
    twin = copy.deepcopy(model)
    unpatch_model(model)
    assert "disable_adapter" not in model.__dict__
    with twin.disable_adapter():
        assert all(m._disable_adapters for m in twin.modules() if isinstance(m, LoraLayer))
    assert not any(m._disable_adapters for m in model.modules() if isinstance(m, LoraLayer))
