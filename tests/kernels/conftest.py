"""How a kernel is judged: against fp64, by what eager PyTorch in the same dtype would have cost."""

from collections.abc import Callable
from importlib import import_module
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fastft.kernels.launches import OPERATIONS, Launch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# ‖x − truth‖ / ‖truth‖ that no implementation may pass, whatever eager PyTorch does.
LIMIT = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# The rule: error ≤ FACTOR · (eager PyTorch's error in that dtype) + SLACK.  SLACK covers exp and rsqrt of the GPU,
# which are a few units in the last place of fp32.
FACTOR = 1.5
SLACK = {torch.float32: 5e-7, torch.float16: 1e-6, torch.bfloat16: 1e-6}
# Triton's interpreter truncates where the GPU rounds fp32 to bf16 to the nearest: twice the error a rounding, and
# biased.  There the rule can only find gross errors; on a GPU it is the same as for the other dtypes.
INTERPRETED_BF16_FACTOR = 4.0

_empty, _empty_like = torch.empty, torch.empty_like
# PyTorch remembers the functions that a device context redirects when it first asks for them: before they are replaced
# below, or `with torch.device("meta")` would go on to allocate real memory in every later test of this process.
with torch.device("cpu"):
    torch.zeros(())


@pytest.fixture(params=["reference", "triton"])
def kernels(request: pytest.FixtureRequest) -> ModuleType:
    """Both implementations of the operation that the test module names in OPERATION."""
    return import_module(f"fastft.kernels.{request.module.OPERATION}.{request.param}")


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return DTYPES[request.param]


@pytest.fixture
def unwritten_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty gives NaN: an output element that nobody wrote cannot look right by luck."""

    def fill(x: Tensor) -> Tensor:
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: fill(_empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: fill(_empty_like(*args, **kwargs)))


@pytest.fixture
def launched_as(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Launch], None]:
    """`launched_as(operation, launch)`: every problem of the operation is launched so."""

    def replace(operation: str, launch: Launch) -> None:
        monkeypatch.setitem(OPERATIONS, operation, OPERATIONS[operation]._replace(default=lambda bucket: launch))

    return replace


@pytest.fixture
def far_rows(device: torch.device) -> Callable[..., Tensor]:
    """Makes random rows whose last one starts past element 2³¹ (on a CPU, only the touched pages exist)."""

    def make(rows: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        row_stride = 2**31 // (rows - 1) + 64
        row_strides = [1]
        for size in reversed(shape[1:]):
            row_strides.insert(0, row_strides[0] * size)
        storage = _empty((rows - 1) * row_stride + row_strides[0] * shape[0], dtype=dtype, device=device)
        x = storage.as_strided((rows, *shape), (row_stride, *row_strides))
        return x.copy_(torch.randn(rows, *shape, dtype=dtype, device=device))

    return make


def relative_error(x: Tensor, truth: Tensor) -> float:
    x, truth = x.double(), truth.double()
    return float(torch.linalg.vector_norm(x - truth) / torch.linalg.vector_norm(truth).clamp_min(1e-300))


@pytest.fixture
def assert_accurate(kernels: ModuleType) -> Callable[[str, Tensor, Tensor, Tensor], None]:
    """`assert_accurate(name, result, eager, truth)`: shape, dtype, no NaN, LIMIT and the rule."""

    def check(name: str, result: Tensor, eager: Tensor, truth: Tensor) -> None:
        assert result.shape == truth.shape, name
        assert result.dtype == eager.dtype, name
        assert result.isfinite().all(), f"{name}: unwritten or not finite"
        if truth.numel() == 0:
            return
        error, eager_error = relative_error(result, truth), relative_error(eager, truth)
        interpreted = kernels.__name__.endswith("triton") and not result.is_cuda
        factor = INTERPRETED_BF16_FACTOR if interpreted and result.dtype == torch.bfloat16 else FACTOR
        assert error <= LIMIT[result.dtype], f"{name}: error {error:.2e} is over the dtype's limit"
        assert error <= factor * eager_error + SLACK[result.dtype], f"{name}: {error:.2e}, eager {eager_error:.2e}"

    return check
