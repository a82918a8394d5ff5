"""Causal attention through PyTorch's own kernels, with an explicit backward.

Each implementation is a pair of functions over what it needs to keep, so that the engine decides what is saved and
what is recomputed.  The operators behind `torch.nn.functional.scaled_dot_product_attention` are called directly
because autograd would save their inputs by itself.  FlexAttention has no such pair: its backward exists only as part
of a graph that `torch.compile` traced together with its forward.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from fastft.errors import unknown_choice
from fastft.kernels.attention import cpu, cuda, generic
from fastft.kernels.attention.layout import Gradients, Saved
from fastft.kernels.attention.seen import Seen


class Attention(NamedTuple):
    """One implementation.

    q and the output are (B, S, H, d), k and v (B, S, K, d) with K a divisor of H; the scores are scale · q·kᵀ.
    `forward(q, k, v, seen, scale)` → (out, saved); `backward(dout, q, k, v, out, saved, seen, scale)` → (dq, dk, dv).
    `usable(q, seen)` says whether both can run such inputs; of q it reads device, dtype, B, S and d.
    """

    name: str
    forward: Callable[..., tuple[torch.Tensor, Saved]]
    backward: Callable[..., Gradients]
    usable: Callable[[torch.Tensor, Seen], bool]


ATTENTION: dict[str, Attention] = {
    "cudnn": Attention("cudnn", cuda.cudnn_forward, cuda.cudnn_backward, cuda.cudnn_usable),
    "flash": Attention("flash", cuda.flash_forward, cuda.flash_backward, cuda.flash_usable),
    "efficient": Attention("efficient", cuda.efficient_forward, cuda.efficient_backward, cuda.efficient_usable),
    "cpu": Attention("cpu", cpu.cpu_forward, cpu.cpu_backward, cpu.cpu_usable),
    "sdpa": Attention("sdpa", generic.sdpa_forward, generic.sdpa_backward, generic.sdpa_usable),
}
"""By name, the preferred first; `auto` takes the first that is usable."""


def choose_attention(name: str, q_BSHd: torch.Tensor, seen: Seen) -> Attention:
    """The implementation called `name`, or the first usable one where it is `auto` or cannot run these inputs.

    Raises:
        ConfigError: the name is unknown.
    """
    if name != "auto":
        if name not in ATTENTION:
            raise unknown_choice("attention", name, [*ATTENTION, "auto"])
        if ATTENTION[name].usable(q_BSHd, seen):
            return ATTENTION[name]
    return next(kernel for kernel in ATTENTION.values() if kernel.usable(q_BSHd, seen))
