"""How the kernels' micro-benchmarks measure: CUDA graphs over rotating buffers, beside a copy of as many bytes.

    pytest bench/kernels

See `fastft.measure.replays`.  `share` is what the kernel reaches of a device-to-device copy that moves the same number
of bytes and is measured the same way, at its best.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fastft.measure.replays import CALLS, capture, replay_ms, rotations

COPIES = 3
"""How often the copy is measured, each time on other buffers: the fastest counts.  Where source and target lie to each
other can cost a copy a third of its bandwidth (seen on an H200)."""
TARGET_SHARE = 0.85

_Row = tuple[str, float, float, float]
_rows: list[_Row] = []

Work = tuple[Callable[[], Any], int]
"""One call on buffers of its own, and the bytes that it cannot avoid reading and writing."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU here"))


@pytest.fixture
def measure_bandwidth(benchmark: Any) -> Callable[[str, Callable[[], Work]], None]:
    """`measure_bandwidth(name, make)`: `make()` allocates one set of buffers and returns their `Work`."""

    def measure(name: str, make: Callable[[], Work]) -> None:
        works = [make()]
        moved = works[0][1]
        works += [make() for _ in range(rotations(moved) - 1)]
        copy_s = min(_copy_seconds(moved, len(works)) for _ in range(COPIES))
        graph = capture([call for call, _ in works])
        seconds = _seconds_per_call(graph)
        benchmark.extra_info.update(
            what=name,
            device=torch.cuda.get_device_name(),
            calls=CALLS,
            bytes=moved,
            gigabytes_per_second=moved / seconds / 1e9,
            share=copy_s / seconds,
            target_share=TARGET_SHARE,
        )
        _rows.append((name, seconds, moved / seconds, copy_s / seconds))

        def replay() -> None:
            graph.replay()
            torch.cuda.synchronize()

        benchmark.pedantic(replay, rounds=20, warmup_rounds=3)

    return measure


def _copy_seconds(moved: int, buffers: int) -> float:
    return _seconds_per_call(capture([_copy_work(moved)[0] for _ in range(buffers)]))


def _copy_work(moved: int) -> Work:
    source = torch.empty(moved // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return lambda: target.copy_(source), moved


def _seconds_per_call(graph: torch.cuda.CUDAGraph) -> float:
    return replay_ms(graph) / 1e3 / CALLS


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the table."""
    if not _rows:
        return
    width = max(len(name) for name, *_ in _rows)
    terminalreporter.section(f"kernels on {torch.cuda.get_device_name()}")
    terminalreporter.write_line(f"{'kernel':<{width}}  {'µs':>9}  {'GB/s':>7}  share of copy")
    for name, seconds, bandwidth, share in _rows:
        mark = "" if share >= TARGET_SHARE or " reference " in name else f"  under {TARGET_SHARE:.0%}"
        terminalreporter.write_line(
            f"{name:<{width}}  {seconds * 1e6:>9.1f}  {bandwidth / 1e9:>7.0f}  {share:>12.0%}{mark}"
        )


@pytest.fixture(autouse=True)
def _free_memory() -> Iterator[None]:
    """Give each benchmark the whole GPU."""
    yield
    torch.cuda.empty_cache()
