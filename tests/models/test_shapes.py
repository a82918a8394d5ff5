import dataclasses

import pytest
import torch
import transformers

from fastft.errors import ModelError
from fastft.models.shapes import SHAPES, SUPPORTED_FAMILIES, ModelShape, shape_of, shipped_shape
from fastft.models.spec import ACTIVATIONS, SPECS


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_survives_hugging_faces_configuration(name):
    shape = SHAPES[name]
    assert shape_of(shape.to_config()) == shape


@pytest.mark.parametrize("name", SHAPES)
def test_sizes_are_those_of_the_model(name):
    """Built without memory, on the meta device."""
    shape = SHAPES[name]
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(shape.to_config())
    assert sum(p.numel() for p in model.parameters()) == shape.parameters
    backbone = getattr(model, shape.spec.backbone)
    layers = getattr(backbone, shape.spec.layers)
    layer = layers[0]
    assert sum(p.numel() for p in layer.parameters()) == shape.layer_parameters
    linears = {
        n.rpartition(".")[2]: (m.in_features, m.out_features)
        for n, m in layer.named_modules()
        if hasattr(m, "in_features")
    }
    assert linears == shape.linear_sizes
    assert len(layers) == shape.layers


@pytest.mark.parametrize("name", ["gemma-2-9b", "smollm3-3b"])
def test_a_model_made_shorter(name):
    shape = dataclasses.replace(SHAPES[name], layers=3)
    config = shape.to_config()
    assert shape_of(config) == shape
    assert config.layer_types == SHAPES[name].to_config().layer_types[:3]


# From the models' cards, in billions.
@pytest.mark.parametrize(
    ("name", "billions"),
    [("llama-2-13b", 13.02), ("llama-3-8b", 8.03), ("llama-3.2-1b", 1.24), ("llama-3.2-3b", 3.21),
     ("qwen2-0.5b", 0.494), ("qwen2-1.5b", 1.54), ("qwen2-7b", 7.62), ("mistral-7b", 7.25), ("qwen3-8b", 8.19),
     ("gemma-2-9b", 9.24), ("gemma-3-4b", 3.88), ("phi-4", 14.66), ("falcon3-7b", 7.46), ("smollm2-1.7b", 1.71),
     ("smollm3-3b", 3.08), ("granite-3-8b", 8.17), ("falcon-7b", 6.92)],
)  # fmt: skip
def test_published_sizes(name, billions):
    assert SHAPES[name].parameters / 1e9 == pytest.approx(billions, abs=0.006)


@pytest.mark.parametrize("name", [name for name in SHAPES if name.startswith("toy")])
@pytest.mark.parametrize("targets", ["all", "first and last", ("lm_head",)])
def test_adapter_sizes_are_pefts(name, targets):
    import peft

    shape = SHAPES[name]
    every = shape.spec.targets
    targets = {"all": every, "first and last": (every[0], every[-1])}.get(targets, targets)
    counted = shape.lora_parameters(5, targets)
    if targets == ("lm_head",):
        assert counted == 0, "only the layers' linears count"
        return
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(shape.to_config())
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=5, target_modules=list(targets)))
    assert counted == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_a_configuration_with_little_in_it():
    """No grouped heads, no head size, biases in a Llama."""
    config = transformers.LlamaConfig(
        vocab_size=10, hidden_size=24, intermediate_size=8, num_hidden_layers=1, num_attention_heads=3,
        attention_bias=True,
    )  # fmt: skip
    shape = shape_of(config)
    assert (shape.kv_heads, shape.head_dim, shape.qkv_bias) == (3, 8, True)


def test_other_families_are_refused():
    with pytest.raises(
        ModelError, match=r"not supported; got gpt2; allowed: llama, mistral, qwen2, .*; fix: choose backend peft"
    ):
        shape_of(transformers.GPT2Config())
    with pytest.raises(ModelError, match="got unknown"):
        shape_of(object())


def test_the_tables_agree():
    assert set(SUPPORTED_FAMILIES) == set(SPECS)
    assert {shape.family for shape in SHAPES.values()} == set(SPECS)
    for family, spec in SPECS.items():
        assert spec.family == family
        assert len(set(spec.targets)) == len(spec.linears), "names of targets must tell the linears apart"
    assert SPECS["llama"].targets == (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip


@pytest.mark.parametrize("family", SPECS)
def test_a_spec_finds_the_parts_of_its_layer(family):
    from operator import attrgetter

    spec = SPECS[family]
    [name] = [name for name, shape in SHAPES.items() if shape.family == family and name.startswith("toy")]
    model = transformers.AutoModelForCausalLM.from_config(SHAPES[name].to_config())
    layer = attrgetter(f"{spec.backbone}.{spec.layers}")(model)[0]
    assert type(layer).__name__ == spec.layer_class
    assert {type(attrgetter(path)(layer)).__name__ for path in spec.norms} == {spec.norm_class}
    assert all(isinstance(attrgetter(path)(layer), torch.nn.Linear) for path in spec.linears)
    assert type(attrgetter(spec.activation)(layer)).__name__ in ACTIVATIONS
    owned = {id(p) for path in (*spec.linears, *spec.norms) for p in attrgetter(path)(layer).parameters()}
    assert owned == {id(p) for p in layer.parameters()}, "the layer has a parameter that the engine would not know"


def test_a_shipped_shape_by_name():
    assert isinstance(shipped_shape("toy-llama"), ModelShape)
    with pytest.raises(ModelError, match=r"shape is unknown; got toy-lama; .*did you mean 'toy-llama'"):
        shipped_shape("toy-lama")


def test_a_shape_is_json():
    import json

    for shape in SHAPES.values():
        assert ModelShape(**json.loads(json.dumps(shape.as_dict()))) == shape
        assert json.dumps(shape.sizes())


def test_constants_are_no_sizes():
    shape = SHAPES["toy-gemma2"]
    same = dataclasses.replace(shape, rope_theta=7.0, settings={**shape.settings, "final_logit_softcapping": 9.0})
    assert same.sizes() == shape.sizes()
    for other in ({"window": 9}, {"settings": {**shape.settings, "layer_types": ["full_attention"] * 3}}):
        assert dataclasses.replace(shape, **other).sizes() != shape.sizes()


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(ModelShape)])
def test_every_size_tells_models_apart(field):
    """Else they would share plans."""
    shape = SHAPES["toy-llama"]
    value = getattr(shape, field)
    others = {"family": "qwen2", "window": 9, "settings": {"residual_multiplier": 0.5}}
    other = others[field] if field in others else not value if isinstance(value, bool) else 2 * value
    constants = {"rope_theta", "rotary_fraction", "rms_norm_eps", "max_positions", "settings"}
    same = dataclasses.replace(shape, **{field: other}).sizes() == shape.sizes()
    assert same == (field in constants)


def test_a_falcon_3_is_a_llama():
    assert SHAPES["falcon3-7b"].family == "llama"
