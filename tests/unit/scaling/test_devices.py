"""Devices are found by the names that torch gives them and by those that users do; rates of networks are read."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.errors import UsageError
from megagpt.scaling.devices import DEVICES, Cluster, find_device, parse_network, peak_flops, recognize


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4e12),
        ("NVIDIA H100 80GB HBM3", "fp8", 1978.9e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H200", "fp16", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA A100-SXM4-80GB", "fp8", None),
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


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe 80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 PCIe 40GB"),
    ],
)
def test_the_forms_of_a_device_are_told_apart_by_the_names_torch_gives_them(name, row):
    assert recognize(name).name == row


def test_no_row_hides_behind_an_earlier_one():
    assert all(recognize(f"NVIDIA {device.pattern}") is device for device in DEVICES)


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_every_row_is_found_by_each_of_its_names_however_they_are_spelled(device):
    for name in (device.name, *device.aliases):
        for spelled in (name, name.lower().replace(" ", "-"), name.upper().replace("-", " "), f"NVIDIA {name}"):
            assert find_device(spelled) is device


def test_an_unknown_device_is_refused_with_the_nearest_names():
    with pytest.raises(UsageError, match=r"unknown device 'a100-60gb'; nearest: a100-80gb, a100-40gb"):
        find_device("a100-60gb")
    with pytest.raises(UsageError, match=r"known: .*h100-sxm.*v100"):
        find_device("abacus")


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_rows_agree_with_what_holds_for_all_of_these_chips(device):
    assert device.fp16 > device.fp32 / 2
    assert device.fp8 is None or device.fp8 >= 1.99 * device.fp16
    assert (device.fp8 is None) == (device.architecture in ("volta", "ampere"))
    assert 20e9 < device.memory_bytes < 300e9
    # from a few dozen to a few hundred operations a byte: a slip of a power of ten falls out of it
    assert 60 < device.fp16 * 1e12 / device.memory_bandwidth < 450
    assert device.host_bandwidth <= device.link_bandwidth < device.memory_bandwidth


def test_usable_memory_is_a_little_below_what_torch_reports_for_real_cards():
    # torch.cuda.get_device_properties(0).total_memory of an H100 80GB HBM3: 79.1 GiB
    assert 0.98 < find_device("h100").memory_bytes / (79.1 * 2**30) < 1


@pytest.mark.parametrize(
    ("text", "rate"),
    [("400gbps", 50e9), ("400 Gbit/s", 50e9), ("50GB/s", 50e9), ("1.6Tbps", 200e9), ("100Mbps", 12.5e6), ("8bps", 1.0)],
)
def test_rates_of_networks(text, rate):
    assert parse_network(text) == pytest.approx(rate)


@given(st.floats(1e-3, 1e6), st.sampled_from(["", "k", "m", "g", "t", "K", "M", "G", "T"]))
def test_a_byte_is_eight_bits_at_every_prefix(number, prefix):
    assert math.isclose(parse_network(f"{number:f}{prefix}B/s"), 8 * parse_network(f"{number:f}{prefix}bps"))


@pytest.mark.parametrize("text", ["", "400", "fast", "gbps", "-4gbps", "4gb", "0gbps", "1e3gbps", "9" * 400 + "Tbps"])
def test_what_is_no_rate_is_refused(text):
    with pytest.raises(UsageError, match="400gbps"):
        parse_network(text)


def test_impossible_clusters_are_refused():
    with pytest.raises(UsageError, match="GPUs a node"):
        Cluster(find_device("h100"), 0, 50e9)
    with pytest.raises(UsageError, match="network"):
        Cluster(find_device("h100"), 8, 0.0)
