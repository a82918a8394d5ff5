"""The time of a CUDA graph's replay."""

import statistics

import torch


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
