import pytest

from megagpt.config import check_precision
from megagpt.errors import ConfigError


@pytest.mark.parametrize(
    ("precision", "device", "bf16_supported"),
    [("fp32", "cpu", False), ("bf16", "cpu", False), ("fp16", "cuda", False), ("bf16", "cuda", True)],
)
def test_what_a_device_can_compute_passes(precision, device, bf16_supported):
    check_precision(precision, device, bf16_supported=bf16_supported)


@pytest.mark.parametrize(
    ("precision", "device", "advice"),
    [("fp16", "cpu", "choose bf16 or fp32"), ("bf16", "cuda", "choose fp16 or fp32")],
)
def test_what_a_device_cannot_compute_is_an_error_that_names_what_it_can(precision, device, advice):
    with pytest.raises(ConfigError, match=rf"^train\.precision: {precision} needs a GPU.*{advice}$"):
        check_precision(precision, device, bf16_supported=False)
