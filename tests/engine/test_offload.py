"""What layers save in host memory: the same gradients, and copies at the right moments."""

import gc
import itertools
import weakref
from typing import Any

import pytest
import torch

from fastft import patch_model
from fastft.engine import offload, runs
from fastft.kernels.launch import next_power_of_2
from fastft.memory.layer import HOST_PIECE_BYTES, page_locked_bytes

TOLERANCE = 5e-5 if torch.cuda.is_available() else 1e-5  # ‖g − stock‖ / ‖stock‖ in fp32
PLACEMENTS: list[Any] = ["offload", "offload_mlp", ["offload_mlp", "offload", "light"], ["light", "offload", "full"]]


@pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
@pytest.mark.parametrize("form", ["none", "right"])
def test_gradients_equal_stock(placement, form, toy, batch_of, step, error_of, monkeypatch):
    monkeypatch.setattr(offload, "_WORTH_MOVING", 0)
    model = toy("toy-qwen2")
    batch = batch_of(form)
    _, stock = step(model, batch)
    patch_model(model, backend="eager", placement=placement, strict=True)
    for rows in (4, 3):
        _, fused = step(model, batch, rows)
        assert error_of(fused, stock) < TOLERANCE


def test_each_layer_leaves_after_the_next_and_is_fetched_before_the_one_above(toy, batch_of, monkeypatch):
    """A copy is hidden only behind work that is launched between its start and the wait for it."""
    order: list[str] = []

    class Spy(offload.ParkedLayer):
        count = 0

        def __init__(self, *given: Any) -> None:
            self.name = str(Spy.count)
            Spy.count += 1
            order.append(f"park {self.name}")
            super().__init__(*given)

        def leave(self) -> None:
            order.append(f"leave {self.name}")
            super().leave()

        def fetch(self) -> None:
            order.append(f"fetch {self.name}")
            super().fetch()

    forward, backward = runs.forward_layer, runs.backward_layer
    monkeypatch.setattr(runs, "ParkedLayer", Spy)
    monkeypatch.setattr(runs, "forward_layer", lambda *a: order.append("forward") or forward(*a))
    monkeypatch.setattr(runs, "backward_layer", lambda *a, **k: order.append("backward") or backward(*a, **k))
    model = toy()
    patch_model(model, backend="eager", placement="offload")
    device = next(model.parameters()).device
    model(**{name: t.to(device) for name, t in batch_of("none").items()}).loss.backward()
    assert order == [
        "forward", "park 0", "forward", "leave 0", "park 1", "forward", "leave 1",
        "fetch 1", "backward", "fetch 0", "backward", "backward",
    ]  # fmt: skip


def test_recordings_share_host_buffers_that_grow():
    made: list[int] = []

    def allocate(size: int) -> torch.Tensor:
        made.append(size)
        return torch.empty(size, dtype=torch.uint8)

    buffers = offload.HostBuffers(allocate)
    first, second = (buffers.take(torch.empty(3, 5, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16))
    assert (first.shape, first.dtype, second.dtype) == ((3, 5), torch.float32, torch.bfloat16)
    assert first.data_ptr() != second.data_ptr()
    buffers.rewind()
    assert buffers.take(torch.empty(2, 5)).data_ptr() == first.data_ptr()
    larger = buffers.take(torch.empty(100, dtype=torch.float64))
    assert larger.data_ptr() != second.data_ptr()
    buffers.rewind()
    assert [buffers.take(torch.empty(2)).data_ptr() for _ in range(2)] == [first.data_ptr(), larger.data_ptr()]
    assert made == [64, 32, 1024]
    buffers.rewind()
    buffers.take(torch.empty(16))
    assert made == [64, 32, 1024], "64 bytes hold 16 elements"


def test_a_buffer_that_was_outgrown_is_kept():
    """Recordings know its address, and a replay copies to it and from it."""
    made: list[weakref.ref[torch.Tensor]] = []

    def allocate(size: int) -> torch.Tensor:
        buffer = torch.empty(size, dtype=torch.uint8)
        made.append(weakref.ref(buffer))
        return buffer

    buffers = offload.HostBuffers(allocate)
    for elements in (4, 100, 1000):
        buffers.rewind()
        buffers.take(torch.empty(elements))
    gc.collect()
    assert [buffer() is not None for buffer in made] == [True] * 3
    del buffers
    gc.collect()
    assert [buffer() is not None for buffer in made] == [False] * 3, "nobody else held them"


def test_on_a_cpu_nothing_moves():
    tensors = [torch.randn(3), None]
    transfer = offload.Transfer(tensors)
    transfer.leave()
    transfer.fetch()
    assert transfer.take()[0] is tensors[0]


@pytest.mark.gpu
def test_a_tensor_in_several_pieces_comes_back():
    tensors = [torch.randn(13_000_001, device="cuda"), torch.randn(4096, 4096, device="cuda").t()]
    expected = [t.clone() for t in tensors]
    transfer = offload.Transfer(tensors)
    tensors.clear()
    transfer.leave()
    for back, was in zip(transfer.take(), expected, strict=True):
        assert torch.equal(back, was)


@pytest.mark.gpu
def test_what_left_comes_back():
    tensors = [torch.randn(1024, 1024, device="cuda"), torch.randn(3, device="cuda"), None]
    expected = tensors[0].clone()
    small = tensors[1]
    transfer = offload.Transfer(tensors)
    tensors.clear()
    before = torch.cuda.memory_allocated()
    transfer.leave()
    assert torch.cuda.memory_allocated() == before - 2**22
    garbage = torch.full((1024, 1024), 7.0, device="cuda")
    transfer.fetch()
    back = transfer.take()
    assert torch.equal(back[0], expected)
    assert back[1] is small
    assert garbage.min() == 7


@pytest.mark.gpu
def test_the_device_holds_less_the_more_layers_there_are(toy_base, batch_of):
    import peft

    peaks = {}
    for placement in ("full", "offload"):
        base = toy_base("toy-llama", num_hidden_layers=12, hidden_size=512)
        model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        patch_model(model.train(), backend="eager", placement=placement)
        batch = {name: t.cuda() for name, t in batch_of("none", B=8, S=1024).items()}
        model(**batch).loss.backward()
        torch.cuda.reset_peak_memory_stats()
        model(**batch).loss.backward()
        peaks[placement] = torch.cuda.max_memory_allocated()
        del model, base
    # Of 12 inputs, the device holds the last layer's and up to three others that come or go.
    assert peaks["full"] - peaks["offload"] > 7 * 8 * 1024 * 512 * 4


@pytest.mark.parametrize("count", [1, 2**22, 2**23 + 1, 2**24, 3 * 2**23, 5 * 2**23 + 77, 2**26 - 4])
def test_pieces_are_the_tensor_and_waste_little(count):
    t = torch.empty(count, dtype=torch.bfloat16)
    pieces = offload.in_pieces(t)
    assert pieces[0].data_ptr() == t.data_ptr()
    assert sum(piece.numel() for piece in pieces) == count
    assert all(a.data_ptr() + a.nbytes == b.data_ptr() for a, b in itertools.pairwise(pieces))
    taken = sum(next_power_of_2(piece.nbytes) for piece in pieces)
    assert taken == page_locked_bytes(t.nbytes)
    assert taken - t.nbytes < HOST_PIECE_BYTES


def test_what_is_not_contiguous_is_one_piece():
    t = torch.empty(2**13, 2**12).t()
    (piece,) = offload.in_pieces(t)
    assert piece is t
