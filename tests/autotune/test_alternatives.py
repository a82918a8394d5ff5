import pytest
import torch

from autotune.alternatives import other_attention
from fastft.config import RunConfig
from fastft.kernels.attention import cuda
from fastft.kernels.attention.library import ATTENTION
from fastft.kernels.attention.seen import Seen
from fastft.models.shapes import SHAPES
from fastft.plan import Choices

CONFIG = RunConfig(model="toy-llama", sequence_tokens=16, batch_size=4, device="cpu")


def choices(backend: str = "eager", size: int = 2) -> Choices:
    return Choices(backend=backend, micro_batch=size, accumulation=4 // size, placement=["light"] * 3)


def test_on_a_cpu_only_the_fallback_is_another_attention() -> None:
    assert other_attention(CONFIG, choices(), SHAPES["toy-llama"]) == ["sdpa"]


def test_what_auto_takes_anyway_is_no_alternative() -> None:
    # Scores with a soft cap: nothing but the fallback can run them.
    assert other_attention(CONFIG, choices(), SHAPES["toy-gemma2"]) == []


def test_stock_and_packed_rows_have_none() -> None:
    assert other_attention(CONFIG, choices("peft"), SHAPES["toy-llama"]) == []
    packed = CONFIG.model_copy(update={"packing": True})
    assert other_attention(packed, choices(), SHAPES["toy-llama"]) == []


def test_a_kernel_that_runs_in_some_layers_only_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As cuDNN's, which knows no windows."""

    def causal_only(q: torch.Tensor, seen: Seen) -> bool:
        return seen.is_causal_only(q.shape[1])

    def always(q: torch.Tensor, seen: Seen) -> bool:
        return True

    monkeypatch.setitem(ATTENTION, "cudnn", ATTENTION["cudnn"]._replace(usable=causal_only))
    monkeypatch.setitem(ATTENTION, "flash", ATTENTION["flash"]._replace(usable=always))
    mixed = other_attention(CONFIG, choices(), SHAPES["toy-gemma3"])  # a window of 7 in two of three layers
    # `auto` is cudnn, flash; "efficient" cannot run here, and "cpu" and "sdpa" can.
    assert mixed == ["flash", "cpu", "sdpa"]
    assert cuda.cudnn_usable(torch.empty(1, 1, 1, 8), Seen()) is False


@pytest.mark.gpu
def test_on_a_gpu_every_alternative_runs() -> None:
    config = CONFIG.model_copy(update={"device": "cuda", "dtype": "auto"})
    found = other_attention(config, choices("triton"), SHAPES["toy-llama"])
    assert "sdpa" in found
    assert "cpu" not in found
