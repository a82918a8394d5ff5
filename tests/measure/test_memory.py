import pytest
import torch

from fastft.measure import memory
from fastft.measure.memory import PeakMemory, peak_resident_bytes, resident_bytes

MIB = 2**20
SIZE = 64 * MIB
SLACK = 8 * MIB
"""What else a test process may touch meanwhile."""


def touched(size: int, device: torch.device) -> torch.Tensor:
    return torch.ones(size, dtype=torch.uint8, device=device)


def can_reset() -> bool:
    try:
        memory._CLEAR.write_text("5")
    except OSError:
        return False
    return True


needs_reset = pytest.mark.skipif(not can_reset(), reason="this system does not let a process reset its high-water mark")


@needs_reset
def test_an_allocation_is_seen_even_after_it_is_freed(device):
    watch = PeakMemory(device)
    watch.start()
    tensor = touched(SIZE, device)
    del tensor
    measured = watch.stop()
    assert SIZE - SLACK < measured.above_model_bytes < SIZE + SLACK
    assert measured.kind == ("cuda_allocated" if device.type == "cuda" else "rss")
    assert measured.allocator_retries == 0


@needs_reset
def test_what_was_freed_before_the_start_is_not_counted(device):
    tensor = touched(2 * SIZE, device)
    del tensor
    watch = PeakMemory(device)
    watch.start()
    assert watch.stop().above_model_bytes < SLACK


@needs_reset
def test_what_stands_at_the_start_is_the_model(device):
    tensor = touched(SIZE, device)
    watch = PeakMemory(device)
    watch.start()
    measured = watch.stop()
    assert measured.model_bytes >= SIZE
    assert measured.above_model_bytes < SLACK
    del tensor


@needs_reset
def test_a_second_start_forgets_the_first_peak(device):
    watch = PeakMemory(device)
    watch.start()
    tensor = touched(SIZE, device)
    del tensor
    watch.start()
    assert watch.stop().above_model_bytes < SLACK


def test_where_the_mark_cannot_be_reset_the_whole_process_counts(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_CLEAR", tmp_path)  # a folder: writing to it fails
    watch = PeakMemory(torch.device("cpu"))
    watch.start()
    measured = watch.stop()
    assert measured.peak_bytes >= measured.model_bytes - SLACK


def test_without_proc_the_peak_is_the_processs(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "missing")
    assert peak_resident_bytes() >= resident_bytes() - SLACK
