"""One call of each tunable kernel, on random tensors of a bucket's sizes."""

# T tokens, F columns, R rank, O out, V vocabulary

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastft.kernels.adapted import triton as adapted
from fastft.kernels.cross_entropy import triton as cross_entropy
from fastft.kernels.launches import Bucket, Launches
from fastft.kernels.lora_linear import AdapterTerm
from fastft.kernels.lora_linear import triton as lora_linear


class KernelCall(NamedTuple):
    """A call on buffers of its own; what it does in place, it does again when it is called again."""

    run: Callable[[Launches], Sequence[Tensor | None]]
    bytes_moved: int
    """What it cannot avoid reading and writing."""
    results: Callable[[Sequence[Tensor | None]], Sequence[Tensor | None]] = lambda made: made
    """From what `run` gave to all that the operation is about."""


class _Adapter(NamedTuple):
    """A linear layer, as far as the narrow gradients need one."""

    a: Tensor
    b: Tensor
    scaling: float = 2.0


@dataclass
class _Random:
    """Random tensors; the same ones for the same seed."""

    dtype: torch.dtype
    device: str
    seed: int
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.device).manual_seed(self.seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=self.dtype, device=self.device)

    def term(self, T: int, R: int, width: int) -> AdapterTerm:
        """Of an output of this width."""
        return AdapterTerm(self(T, R), self(width, R).t(), 2.0)


def kernel_call(bucket: Bucket, dtype: torch.dtype, *, device: str = "cuda", seed: int = 0) -> KernelCall:
    """The call of `bucket.operation` that its launches are compared on; equal arguments give equal inputs."""
    return _MAKERS[bucket.operation](bucket.sizes, bucket.tokens, _Random(dtype, device, seed))


def _activate(sizes: tuple[int, ...], T: int, random: _Random) -> KernelCall:
    inputs, F, R = sizes
    gate, up = random(T, F), random(T, F) if inputs == 2 else None
    terms = random.term(T, R, F), None if up is None else random.term(T, R, F)
    return KernelCall(
        lambda launches: [adapted.activate(gate, up, "silu", *terms, launches=launches)], (inputs + 1) * gate.nbytes
    )


def _activate_backward(sizes: tuple[int, ...], T: int, random: _Random) -> KernelCall:
    inputs, F, R = sizes
    dact, gate, up = random(T, F), random(T, F), random(T, F) if inputs == 2 else None
    gate_term, up_term = random.term(T, R, F), None if up is None else random.term(T, R, F)
    dact_term = AdapterTerm(random(T, R), random(R, F))

    terms = gate_term, up_term, dact_term
    moved = (2 * inputs + 1) * gate.nbytes
    return KernelCall(
        lambda launches: adapted.activate_backward(dact, gate, up, "silu", *terms, launches=launches), moved
    )


def _add(sizes: tuple[int, ...], T: int, random: _Random) -> KernelCall:
    F, R = sizes
    x, residual, term = random(T, F), random(T, F), random.term(T, R, F)
    return KernelCall(lambda launches: [adapted.add(x, residual, term, 0.5, launches=launches)], 3 * x.nbytes)


def _rotate(sizes: tuple[int, ...], T: int, random: _Random) -> KernelCall:
    q_heads, k_heads, d, R = sizes
    q, k = random(T, q_heads * d), random(T, k_heads * d)
    q_term, k_term = (random.term(T, R, x.shape[1]) if R else None for x in (q, k))
    angles = random(T, d // 2).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()

    def run(launches: Launches) -> list[Tensor]:
        heads = q.view(T, q_heads, d), k.view(T, k_heads, d)
        adapted.rotate_(*heads, cos, sin, q_term, k_term, launches=launches)
        return [q, k]

    return KernelCall(run, 2 * (q.nbytes + k.nbytes))


def _narrow_gradients(sizes: tuple[int, ...], T: int, random: _Random) -> KernelCall:
    *all_widths, R = sizes
    widths = [width for width in all_widths if width]
    dy, low = [random(T, width) for width in widths], random(T, R * len(widths))
    group = [_Adapter(random(R, 1), random(width, R).float()) for width in widths]

    def run(launches: Launches) -> list[Tensor | None]:
        linears: Any = group  # no more of them is read
        dlow, db = lora_linear.narrow_gradients(dy, low, linears, launches=launches)
        return [dlow, *db]

    return KernelCall(run, sum(d.nbytes for d in dy))


def _cross_entropy(sizes: tuple[int, ...], N: int, random: _Random) -> KernelCall:
    (V,) = sizes
    logits = random(N, V)
    targets = torch.randint(0, V, (N,), generator=random.generator, device=random.device)

    def results(made: Sequence[Tensor | None]) -> list[Tensor | None]:
        loss, divisor = made
        # Launches may divide by different numbers; the gradient is the same.
        return [loss, None if divisor is None else logits / divisor.unsqueeze(1)]

    return KernelCall(
        lambda launches: cross_entropy.cross_entropy_(logits, targets, 1.0, launches=launches),
        2 * logits.nbytes,
        results,
    )


_MAKERS: dict[str, Callable[[tuple[int, ...], int, _Random], KernelCall]] = {
    "activate": _activate,
    "activate_backward": _activate_backward,
    "add": _add,
    "rotate": _rotate,
    "narrow_gradients": _narrow_gradients,
    "cross_entropy": _cross_entropy,
}
