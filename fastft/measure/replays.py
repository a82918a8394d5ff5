"""The time of a kernel: CUDA graphs of many calls, on buffers that take turns.

A small kernel's launch from Python takes longer than the kernel, so its calls are captured; the buffers rotate, so that
no call finds its inputs in the L2 cache.
"""

import statistics
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

CALLS = 20
"""Calls captured into one graph; a round replays it once."""
ROTATION_BYTES = 2**29
"""The rotating buffers together, several times a GPU's L2 cache."""


def rotations(bytes_moved: int) -> int:
    """How many sets of buffers take turns, if a call reads and writes `bytes_moved` of one."""
    return min(CALLS, ROTATION_BYTES // bytes_moved + 1)


def capture(calls: Sequence[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    """A graph of CALLS calls, taken in turn; each is made once before."""
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


def replay_ms(graph: torch.cuda.CUDAGraph, rounds: int = 20) -> float:
    """The median over `rounds` replays, in milliseconds, by CUDA events."""
    for _ in range(3):
        graph.replay()
    times_ms = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times_ms.append(start.elapsed_time(end))
    return statistics.median(times_ms)
