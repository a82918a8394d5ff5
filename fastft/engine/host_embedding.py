"""An embedding whose rows stay in host memory and cross the bus when a token asks for them.

A vocabulary of 128k in 4096 dimensions takes 1 GiB, of which a step reads a few thousand rows.  The weight becomes a
tensor over page-locked host memory that the GPU reads through its own address space: for PyTorch it is a CUDA tensor
like any other, so the embedding's `forward`, `model.device` and `state_dict` stay as they are, and no row needs to be
known on the host first.  Possible where the weight is frozen and nobody else's (a tied head needs it on the device).
"""

import logging
import weakref
from typing import Any

import torch
from torch import nn

log = logging.getLogger("fastft")

_TYPES = {1: "|u1", 2: "<i2", 4: "<i4"}
_MAPPED = 2
"""cudaHostRegisterMapped."""


class _Exposed:
    """Registered host memory under its address on the GPU, in the form that `torch.as_tensor` takes."""

    def __init__(self, host: torch.Tensor) -> None:
        self.host = host
        self.__cuda_array_interface__ = {
            "shape": tuple(host.shape),
            "typestr": _TYPES[host.element_size()],
            "data": (host.data_ptr(), False),
            "strides": None,
            "version": 3,
        }


def is_on_host(embedding: nn.Module) -> bool:
    """Whether `keep_on_host` moved its weight and nobody has replaced it since."""
    weight = embedding.weight
    return isinstance(weight, torch.Tensor) and weight.data_ptr() in _REGISTERED


def why_not_on_host(model: Any) -> str | None:
    """Why the input embedding of a Hugging Face model has to stay on its device, or None where it need not."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding) is not nn.Embedding:
        return f"it is a {type(embedding).__name__}"
    if not embedding.weight.is_cuda:
        return "it is on a CPU"
    if embedding.weight.requires_grad:
        return "it is trained"
    if head is not None and head.weight is embedding.weight:
        return "the head has the same weight"
    return None


def keep_on_host(embedding: nn.Embedding) -> None:
    """Move a frozen CUDA weight (V × D) to host memory; nothing happens if it is there already."""
    if is_on_host(embedding):
        return
    weight = embedding.weight.data
    host = torch.empty(weight.shape, dtype=weight.dtype).copy_(weight)
    runtime = torch.cuda.cudart()
    status = int(runtime.cudaHostRegister(host.data_ptr(), host.nbytes, _MAPPED))
    if status != 0:
        log.warning("the embedding stays on the device: its host memory cannot be page-locked (CUDA error %d)", status)
        return
    exposed = _Exposed(host)
    mapped = torch.as_tensor(exposed, device=weight.device).view(weight.dtype)
    address = host.data_ptr()
    _REGISTERED.add(address)
    # `mapped` holds `exposed`, and that the memory; when the last of them goes, it must no longer be registered.
    weakref.finalize(exposed, _release, address)
    embedding.weight.data = mapped
    del weight
    torch.cuda.empty_cache()  # or the allocator would keep the room that was made


def give_back(embedding: nn.Module) -> None:
    """Move the weight back to the device's own memory, if `keep_on_host` moved it."""
    if is_on_host(embedding):
        embedding.weight.data = embedding.weight.data.clone()  # type: ignore[operator]


_REGISTERED: set[int] = set()
"""Addresses of page-locked memory that stands for a weight."""


def _release(address: int) -> None:
    _REGISTERED.discard(address)
    torch.cuda.cudart().cudaHostUnregister(address)
