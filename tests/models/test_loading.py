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
from fastft.models.quantized import is_quantized
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


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_quantization(quantization, folder, device):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = load_model(resolve_model(str(folder)), dtype=torch.bfloat16, device=device.type, quantization=quantization)
    layer = model.model.layers[0]
    if quantization == "int8":
        assert isinstance(layer.mlp.up_proj, bitsandbytes.nn.Linear8bitLt)
        return
    assert is_quantized(layer.mlp.up_proj)
    assert layer.mlp.up_proj.weight.quant_type == quantization
    assert layer.mlp.up_proj.weight.quant_state.nested, "double quantization"
    assert layer.mlp.up_proj.compute_dtype == torch.bfloat16
    assert not is_quantized(model.lm_head)


def test_what_cannot_be_quantized_is_refused():
    with pytest.raises(ConfigError, match="cannot be quantized yet; got toy-llama with nf4"):
        load_model(resolve_model("toy-llama"), dtype=torch.float32, device="cpu", quantization="nf4")
    with pytest.raises(ConfigError, match=r"quantization is unknown; got nf5; .*did you mean 'nf4'"):
        quantization_config("nf5", torch.float32)


def test_dtypes_by_name():
    here = detect_device("cpu")
    assert torch_dtype("bf16", here) is torch.bfloat16
    assert torch_dtype(torch.float64, here) is torch.float64
    assert torch_dtype(None, here) is torch_dtype("auto", here) is torch.float32
    with pytest.raises(ConfigError, match="dtype"):
        torch_dtype("fp8", here)
