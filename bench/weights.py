"""The tensors of a model under measurement: the adapter, which every arm starts from equally, and the frozen rest."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastft.errors import MeasureError

if TYPE_CHECKING:
    from torch import Tensor

_ADAPTER_STD = 0.1
"""Of the tensors that start at zero: adapter and frozen weight then contribute in the same order of magnitude."""


def adapter_tensors(model: Any) -> "dict[str, Tensor]":
    """Every trainable tensor of `model` by name, copied to the CPU in its own dtype."""
    return {
        name: parameter.detach().to("cpu", copy=True).contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def load_adapter(model: Any, tensors: "Mapping[str, Tensor]") -> None:
    """Copy `tensors` into the trainable tensors of `model`, in place.

    Raises:
        MeasureError: names or shapes differ: the arms would not train the same thing.
    """
    import torch

    mine = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    wrong = sorted(set(mine) ^ set(tensors)) or [name for name in mine if mine[name].shape != tensors[name].shape]
    if wrong:
        raise MeasureError(
            "the initial adapter does not fit the model", got=f"{len(wrong)} tensors, among them {wrong[0]}",
            fix="use one adapter for one model, rank and set of targets",
        )  # fmt: skip
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(tensors[name])


def base_checksum(model: Any) -> str:
    """A checksum of the frozen weights as they are stored: equal for equal bytes, in whatever order they are summed.

    The sum of the bytes of each tensor (exact in int64 and cheap on a GPU), hashed with the names.
    """
    import torch

    from fastft.files import sha256_of

    sums = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            # As one row: a tensor without dimensions has no last one to view as bytes.
            raw = parameter.detach().contiguous().reshape(1, -1).view(torch.uint8)
            sums[name] = int(raw.sum(dtype=torch.int64))
    return sha256_of(sums)[:16]


def widen_base(source: Any, target: Any) -> None:
    """Copy the frozen weights of `source` into the fp32 model `target`, dequantized where they are quantized."""
    import torch
    from peft.utils.integrations import dequantize_module_weight

    with torch.no_grad():
        for name, parameter in target.named_parameters():
            if parameter.requires_grad:
                continue
            path, _, leaf = name.rpartition(".")
            module = source.get_submodule(path)
            value = dequantize_module_weight(module) if leaf == "weight" else getattr(module, leaf)
            parameter.copy_(value)


def randomise_adapter(model: Any, *, seed: int) -> None:
    """Fill the adapter tensors that start at zero (LoRA's B), so that no gradient is hidden."""
    import torch

    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=random) * _ADAPTER_STD)
