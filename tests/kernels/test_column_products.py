# T tokens, O columns

from types import ModuleType

import pytest
import torch
from torch.testing import assert_close

OPERATION = "column_products"

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize(("T", "columns"), [(0, 3), (1, 1), (17, 63), (130, 300), (1025, 7)])
def test_against_fp64(T, columns, offset, dtype, device, kernels: ModuleType):
    x_TO, y_TO = (torch.randn(T, columns, device=device).to(dtype) for _ in range(2))
    offset_O = 3 * torch.randn(columns, device=device).to(dtype) if offset else None
    before = x_TO.clone(), y_TO.clone()
    sums_O = kernels.column_products(x_TO, y_TO, offset_O)
    assert torch.equal(x_TO, before[0])
    assert torch.equal(y_TO, before[1])
    assert sums_O.dtype == torch.float32
    expected_O = (x_TO.double() * (y_TO.double() - (0 if offset_O is None else offset_O.double()))).sum(0)
    assert_close(sums_O.double(), expected_O, rtol=1e-5, atol=1e-4)


def test_rows_that_lie_apart(device, kernels: ModuleType):
    x_TO, y_TO = torch.randn(40, 20, device=device)[:, 3:12], torch.randn(9, 40, device=device).t()
    assert_close(kernels.column_products(x_TO, y_TO), (x_TO * y_TO).sum(0), rtol=1e-5, atol=1e-5)
