"""Ways to add an adapter to a frozen linear layer, timed beside the bare matrix product.

    python -m bench.kernels.lora_strategies [--tokens 8192] [--rank 16] [--json FILE]

Forward y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ and input gradient dx = dy·W + s·(dy·B)·A of the layer groups of two models, with the
narrow product made before (it is the same for all ways):

    after      the wide product, then the adapter added to it: `addmm_` reads and writes the output again
    before     the adapter first, then the wide product on top of it (beta = 1), which reads it as it writes
    augmented  one product over K + R columns, the narrow factors beside the wide ones in memory
    packed     the group's layers in one product, then `after` for each

A way that wins here becomes the one in `fastft/kernels/lora_linear`.  On a CPU it runs with small sizes and checks that
all ways agree.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastft.measure.replays import replay_ms

# T tokens, I in, O out, R rank of the group together

GROUPS = {
    "llama-3-8b qkv": (4096, (4096, 1024, 1024)),
    "llama-3-8b o": (4096, (4096,)),
    "llama-3-8b gate_up": (4096, (14336, 14336)),
    "llama-3-8b down": (14336, (4096,)),
    "qwen2-1.5b qkv": (1536, (1536, 256, 256)),
    "qwen2-1.5b o": (1536, (1536,)),
    "qwen2-1.5b gate_up": (1536, (8960, 8960)),
    "qwen2-1.5b down": (8960, (1536,)),
}
SCALE = 0.5


class Group:
    """Random weights of one group, laid out for every way."""

    def __init__(self, tokens: int, inputs: int, outputs: tuple[int, ...], rank: int, device: str) -> None:
        kind: dict[str, Any] = {"dtype": torch.bfloat16 if device == "cuda" else torch.float64, "device": device}
        self.outputs, self.rank = outputs, rank
        total, ranks = sum(outputs), rank * len(outputs)
        # W, B, A and x, dy beside their narrow products, in the layout of `augmented`; the others read views.
        self.whole = torch.zeros(total + ranks, inputs + ranks, **kind)
        self.w_OI = self.whole[:total, :inputs].normal_(std=inputs**-0.5)
        self.a_RI = self.whole[total:, :inputs].normal_(std=inputs**-0.5)
        self.b: list[torch.Tensor] = []
        for index, (start, size) in enumerate(self._columns()):
            block = self.whole[start : start + size, inputs + index * rank : inputs + (index + 1) * rank]
            self.b.append(block.normal_(std=rank**-0.5).mul_(SCALE))
        self.x_whole = torch.randn(tokens, inputs + ranks, **kind)
        self.x_TI, self.low_TR = self.x_whole[:, :inputs], self.x_whole[:, inputs:]
        self.dy_whole = torch.randn(tokens, total + ranks, **kind)
        self.dy_TO, self.dlow_TR = self.dy_whole[:, :total], self.dy_whole[:, total:]
        self.x_own, self.w_own = self.x_TI.contiguous(), [w.contiguous() for w in self.w_OI.split(outputs)]
        self.w_packed, self.a_own = self.w_OI.contiguous(), self.a_RI.contiguous()
        self.b_own = [b.contiguous() for b in self.b]
        self.dy_own, self.dy_packed = [d.contiguous() for d in self.dy_TO.split(outputs, 1)], self.dy_TO.contiguous()
        self.lows = self.low_TR.split(rank, 1)

    def _columns(self) -> list[tuple[int, int]]:
        starts = [sum(self.outputs[:index]) for index in range(len(self.outputs))]
        return list(zip(starts, self.outputs, strict=True))

    def forward(self) -> dict[str, Callable[[], list[torch.Tensor]]]:
        """Every way to the outputs (T × O each)."""
        x, together = self.x_own, list(zip(self.w_own, self.b_own, self.lows, strict=True))

        def before() -> list[torch.Tensor]:
            return [torch.mm(low, b.t()).addmm_(x, w.t()) for w, b, low in together]

        def packed() -> list[torch.Tensor]:
            ys = list(torch.mm(x, self.w_packed.t()).split(self.outputs, 1))
            return [y.addmm_(low, b.t()) for y, b, low in zip(ys, self.b_own, self.lows, strict=True)]

        total = sum(self.outputs)
        return {
            "bare": lambda: [torch.mm(x, w.t()) for w in self.w_own],
            "bare packed": lambda: [torch.mm(x, self.w_packed.t())],
            "after": lambda: [torch.mm(x, w.t()).addmm_(low, b.t()) for w, b, low in together],
            "before": before,
            "packed": packed,
            "augmented": lambda: list(torch.mm(self.x_whole, self.whole[:total].t()).split(self.outputs, 1)),
        }

    def backward(self) -> dict[str, Callable[[], list[torch.Tensor]]]:
        """Every way to the input's gradient (T × I)."""

        def wide(dx: torch.Tensor | None) -> torch.Tensor:
            for dy, w in zip(self.dy_own, self.w_own, strict=True):
                dx = torch.mm(dy, w) if dx is None else dx.addmm_(dy, w)
            assert dx is not None
            return dx

        inputs = self.x_own.shape[1]
        return {
            "bare": lambda: [wide(None)],
            "bare packed": lambda: [torch.mm(self.dy_packed, self.w_packed)],
            "after": lambda: [wide(None).addmm_(self.dlow_TR, self.a_own)],
            "before": lambda: [wide(torch.mm(self.dlow_TR, self.a_own))],
            "packed": lambda: [torch.mm(self.dy_packed, self.w_packed).addmm_(self.dlow_TR, self.a_own)],
            "augmented": lambda: [torch.mm(self.dy_whole, self.whole[:, :inputs])],
        }

    def narrow(self) -> dict[str, Callable[[], Any]]:
        """The narrow products that every way needs, and the adapters' gradients."""
        x, dys = self.x_own, self.dy_own
        return {
            "x·Aᵀ": lambda: torch.mm(x, self.a_own.t()),
            "dy·B": lambda: [torch.mm(dy, b) for dy, b in zip(dys, self.b_own, strict=True)],
            "dA": lambda: torch.mm(self.dlow_TR.t(), x),
            "dB": lambda: [torch.mm(dy.t(), low) for dy, low in zip(dys, self.lows, strict=True)],
        }


def check(group: Group) -> None:
    """All ways agree.

    Raises:
        AssertionError: they do not.
    """
    for ways in (group.forward(), group.backward()):
        expected = torch.cat(ways["after"](), 1)
        for name in ("before", "packed", "augmented"):
            torch.testing.assert_close(torch.cat(ways[name](), 1), expected)


def microseconds(call: Callable[[], Any], calls: int = 10, rounds: int = 15) -> float:
    """The median over `rounds` replays of a CUDA graph of `calls` calls, a call."""
    for _ in range(3):
        call()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return 1e3 * replay_ms(graph, rounds) / calls


def main() -> None:
    """Print a line a group and direction."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        check(Group(17, 24, (16, 8, 8), 4, "cpu"))
        print("no CUDA GPU here: checked that all ways agree")
        return
    results: dict[str, dict[str, float]] = {}
    for name, (inputs, outputs) in GROUPS.items():
        group = Group(options.tokens, inputs, outputs, options.rank, "cuda")
        for direction, ways in (("forward", group.forward()), ("backward", group.backward()), ("", group.narrow())):
            row = {way: microseconds(call) for way, call in ways.items()}
            results[f"{name} {direction}".strip()] = row
            cells = "  ".join(f"{way} {time:.0f}" for way, time in row.items())
            print(f"{name:<20} {direction:<8} µs: {cells}", flush=True)
        del group
        torch.cuda.empty_cache()
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
