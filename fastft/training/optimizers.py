"""Optimizers by name; each is a library's."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from fastft.errors import BackendError, unknown_choice


def _adamw(parameters: list[torch.nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    # `fused`: one kernel over all adapter matrices instead of several a matrix.
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)


def _of_bitsandbytes(name: str, theirs: str) -> Callable[[list[torch.nn.Parameter], float, float], Any]:
    def make(parameters: list[torch.nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
        if not all(p.is_cuda for p in parameters):
            raise BackendError(
                f"optimizer {name} needs a CUDA GPU", got="parameters on the CPU", allowed="adamw", fix="choose adamw"
            )
        import bitsandbytes

        optimizer: torch.optim.Optimizer = getattr(bitsandbytes.optim, theirs)(
            parameters, lr=lr, weight_decay=weight_decay
        )
        return optimizer

    return make


OPTIMIZERS: dict[str, Callable[[list[torch.nn.Parameter], float, float], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw_8bit": _of_bitsandbytes("adamw_8bit", "AdamW8bit"),
    # States of 100,000 elements and more may leave the GPU where memory runs short; matrix by matrix, which is slower.
    "paged_adamw_8bit": _of_bitsandbytes("paged_adamw_8bit", "PagedAdamW8bit"),
}


def make_optimizer(
    name: str, parameters: Iterable[torch.nn.Parameter], *, learning_rate: float, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """The optimizer called `name` over `parameters`.

    Raises:
        ConfigError: unknown name.
        BackendError: it cannot run on the parameters' device.
    """
    if name not in OPTIMIZERS:
        raise unknown_choice("optimizer", name, OPTIMIZERS)
    return OPTIMIZERS[name](list(parameters), learning_rate, weight_decay)
