"""A device that computes wrongly is found, whichever element is wrong."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.scaling.device_check import check_device, is_product


def test_a_device_that_computes_rightly_passes_with_finite_speeds():
    found = check_device(torch.device("cpu"), 0.2)
    assert found.exact
    assert 1e8 < found.matmul_flops < 1e14
    assert 1e7 < found.memory_bytes_per_second < 1e13
    assert found.host_bytes_per_second is None


@settings(max_examples=30, deadline=None)
@given(row=st.integers(0, 63), column=st.integers(0, 47), error=st.sampled_from([-4.0, -1.0, 1.0, 128.0]))
def test_any_single_wrong_element_is_found(row, column, error):
    torch.manual_seed(0)
    left, right = torch.randint(-1, 2, (64, 32)).float(), torch.randint(-1, 2, (32, 48)).float()
    product = left @ right
    assert is_product(product, left, right)
    product[row, column] += error
    assert not is_product(product, left, right)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_in_half_precision_are_exact_however_they_are_added(dtype):
    torch.manual_seed(0)
    left, right = ((torch.randint(6, (256, 256)) % 6).eq(0).to(dtype) for _ in range(2))
    assert is_product(left @ right, left, right)
