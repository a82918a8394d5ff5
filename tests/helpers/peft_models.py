"""What tests do to stock PEFT models before they compare with them."""

from typing import TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


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
