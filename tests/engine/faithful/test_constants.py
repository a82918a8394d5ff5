"""Constants are what they are now."""

import copy
from typing import Any

import pytest
import torch

from same_as_stock import PADDED, Change, Same, call, differences, layers, on, step


def _all_layers(name: str, value: Any) -> Change:
    def change(model: Any) -> None:
        for layer in layers(model):
            setattr(layer.self_attn, name, value)

    return change


def _another_theta(model: Any) -> None:
    backbone = model.get_base_model().model
    config = copy.deepcopy(backbone.config)
    config.rope_parameters["rope_theta"] = 7.0
    backbone.rotary_emb = type(backbone.rotary_emb)(config).to(backbone.device)


def _other_frequencies(model: Any) -> None:
    rotary = model.get_base_model().model.rotary_emb
    rotary.inv_freq = 0.5 * rotary.inv_freq


def _config_of_the_model(**values: Any) -> Change:
    def change(model: Any) -> None:
        causal = model.get_base_model()
        causal.config = copy.deepcopy(causal.config)
        for name, value in values.items():
            setattr(causal.config, name, value)

    return change


def _epsilon_as_a_tensor(model: Any) -> None:
    layers(model)[0].input_layernorm.variance_epsilon = on(model, torch.tensor(0.5))


CONSTANTS: dict[str, tuple[str, Change]] = {
    "dropout of attention": ("toy-llama", _all_layers("attention_dropout", 1e-12)),
    "scaling in one layer": ("toy-llama", lambda model: setattr(layers(model)[1].self_attn, "scaling", 0.05)),
    "theta": ("toy-llama", _another_theta),
    "frequencies": ("toy-llama", _other_frequencies),
    "epsilon as a tensor": ("toy-llama", _epsilon_as_a_tensor),
    "divisor of logits": ("toy-granite", _config_of_the_model(logits_scaling=5.0)),
    "multiplier of embeddings": (
        "toy-granite", lambda model: setattr(model.get_base_model().model, "embedding_multiplier", 1.5)
    ),
    "multiplier of one residual": (
        "toy-granite", lambda model: setattr(layers(model)[0], "residual_multiplier", 0.9)
    ),
    "soft-cap of logits": ("toy-gemma2", _config_of_the_model(final_logit_softcapping=0.7)),
    "window of the whole model": (
        "toy-mistral", lambda model: setattr(model.get_base_model().config, "sliding_window", 3)
    ),
    "largest norm of embeddings": (
        "toy-llama", lambda model: setattr(model.get_input_embeddings(), "max_norm", 0.5)
    ),
}  # fmt: skip


@pytest.mark.parametrize("constant", CONSTANTS)
def test_a_constant_that_changes_after_a_step(constant: str, same: Same) -> None:
    family, change = CONSTANTS[constant]

    def ask(model: Any) -> Any:
        before = step(model)
        change(model)
        return [before, step(model), step(model, **PADDED), call(model, **PADDED).logits]

    answers = same(ask, family=family, base={"attn_implementation": "eager"})
    if constant != "dropout of attention":
        assert list(differences(answers.stock[0], answers.stock[1])), "the change changes nothing"


@pytest.mark.parametrize("fill", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_finite(fill: float, same: Same) -> None:
    def ask(model: Any) -> Any:
        with torch.no_grad():
            layers(model)[0].mlp.up_proj.base_layer.weight[0, 0] = fill
        return call(model).loss.isfinite()

    same(ask)
