import pytest
import torch
import transformers

from fastft.config import LLAMA_LINEARS
from fastft.errors import ModelError
from fastft.models.shapes import SHAPES, SUPPORTED_FAMILIES, ModelShape, shape_of, shipped_shape
from fastft.models.spec import SPECS


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
    layer = model.model.layers[0]
    assert sum(p.numel() for p in layer.parameters()) == shape.layer_parameters
    linears = {
        n.rpartition(".")[2]: (m.in_features, m.out_features)
        for n, m in layer.named_modules()
        if hasattr(m, "in_features")
    }
    assert linears == shape.linear_sizes
    assert len(model.model.layers) == shape.layers


# From the models' cards, in billions.
@pytest.mark.parametrize(
    ("name", "billions"),
    [("llama-3-8b", 8.03), ("llama-3.2-1b", 1.24), ("llama-3.2-3b", 3.21), ("qwen2-0.5b", 0.494), ("qwen2-1.5b", 1.54),
     ("qwen2-7b", 7.62)],
)  # fmt: skip
def test_published_sizes(name, billions):
    assert SHAPES[name].parameters / 1e9 == pytest.approx(billions, abs=0.006)


@pytest.mark.parametrize("name", ["toy-llama", "toy-qwen2"])
@pytest.mark.parametrize("targets", [LLAMA_LINEARS, ("q_proj", "v_proj"), ("down_proj",), ("lm_head",)])
def test_adapter_sizes_are_pefts(name, targets):
    import peft

    shape = SHAPES[name]
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
    with pytest.raises(ModelError, match="not supported; got gpt2; allowed: llama, qwen2; fix: choose backend peft"):
        shape_of(transformers.GPT2Config())
    with pytest.raises(ModelError, match="got unknown"):
        shape_of(object())


def test_the_tables_agree():
    assert set(SUPPORTED_FAMILIES) == set(SPECS)
    assert {shape.family for shape in SHAPES.values()} == set(SPECS)
    for family, spec in SPECS.items():
        assert spec.family == family
        assert [path.rpartition(".")[2] for path in spec.linears] == list(LLAMA_LINEARS)


@pytest.mark.parametrize("family", SPECS)
def test_a_spec_finds_the_parts_of_its_layer(family):
    from operator import attrgetter

    spec = SPECS[family]
    [name] = [name for name, shape in SHAPES.items() if shape.family == family and name.startswith("toy")]
    layer = transformers.AutoModelForCausalLM.from_config(SHAPES[name].to_config()).model.layers[0]
    assert type(layer).__name__ == spec.layer_class
    assert {type(attrgetter(path)(layer)).__name__ for path in (spec.input_norm, spec.mlp_norm)} == {spec.norm_class}
    assert all(isinstance(attrgetter(path)(layer), torch.nn.Linear) for path in spec.linears)
    owned = {
        id(p) for path in (*spec.linears, spec.input_norm, spec.mlp_norm) for p in attrgetter(path)(layer).parameters()
    }
    assert owned == {id(p) for p in layer.parameters()}, "the layer has a parameter that the engine would not know"


def test_a_shipped_shape_by_name():
    assert isinstance(shipped_shape("toy-llama"), ModelShape)
    with pytest.raises(ModelError, match=r"shape is unknown; got toy-lama; .*did you mean 'toy-llama'"):
        shipped_shape("toy-lama")


def test_a_shape_is_json():
    import json

    shape = SHAPES["qwen2-0.5b"]
    assert ModelShape(**json.loads(json.dumps(shape.as_dict()))) == shape
