"""How the kernels' micro-benchmarks measure: CUDA graphs over rotating buffers, beside a copy of as many bytes.

    pytest bench/kernels

A small kernel's launch from Python takes longer than the kernel, so its calls are captured into a CUDA graph;
the buffers rotate, so that no call finds its inputs in the L2 cache.  `share` is what the kernel reaches of a
device-to-device copy that moves the same number of bytes and is measured the same way, at its best.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from bench.kernels.timing import replay_ms

CALLS = 20
"""Calls captured into one graph; a round replays it once."""
ROTATION_BYTES = 2**29
"""The rotating buffers together, several times a GPU's L2 cache."""
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
        works += [make() for _ in range(min(CALLS, ROTATION_BYTES // moved + 1) - 1)]
        copy_s = min(_copy_seconds(moved, len(works)) for _ in range(COPIES))
        graph = _capture([call for call, _ in works])
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
    return _seconds_per_call(_capture([_copy_work(moved)[0] for _ in range(buffers)]))


def _copy_work(moved: int) -> Work:
    source = torch.empty(moved // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return lambda: target.copy_(source), moved


def _capture(calls: list[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    """A graph of CALLS calls, taken in turn."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:  # compiles the kernels, which a capture must not
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    results: deque[Any] = deque(maxlen=len(calls))  # kept, so that the outputs rotate too
    with torch.cuda.graph(graph):
        for index in range(CALLS):
            results.append(calls[index % len(calls)]())
    return graph


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
