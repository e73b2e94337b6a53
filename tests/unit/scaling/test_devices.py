"""Peaks are found by the names that torch gives devices."""

import pytest

from megagpt.scaling.devices import DEVICES, peak_flops


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H200", "fp16", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("Tesla V100-SXM2-32GB", "fp16", 125e12),
        ("Tesla V100-SXM2-32GB", "bf16", None),
        ("NVIDIA GeForce RTX 4090", "fp32", 82.6e12),
        ("NVIDIA H200 NVL", "bf16", 835.5e12),
        ("NVIDIA L40", "bf16", 181.1e12),
        ("NVIDIA RTX A4000", "bf16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", "bf16", None),
        ("AMD EPYC", "bf16", None),
    ],
)
def test_peak_by_device_name(name, precision, peak):
    assert peak_flops(name, precision) == peak


def test_no_row_hides_behind_an_earlier_one():
    assert all(peak_flops(f"NVIDIA {device.pattern}", "fp16") == device.fp16 * 1e12 for device in DEVICES)
