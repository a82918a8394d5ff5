"""The embedding in host memory: the same rows, the device's memory free, and back again."""

import gc

import pytest
import torch

from fastft import patch_model, unpatch_model
from fastft.engine.host_embedding import give_back, is_on_host, keep_on_host, why_not_on_host
from fastft.errors import ConfigError


def test_on_a_cpu_there_is_nowhere_to_go(toy):
    model = toy(base={"device": "cpu"})
    assert why_not_on_host(model.get_base_model()) == "it is on a CPU"
    with pytest.raises(ConfigError, match="cannot be kept in host memory; got it is on a CPU"):
        patch_model(model, backend="eager", host_embedding=True)


@pytest.mark.gpu
def test_a_tied_embedding_stays(toy):
    model = toy(base={"tie_word_embeddings": True})
    assert why_not_on_host(model.get_base_model()) == "the head has the same weight"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_are_the_same_and_memory_is_free(dtype):
    embedding = torch.nn.Embedding(4096, 512, device="cuda", dtype=dtype).requires_grad_(False)
    ids = torch.randint(0, 4096, (4, 63), device="cuda")
    gc.collect()  # what earlier tests left must not go in between
    expected, before = embedding(ids), torch.cuda.memory_allocated()
    size = embedding.weight.nbytes
    keep_on_host(embedding)
    assert is_on_host(embedding)
    assert embedding.weight.is_cuda
    assert torch.cuda.memory_allocated() <= before - size
    assert torch.equal(embedding(ids), expected)
    give_back(embedding)
    gc.collect()
    assert not is_on_host(embedding)
    assert torch.equal(embedding(ids), expected)
    assert torch.cuda.memory_allocated() >= before


@pytest.mark.gpu
def test_training_is_the_same(toy, batch_of, step, error_of):
    batch = batch_of("right")
    model = toy(base={"tie_word_embeddings": False})
    _, stock = step(model, batch)
    patch_model(model, backend="eager", host_embedding=True, strict=True)
    _, fused = step(model, batch)
    embedding = model.get_base_model().get_input_embeddings()
    assert is_on_host(embedding)
    assert error_of(fused, stock) < 5e-5
    unpatch_model(model)
    assert not is_on_host(embedding)
