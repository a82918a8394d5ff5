"""The table of backends: the same operations, implemented three ways.

    eager    plain PyTorch (`kernels/*/reference.py`), on CPU and GPU
    triton   fused kernels (`kernels/*/triton.py`) where they pay, the reference elsewhere
    peft     stock PEFT: nothing is patched, the baseline

The names and signatures of the operations are in `docs/design.md`.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fastft.errors import BackendError, unknown_choice
from fastft.kernels.launches import DEFAULTS, Launches

if TYPE_CHECKING:
    from fastft.kernels.adapted import Gradients
    from fastft.kernels.dropout import Dropout
    from fastft.kernels.lora_linear.reference import NarrowGradients
    from fastft.kernels.row_statistics import RowStatistics

BACKEND_NAMES = ("eager", "peft", "triton")


class Backend(NamedTuple):
    """The operations that the engine's layer function is written over."""

    name: str
    normalise: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    add_and_normalise: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    normalise_backward: Callable[..., torch.Tensor]
    narrow_gradients: "NarrowGradients"
    activate: Callable[..., torch.Tensor]
    activate_backward: Callable[..., tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]]
    cross_entropy_: Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
    row_statistics: Callable[..., "RowStatistics"]
    activate_adapted: Callable[..., torch.Tensor]
    activate_adapted_backward: Callable[..., "Gradients"]
    add_adapted: Callable[..., torch.Tensor]
    rotate_adapted_: Callable[..., None]
    column_products: Callable[..., torch.Tensor]
    dropout: "Dropout"
    max_rank: int
    """The largest rank for which the adapted ones pay; an adapter of another is added where it is made."""
    launches: Launches = DEFAULTS
    """How their kernels are laid out where that is not the default; eager ones have no kernels."""

    def with_launches(self, launches: Launches) -> "Backend":
        """The same operations, whose kernels are laid out as `launches` says."""
        tunable = TUNABLE if launches and self.name == "triton" else ()
        laid_out: dict[str, Any] = {name: partial(getattr(self, name), launches=launches) for name in tunable}
        return self._replace(launches=launches, **laid_out)


TUNABLE = (
    "narrow_gradients",
    "cross_entropy_",
    "activate_adapted",
    "activate_adapted_backward",
    "add_adapted",
    "rotate_adapted_",
)
"""The operations whose launches `fastft.kernels.launches` declares."""


def _eager() -> Backend:
    from fastft.kernels.activation import reference as activation
    from fastft.kernels.adapted import reference as adapted
    from fastft.kernels.column_products import reference as column_products
    from fastft.kernels.cross_entropy import reference as cross_entropy
    from fastft.kernels.dropout import reference as dropout
    from fastft.kernels.lora_linear import reference as lora_linear
    from fastft.kernels.norm import reference as norm
    from fastft.kernels.row_statistics import reference as row_statistics

    return _collect(
        "eager", norm, lora_linear, activation, cross_entropy, row_statistics, adapted, column_products, dropout, 0
    )


def _triton() -> Backend:
    try:
        from fastft.kernels.activation import triton as activation
        from fastft.kernels.adapted import triton as adapted
        from fastft.kernels.column_products import triton as column_products
        from fastft.kernels.cross_entropy import triton as cross_entropy
        from fastft.kernels.dropout import triton as dropout
        from fastft.kernels.launches import MAX_RANK
        from fastft.kernels.lora_linear import triton as lora_linear
        from fastft.kernels.norm import triton as norm
        from fastft.kernels.row_statistics import triton as row_statistics
    except ImportError as error:
        raise BackendError(
            "backend triton needs the triton package", got=str(error), fix="pip install 'triton>=3.6' on Linux"
        ) from error
    return _collect(
        "triton",
        norm,
        lora_linear,
        activation,
        cross_entropy,
        row_statistics,
        adapted,
        column_products,
        dropout,
        MAX_RANK,
    )


def _collect(
    name: str,
    norm: Any,
    lora_linear: Any,
    activation: Any,
    cross_entropy: Any,
    row_statistics: Any,
    adapted: Any,
    column_products: Any,
    dropout: Any,
    max_rank: int,
) -> Backend:
    from fastft.kernels.dropout import Dropout

    return Backend(
        name,
        norm.normalise,
        norm.add_and_normalise,
        norm.normalise_backward,
        lora_linear.narrow_gradients,
        activation.activate,
        activation.activate_backward,
        cross_entropy.cross_entropy_,
        row_statistics.row_statistics,
        adapted.activate,
        adapted.activate_backward,
        adapted.add,
        adapted.rotate_,
        column_products.column_products,
        Dropout(dropout.masks, dropout.low_rank, dropout.a_gradients, dropout.input_gradient),
        max_rank,
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
