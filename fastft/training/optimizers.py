"""Optimizers by name; each is a library's."""

from collections.abc import Callable, Iterable

import torch

from fastft.errors import BackendError, unknown_choice


def _adamw(parameters: list[torch.nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    # `fused`: one kernel over all adapter matrices instead of several a matrix.
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)


def _adamw_8bit(parameters: list[torch.nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    if not all(p.is_cuda for p in parameters):
        raise BackendError(
            "optimizer adamw_8bit needs a CUDA GPU", got="parameters on the CPU", allowed="adamw", fix="choose adamw"
        )
    import bitsandbytes

    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(parameters, lr=lr, weight_decay=weight_decay)
    return optimizer


OPTIMIZERS: dict[str, Callable[[list[torch.nn.Parameter], float, float], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw_8bit": _adamw_8bit,
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
