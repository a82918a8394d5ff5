"""The table of backends: the same operations, implemented three ways.

    eager    plain PyTorch (`kernels/*/reference.py`), on CPU and GPU
    triton   fused kernels (`kernels/*/triton.py`) where they pay, the reference elsewhere
    peft     stock PEFT: nothing is patched, the baseline

The names and signatures of the operations are in `docs/design.md`.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fastft.errors import BackendError, unknown_choice

BACKEND_NAMES = ("eager", "peft", "triton")


class Backend(NamedTuple):
    """The operations that the engine's layer function is written over."""

    name: str
    rms_norm: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    add_rms_norm: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    rms_norm_backward: Callable[..., torch.Tensor]
    swiglu: Callable[..., torch.Tensor]
    swiglu_backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    rope_: Callable[..., torch.Tensor]
    cross_entropy_: Callable[..., torch.Tensor]


def _eager() -> Backend:
    from fastft.kernels.cross_entropy import reference as cross_entropy
    from fastft.kernels.rms_norm import reference as rms_norm
    from fastft.kernels.rope import reference as rope
    from fastft.kernels.swiglu import reference as swiglu

    return _collect("eager", rms_norm, swiglu, rope, cross_entropy)


def _triton() -> Backend:
    try:
        from fastft.kernels.cross_entropy import triton as cross_entropy
        from fastft.kernels.rms_norm import triton as rms_norm
        from fastft.kernels.rope import triton as rope
        from fastft.kernels.swiglu import triton as swiglu
    except ImportError as error:
        raise BackendError(
            "backend triton needs the triton package", got=str(error), fix="pip install 'triton>=3.6' on Linux"
        ) from error
    return _collect("triton", rms_norm, swiglu, rope, cross_entropy)


def _collect(name: str, rms_norm: Any, swiglu: Any, rope: Any, cross_entropy: Any) -> Backend:
    return Backend(
        name,
        rms_norm.rms_norm,
        rms_norm.add_rms_norm,
        rms_norm.rms_norm_backward,
        swiglu.swiglu,
        swiglu.swiglu_backward,
        rope.rope_,
        cross_entropy.cross_entropy_,
    )


BACKENDS: dict[str, Callable[[], Backend]] = {"eager": _eager, "triton": _triton}
"""Loaded on first use.  `peft` has no operations: it is the absence of a patch."""

_loaded: dict[str, Backend] = {}


def load_backend(name: str) -> Backend:
    """The operations of backend `name` (eager or triton).

    Raises:
        BackendError: unknown, or its package is missing, or it needs a GPU and there is none.
    """
    if name not in BACKENDS:
        raise unknown_choice("backend", name, BACKENDS, BackendError)
    if name == "triton" and not triton_can_run():
        raise BackendError(
            "backend triton needs a CUDA GPU", got="none found", allowed="eager, peft", fix="choose backend eager"
        )
    if name not in _loaded:
        _loaded[name] = BACKENDS[name]()
    return _loaded[name]


def triton_can_run() -> bool:
    """Whether Triton's kernels can run here: on a GPU, or in the interpreter that the tests use."""
    return torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
