"""What tests do to stock PEFT models before they compare with them."""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


def gradients_on(model: Any, batch: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one batch, without a cache: packed documents are seen only so."""
    device = next(model.parameters()).device
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    model.zero_grad()
    loss = model(**moved, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def randomize_adapters(model: Model, seed: int = 2) -> Model:
    """B is zero at first, which hides every error in A's gradient and in what passes through the adapter.

    DoRA's magnitudes stay: they are norms of weights.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def on_device(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch where the model is."""
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}
