from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastft.errors import BackendError
from fastft.kernels.launch import (
    MAX_ROW_ELEMENTS,
    device_guard,
    next_power_of_2,
    row_block,
    unit_stride,
    warps_for,
)
from fastft.kernels.launches import Launch


@given(st.integers(1, 2**20))
def test_next_power_of_2_is_the_smallest(n):
    power = next_power_of_2(n)
    assert power & (power - 1) == 0
    assert power / 2 < n <= power


@given(st.integers(1, 2**20))
def test_warps_are_a_power_of_two_that_a_program_may_have(elements):
    warps = warps_for(elements)
    assert warps in {1, 2, 4, 8, 16, 32}
    assert warps == 32 or warps * 32 * 16 >= elements


def test_a_row_fits_its_block_or_is_refused():
    assert row_block(8960) == 16384
    assert row_block(MAX_ROW_ELEMENTS) == MAX_ROW_ELEMENTS
    with pytest.raises(BackendError, match="32769"):
        row_block(MAX_ROW_ELEMENTS + 1)


def test_only_a_strided_last_dimension_is_copied():
    x = torch.arange(24.0).view(4, 6)
    assert unit_stride(x[:, 2:4]).data_ptr() == x[:, 2:4].data_ptr()
    assert unit_stride(x.t()).stride() == (4, 1)
    assert torch.equal(unit_stride(x.t()), x.t())


@given(st.integers(1, 70000), st.integers(1, 20000), st.sampled_from([1, 264, 4096]))
def test_programs_share_all_columns_and_rows(T, F, programs):
    launch = Launch(64, 256, 4, programs)
    (across, down), rows_each = launch.grid(T, F)
    assert (across - 1) * 256 < F <= across * 256
    assert (down - 1) * rows_each < T <= down * rows_each
    assert rows_each % 64 == 0
    assert down == 1 or across * down <= programs


def test_no_guard_off_the_gpu():
    assert isinstance(device_guard(torch.zeros(1)), nullcontext)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_guard_makes_the_tensors_gpu_current():
    with device_guard(torch.zeros(1, device="cuda:1")):
        assert torch.cuda.current_device() == 1
    assert torch.cuda.current_device() == 0
