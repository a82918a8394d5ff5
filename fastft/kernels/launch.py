"""What the Triton launchers share: block sizes, warps, and the device that a kernel runs on."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from fastft.errors import BackendError

MAX_ROW_ELEMENTS = 32768
"""The widest row that one program holds; beyond it 1024 threads of 64 registers spill."""

_ELEMENTS_PER_THREAD = 16  # two 128-bit accesses of a 16-bit type: enough bytes in flight, few registers
_WARP = 32
_MIN_DOT = 16
"""The smallest side of a matrix product in Triton."""


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n` (and at least 1): Triton's blocks have such sizes."""
    return 1 << max(0, n - 1).bit_length()


def warps_for(elements: int) -> int:
    """Warps of a program that holds `elements` elements of each tensor: a power of two, 1 to 32."""
    return min(32, max(1, next_power_of_2(elements) // (_ELEMENTS_PER_THREAD * _WARP)))


def row_block(width: int) -> int:
    """The block that holds a whole row of `width` elements.

    Raises:
        BackendError: the row is wider than a program's registers.
    """
    if width > MAX_ROW_ELEMENTS:
        raise BackendError(
            "a row is too wide for the fused kernel",
            got=width, allowed=f"up to {MAX_ROW_ELEMENTS} elements", fix="use the eager backend",
        )  # fmt: skip
    return next_power_of_2(width)


def rank_block(*ranks: int) -> int:
    """The block that holds each of these ranks, as a side of a matrix product."""
    return max(_MIN_DOT, *(next_power_of_2(rank) for rank in ranks))


def unit_stride(x: Tensor) -> Tensor:
    """`x` itself if its last dimension is contiguous (whatever its rows' stride), else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def optional_unit_stride(x: Tensor | None) -> Tensor | None:
    """`unit_stride` of what may not be there."""
    return None if x is None else unit_stride(x)


def place_of(x: Tensor, *, overwrite: bool) -> Tensor:
    """Where a result of `x`'s shape and dtype goes: into `x`, or a new contiguous tensor."""
    return x if overwrite else torch.empty(x.shape, dtype=x.dtype, device=x.device)


def device_guard(x: Tensor) -> AbstractContextManager[object]:
    """Makes `x`'s GPU the current one for a launch: Triton launches on the current GPU, not on the tensors'."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()
