import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fastft
from fastft.errors import ConfigError, ModelError
from fastft.hardware import detect_device
from fastft.models.loading import (
    load_model,
    load_tokenizer,
    quantization_config,
    resolve_model,
    torch_dtype,
)
from fastft.models.quantized import dense_weight, is_quantized
from fastft.models.shapes import SHAPES

TINY = Path(fastft.__file__).parent / "models" / "tiny"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = SHAPES["toy-qwen2"].to_config()
    torch.manual_seed(3)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_tiny_is_shipped():
    resolved = resolve_model("tiny")
    assert (resolved.kind, resolved.source) == ("folder", str(TINY))
    assert resolved.shape is not None
    assert load_tokenizer(resolved).decode(load_tokenizer(resolved)("2 + 3")["input_ids"], skip_special_tokens=True)


def test_a_folder_comes_before_a_shape_of_the_same_name(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert resolve_model("toy-llama").kind == "shape"
    shutil.copytree(folder, folder.parent / "toy-llama")
    resolved = resolve_model("toy-llama")
    assert resolved.kind == "folder"
    assert resolved.shape == SHAPES["toy-qwen2"]


def test_a_shape_has_no_files():
    resolved = resolve_model("toy-llama")
    assert resolved.shape is SHAPES["toy-llama"]
    assert load_tokenizer(resolved) is None


def test_a_family_without_a_specification_still_loads(tmp_path):
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=16)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    resolved = resolve_model(str(tmp_path))
    assert resolved.shape is None
    assert load_model(resolved, dtype=torch.float32, device="cpu").config.model_type == "gpt2"


@pytest.mark.parametrize("name", ["toy-lama", "/no/such/folder", "./model", "~/model", "a/b/c"])
def test_a_name_that_nothing_answers_to(name):
    with pytest.raises(ModelError, match=r"model is unknown.*allowed: .*tiny"):
        resolve_model(name)


def test_a_hub_name_is_not_downloaded_unless_it_may_be(monkeypatch):
    asked: list[dict[str, Any]] = []

    def from_pretrained(source: str, **options: Any) -> None:
        asked.append({"source": source, **options})
        raise OSError("not here\nsecond line")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", from_pretrained)
    with pytest.raises(ModelError, match=r"cannot read model owner/name; got not here; fix: .*--no-offline"):
        resolve_model("owner/name")
    with pytest.raises(ModelError):
        resolve_model("owner/name", offline=False)
    assert [call["local_files_only"] for call in asked] == [True, False]
    assert {call["trust_remote_code"] for call in asked} == {False}


@pytest.mark.parametrize("content", ["{", "{}", '{"model_type": "no-such-family"}'])
def test_a_folder_without_a_readable_model(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"cannot read model .*check the folder's config.json"):
        resolve_model(str(tmp_path))


def test_code_from_a_folder_does_not_run(tmp_path):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (tmp_path / "config.json").write_text('{"model_type": "x", "auto_map": {"AutoConfig": "evil.Config"}}')
    with pytest.raises(ModelError):
        resolve_model(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_weights_that_are_missing_or_cut_off(folder):
    resolved = resolve_model(str(folder))
    weights = folder / "model.safetensors"
    weights.rename(folder / "elsewhere")
    with pytest.raises(ModelError, match=r"cannot load model .*check that its weights are complete"):
        load_model(resolved, dtype=torch.float32, device="cpu")
    weights.write_bytes((folder / "elsewhere").read_bytes()[:5000])
    with pytest.raises(ModelError, match="cannot load model"):
        load_model(resolved, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("name", ["toy-llama", "toy-qwen2"])
def test_a_folder_without_a_tokenizer(name, tmp_path):
    """For Qwen2, transformers makes one that knows no tokens, and says nothing."""
    SHAPES[name].to_config().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"cannot load the tokenizer of .*put tokenizer\.json"):
        load_tokenizer(resolve_model(str(tmp_path)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_device_and_attention_are_the_ones_asked_for(dtype, folder, device):
    for name in (str(folder), "toy-llama"):
        model = load_model(resolve_model(name), dtype=dtype, device=device.type)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert {p.device.type for p in model.parameters()} == {device.type}
        assert model.config._attn_implementation == "sdpa"
        assert not hasattr(model, "_hf_hook"), "accelerate's hooks would keep every layer stock"


def test_random_weights_follow_the_seed():
    def weight(seed: int) -> torch.Tensor:
        return load_model(resolve_model("toy-llama"), dtype=torch.float32, device="cpu", seed=seed).lm_head.weight

    assert torch.equal(weight(1), weight(1))
    assert not torch.equal(weight(1), weight(2))


def test_further_arguments_are_not_swallowed(folder):
    for name in (str(folder), "toy-llama"):
        model = load_model(resolve_model(name), dtype=torch.float32, device="cpu", attn_implementation="eager")
        assert model.config._attn_implementation == "eager"
        with pytest.raises(TypeError, match="no_such_argument"):
            load_model(resolve_model(name), dtype=torch.float32, device="cpu", no_such_argument=1)


def stored(model: Any) -> dict[str, torch.Tensor]:
    """What `save_pretrained` writes: packed weights with all their statistics too."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


@pytest.fixture
def dense_at_once(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many of the matrices that were given to bitsandbytes exist, each time it is given one."""
    from torch.multiprocessing.reductions import StorageWeakRef
    from transformers.integrations import bitsandbytes as integration

    given: list[StorageWeakRef] = []
    counts: list[int] = []
    for operation in (integration.Bnb4bitQuantize, integration.Bnb8bitQuantize):

        def convert(
            self: Any, tensors: dict[str, Any], *args: Any, _convert: Any = operation.convert, **more: Any
        ) -> Any:
            for value in tensors.values():
                matrix = value[0] if isinstance(value, list) else value
                given.append(StorageWeakRef(matrix.untyped_storage()))
            counts.append(sum(not reference.expired() for reference in given))
            return _convert(self, tensors, *args, **more)

        monkeypatch.setattr(operation, "convert", convert)
    return counts


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_quantization(quantization, folder, device, dense_at_once):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for name in (str(folder), "toy-qwen2"):
        model = load_model(resolve_model(name), dtype=torch.bfloat16, device=device.type, quantization=quantization)
        layer = model.model.layers[0]
        assert is_quantized(layer.mlp.up_proj)
        assert layer.self_attn.q_proj.bias.dtype == torch.bfloat16
        assert not is_quantized(model.lm_head)
        assert {p.device.type for p in model.parameters()} == {device.type}
        if quantization == "int8":
            assert isinstance(layer.mlp.up_proj, bitsandbytes.nn.Linear8bitLt)
            continue
        assert layer.mlp.up_proj.weight.quant_type == quantization
        assert layer.mlp.up_proj.weight.quant_state.nested, "double quantization"
        assert layer.mlp.up_proj.weight.quant_state.dtype == torch.bfloat16
        assert layer.mlp.up_proj.compute_dtype == torch.bfloat16
    assert len(dense_at_once) == 2 * 3 * 7
    assert max(dense_at_once) == 1


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("name", [name for name in SHAPES if name.startswith("toy-") and name != "toy-falcon"])
def test_a_quantized_shape_is_the_model_that_it_is_without(name, quantization, device):
    """Norms, biases and buffers are equal; random weights have the family's standard deviation."""
    pytest.importorskip("bitsandbytes")
    resolved = resolve_model(name)
    model, dense = (
        load_model(resolved, dtype=torch.float32, device=device.type, quantization=kind, seed=3)
        for kind in (quantization, "none")
    )
    assert resolved.quantization == "none", "the configuration is the resolved model's own, and not changed"
    assert model.config._attn_implementation == dense.config._attn_implementation
    modules = dict(dense.named_modules())
    assert dict(model.named_modules()).keys() == modules.keys()
    quantized_count = 0
    for path, module in model.named_modules():
        tensors = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        for leaf, tensor in tensors.items():
            expected = getattr(modules[path], leaf)
            assert tensor.device == expected.device
            if is_quantized(module) and leaf == "weight":
                quantized_count += 1
                tensor = dense_weight(module, torch.float32)
            assert (tensor.shape, tensor.dtype) == (expected.shape, expected.dtype)
            if expected.dim() < 2:
                # RoPE's frequencies are powers, which a GPU and a CPU round differently.
                torch.testing.assert_close(tensor, expected, rtol=2e-6, atol=0, msg=f"{path}.{leaf}")
            else:
                assert tensor.std().item() == pytest.approx(model.config.initializer_range, rel=0.1)
    assert quantized_count == model.config.num_hidden_layers * len(SHAPES[name].spec.targets)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == SHAPES[name].tied_embeddings


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_random_quantized_weights_follow_the_seed(quantization, device):
    pytest.importorskip("bitsandbytes")
    first, again, other = (
        stored(load_model(resolve_model("toy-llama"), dtype=torch.bfloat16, device=device.type,
                          quantization=quantization, seed=seed))
        for seed in (1, 1, 2)
    )  # fmt: skip
    assert_same(again, first)
    name = "model.layers.2.mlp.up_proj.weight"
    assert not torch.equal(other[name], first[name])
    assert not torch.equal(first["model.layers.1.mlp.up_proj.weight"], first[name])


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_a_quantized_shape_is_known_by_what_a_loaded_model_is_known_by(quantization, device, tmp_path):
    import peft

    pytest.importorskip("bitsandbytes")
    model = load_model(resolve_model("toy-llama"), dtype=torch.bfloat16, device=device.type, quantization=quantization)
    before = stored(model)
    model.save_pretrained(tmp_path)
    loaded = load_model(resolve_model(str(tmp_path)), dtype=torch.bfloat16, device=device.type)
    assert_same(stored(loaded), before)
    for name in ("is_quantized", "quantization_method", f"is_loaded_in_{8 if quantization == 'int8' else 4}bit"):
        assert getattr(model, name) == getattr(loaded, name)
    assert type(model.hf_quantizer) is type(loaded.hf_quantizer)
    assert model.hf_quantizer.is_trainable
    assert model.config.quantization_config.to_dict() == loaded.config.quantization_config.to_dict()
    # Trainers refuse a quantized model that has no adapter; PEFT chooses its layers by the attributes above.
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["up_proj"], task_type="CAUSAL_LM"))
    kind = peft.tuners.lora.Linear8bitLt if quantization == "int8" else peft.tuners.lora.Linear4bit
    assert isinstance(adapted.get_base_model().model.layers[0].mlp.up_proj, kind)
    transformers.Trainer(adapted, transformers.TrainingArguments(str(tmp_path), use_cpu=device.type == "cpu"))


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_weights_that_are_stored_quantized_stay_as_they_are(quantization, folder, device, tmp_path):
    pytest.importorskip("bitsandbytes")
    model = load_model(resolve_model(str(folder)), dtype=torch.bfloat16, device=device.type, quantization=quantization)
    before = stored(model)
    model.save_pretrained(tmp_path)
    resolved = resolve_model(str(tmp_path))
    assert resolved.quantization == quantization
    for asked in ("none", quantization):
        loaded = load_model(resolved, dtype=torch.bfloat16, device=device.type, quantization=asked)
        assert_same(stored(loaded), before)
    for asked in {"nf4", "fp4", "int8"} - {quantization}:
        with pytest.raises(
            ConfigError, match=f"quantized already; got {asked}; allowed: none, {quantization}; fix: set"
        ):
            load_model(resolved, dtype=torch.bfloat16, device=device.type, quantization=asked)


@pytest.mark.parametrize("asked", ["none", "nf4"])
def test_stored_4_bits_are_computed_with_in_the_dtype_asked_for(asked, folder, device, tmp_path):
    pytest.importorskip("bitsandbytes")
    model = load_model(resolve_model(str(folder)), dtype=torch.bfloat16, device=device.type, quantization="nf4")
    model.save_pretrained(tmp_path)
    resolved = resolve_model(str(tmp_path))
    loaded = load_model(resolved, dtype=torch.float32, device=device.type, quantization=asked)
    linear = loaded.model.layers[0].mlp.up_proj
    assert linear.compute_dtype == torch.float32
    assert linear.weight.quant_state.dtype == torch.bfloat16, "what the weights were"
    assert loaded.lm_head.weight.dtype == torch.float32
    assert loaded.config._attn_implementation == "sdpa"
    assert resolved.config.quantization_config["bnb_4bit_compute_dtype"] == "bfloat16", "not changed"
    with pytest.raises(TypeError, match="no_such_argument"):
        load_model(resolved, dtype=torch.float32, device=device.type, no_such_argument=1)


def test_what_stands_beside_stored_quantized_weights_has_the_dtype_asked_for(device, tmp_path):
    """Norms, embeddings, and the biases of the quantized layers themselves."""
    pytest.importorskip("bitsandbytes")
    model = load_model(resolve_model("toy-qwen2"), dtype=torch.bfloat16, device=device.type, quantization="nf4")
    model.save_pretrained(tmp_path)
    loaded = load_model(resolve_model(str(tmp_path)), dtype=torch.float32, device=device.type)
    dtypes = {name: p.dtype for name, p in loaded.named_parameters()}
    assert dtypes["model.layers.0.self_attn.q_proj.bias"] == torch.float32
    assert {dtype for dtype in dtypes.values() if dtype.is_floating_point} == {torch.float32}
    assert dtypes["model.layers.0.self_attn.q_proj.weight"] == torch.uint8


def test_codes_that_are_stored_under_a_float_dtype_stay_codes(folder, device, tmp_path):
    """As sharded training stores them: to cast them would make other weights of them."""
    pytest.importorskip("bitsandbytes")
    stored_as = quantization_config("nf4", torch.bfloat16)
    stored_as.bnb_4bit_quant_storage = torch.bfloat16
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": device.type}, quantization_config=stored_as
    )
    linear = model.model.layers[0].mlp.up_proj
    assert linear.weight.dtype == torch.bfloat16
    expected = dense_weight(linear, torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = load_model(resolve_model(str(tmp_path)), dtype=torch.float32, device=device.type)
    assert loaded.model.norm.weight.dtype == torch.float32
    assert torch.equal(dense_weight(loaded.model.layers[0].mlp.up_proj, torch.bfloat16), expected)


def test_other_stored_quantizations_have_their_name(folder):
    config = resolve_model(str(folder)).config
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    config.save_pretrained(folder)
    resolved = resolve_model(str(folder))
    assert resolved.quantization == "gptq"
    with pytest.raises(ConfigError, match="got nf4; allowed: none, gptq"):
        load_model(resolved, dtype=torch.float32, device="cpu", quantization="nf4")


def test_what_cannot_be_quantized_is_refused():
    # Its linear layers are of a class of their own, which transformers hands to no quantizer.
    with pytest.raises(ModelError, match="bitsandbytes quantizes no layer of toy-falcon; got nf4"):
        load_model(resolve_model("toy-falcon"), dtype=torch.float32, device="cpu", quantization="nf4")
    with pytest.raises(ConfigError, match=r"quantization is unknown; got nf5; .*did you mean 'nf4'"):
        load_model(resolve_model("toy-llama"), dtype=torch.float32, device="cpu", quantization="nf5")


def test_dtypes_by_name():
    here = detect_device("cpu")
    assert torch_dtype("bf16", here) is torch.bfloat16
    assert torch_dtype(torch.float64, here) is torch.float64
    assert torch_dtype(None, here) is torch_dtype("auto", here) is torch.float32
    with pytest.raises(ConfigError, match="dtype"):
        torch_dtype("fp8", here)
