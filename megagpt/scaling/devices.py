"""Accelerators, one row each, and the clusters built of them: what MFU, memory and step time are computed from.

Peaks are dense (without structured sparsity) rates in TFLOP/s from the vendors' data sheets, named with each row: of
the tensor cores for fp8, bf16 and fp16, of the plain cores for fp32, which torch uses by default. They are the
denominator of MFU (model FLOPs utilisation; Chowdhery et al. 2022, appendix B). A device that calls itself by a name
that no row knows has no peak here and its MFU is not reported: CPUs, laptops' chips, slices of a GPU (MIG).
"""

import difflib
import math
import re
from dataclasses import dataclass

from megagpt.errors import UsageError

_GIB = 2**30


def _hbm(gigabytes: float) -> float:
    """Bytes that torch sees of a data sheet's "80 GB", which are GiB: 1.5 % go to ECC's tables and the driver."""
    return 0.985 * gigabytes * _GIB


def _gddr6(gigabytes: float) -> float:
    """The same of workstation cards with GDDR6, whose ECC takes a sixteenth more."""
    return 0.918 * gigabytes * _GIB


_NVLINK_BRIDGE_OR_PCIE = "links: PCIe, as bridges join pairs only"


@dataclass(frozen=True)
class Device:
    """One accelerator model; peaks in TFLOP/s by precision, dense; rates in bytes a second."""

    name: str
    pattern: str
    """Words that torch.cuda.get_device_name() has, in this order, among others."""
    architecture: str
    """The chip's generation, which shares how much of a peak kernels reach."""
    fp8: float | None
    bf16: float | None
    fp16: float | None
    fp32: float
    memory_bytes: float
    """What torch can use of it."""
    memory_bandwidth: float
    """Bytes a second, read plus written."""
    link_bandwidth: float
    """To the other GPUs of its node together: bytes a second in each direction."""
    host_bandwidth: float
    """To the host's memory: bytes a second in each direction."""
    source: str
    aliases: tuple[str, ...] = ()
    """Further names on the command line; case, spaces and hyphens do not count."""

    def peak_flops(self, precision: str) -> float | None:
        """Dense peak in FLOP/s in fp8, bf16, fp16 or fp32; None if the device does not know that format."""
        peak = {"fp8": self.fp8, "bf16": self.bf16, "fp16": self.fp16, "fp32": self.fp32}[precision]
        return peak * 1e12 if peak else None


# The first row whose pattern fits wins, so the special forms stand before the plain ones.
DEVICES = (
    Device("GB300", "GB300", "blackwell", 5000.0, 2500.0, 2500.0, 80.0, _hbm(279), 8.0e12, 900e9, 450e9,
           "NVIDIA GB300 NVL72 data sheet, per GPU; host: NVLink-C2C"),
    Device("GB200", "GB200", "blackwell", 5000.0, 2500.0, 2500.0, 80.0, _hbm(186), 8.0e12, 900e9, 450e9,
           "NVIDIA GB200 NVL72 data sheet, per GPU; host: NVLink-C2C"),
    Device("B200", "B200", "blackwell", 4500.0, 2250.0, 2250.0, 75.0, _hbm(180), 8.0e12, 900e9, 64e9,
           "NVIDIA DGX B200 data sheet, per GPU", ("b200-sxm",)),
    Device("H200 NVL", "H200 NVL", "hopper", 1670.5, 835.5, 835.5, 60.0, _hbm(141), 4.8e12, 64e9, 64e9,
           f"NVIDIA H200 data sheet, NVL; {_NVLINK_BRIDGE_OR_PCIE}"),
    Device("H200", "H200", "hopper", 1978.9, 989.4, 989.4, 66.9, _hbm(141), 4.8e12, 450e9, 64e9,
           "NVIDIA H200 data sheet, SXM", ("h200-sxm",)),
    Device("H100 NVL", "H100 NVL", "hopper", 1670.5, 835.5, 835.5, 60.0, _hbm(94), 3.9e12, 64e9, 64e9,
           f"NVIDIA H100 data sheet, NVL; {_NVLINK_BRIDGE_OR_PCIE}"),
    Device("H100 PCIe", "H100 PCIe", "hopper", 1513.0, 756.0, 756.0, 51.2, _hbm(80), 2.0e12, 64e9, 64e9,
           f"NVIDIA H100 PCIe data sheet; {_NVLINK_BRIDGE_OR_PCIE}"),
    Device("H100 SXM", "H100", "hopper", 1978.9, 989.4, 989.4, 66.9, _hbm(80), 3.35e12, 450e9, 64e9,
           "NVIDIA H100 data sheet, SXM", ("h100", "h100-80gb", "h100-sxm5", "h100-sxm-80gb")),
    Device("A100 PCIe 80GB", "A100 80GB PCIe", "ampere", None, 312.0, 312.0, 19.5, _hbm(80), 1.935e12, 32e9, 32e9,
           f"NVIDIA A100 data sheet, PCIe; {_NVLINK_BRIDGE_OR_PCIE}", ("a100-80gb-pcie",)),
    Device("A100 PCIe 40GB", "A100 PCIE 40GB", "ampere", None, 312.0, 312.0, 19.5, _hbm(40), 1.555e12, 32e9, 32e9,
           f"NVIDIA A100 data sheet of 2020, PCIe; {_NVLINK_BRIDGE_OR_PCIE}", ("a100-40gb-pcie", "a100-pcie")),
    Device("A100 80GB", "A100 80GB", "ampere", None, 312.0, 312.0, 19.5, _hbm(80), 2.039e12, 300e9, 32e9,
           "NVIDIA A100 data sheet, SXM", ("a100-sxm", "a100-sxm-80gb", "a100-sxm4-80gb")),
    Device("A100 40GB", "A100", "ampere", None, 312.0, 312.0, 19.5, _hbm(40), 1.555e12, 300e9, 32e9,
           "NVIDIA A100 data sheet of 2020, SXM", ("a100", "a100-sxm-40gb", "a100-sxm4-40gb")),
    Device("A40", "A40", "ampere", None, 149.7, 149.7, 37.4, _gddr6(48), 696e9, 32e9, 32e9, "NVIDIA A40 data sheet"),
    Device("A30", "A30", "ampere", None, 165.0, 165.0, 10.3, _hbm(24), 933e9, 32e9, 32e9, "NVIDIA A30 data sheet"),
    Device("A10", "A10", "ampere", None, 125.0, 125.0, 31.2, _gddr6(24), 600e9, 32e9, 32e9, "NVIDIA A10 data sheet"),
    Device("L40S", "L40S", "ada", 733.0, 362.1, 362.1, 91.6, _gddr6(48), 864e9, 32e9, 32e9, "NVIDIA L40S data sheet"),
    Device("L40", "L40", "ada", 362.0, 181.1, 181.1, 90.5, _gddr6(48), 864e9, 32e9, 32e9, "NVIDIA L40 data sheet"),
    Device("L4", "L4", "ada", 242.5, 121.0, 121.0, 30.3, _gddr6(24), 300e9, 32e9, 32e9,
           "NVIDIA L4 data sheet, half of the sparse rate"),
    Device("V100", "V100", "volta", None, None, 125.0, 15.7, _hbm(32), 900e9, 150e9, 16e9,
           "NVIDIA V100 data sheet, SXM2 with 32 GB", ("v100-32gb", "v100-sxm2", "v100-sxm2-32gb")),
    Device("RTX 4090", "RTX 4090", "ada", 330.3, 165.2, 165.2, 82.6, _hbm(24), 1008e9, 32e9, 32e9,
           "NVIDIA Ada architecture paper, fp32 accumulation", ("4090",)),
    Device("RTX 3090", "RTX 3090", "ampere", None, 71.0, 71.0, 35.6, _hbm(24), 936e9, 32e9, 32e9,
           "NVIDIA Ampere GA102 architecture paper, fp32 accumulation", ("3090",)),
)  # fmt: skip


def peak_flops(device_name: str, precision: str) -> float | None:
    """Dense peak in FLOP/s of the device that calls itself `device_name`, in bf16, fp16 or fp32; None if unknown."""
    device = recognize(device_name)
    return device.peak_flops(precision) if device else None


def recognize(device_name: str) -> Device | None:
    """The row of the device that torch calls `device_name`; None for slices, laptops' chips and unknown ones."""
    if re.search(r"\b(MIG|Laptop)\b", device_name):
        return None
    for device in DEVICES:
        words = r"\b.*\b".join(map(re.escape, device.pattern.split()))
        if re.search(rf"\b{words}\b", device_name):
            return device
    return None


def find_device(name: str) -> Device:
    """The row that a user means by `h100-sxm`, `A100 80GB` or what torch calls the device.

    Raises UsageError, which names the nearest ones, if there is none.
    """
    names = {_plain(known): device for device in DEVICES for known in (device.name, *device.aliases)}
    device = names.get(_plain(name)) or names.get(_plain(name).removeprefix("nvidia")) or recognize(name)
    if device:
        return device
    near = [names[match] for match in difflib.get_close_matches(_plain(name), names, n=5, cutoff=0.6)]
    listed = dict.fromkeys(_dashed(one.name) for one in near or DEVICES)
    raise UsageError(f"unknown device {name!r}; {'nearest' if near else 'known'}: {', '.join(listed)}")


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal devices. The network is as fast as given whatever the number of nodes (no oversubscription)."""

    device: Device
    gpus_per_node: int
    """GPUs that reach each other at device.link_bandwidth."""
    network_bytes_per_second: float
    """Of a GPU's share of its node's network cards, in each direction."""

    def __post_init__(self) -> None:
        if self.gpus_per_node < 1:
            raise UsageError(f"{self.gpus_per_node} GPUs a node: give 1 or more")
        if not self.network_bytes_per_second > 0:
            raise UsageError(f"a network of {self.network_bytes_per_second} bytes/s: give more than 0")


_UNITS = {"b": 1 / 8, "bit": 1 / 8, "bits": 1 / 8, "B": 1.0, "byte": 1.0, "bytes": 1.0}
_RATE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([kKmMgGtT]?)(bits?|bytes?|b|B)(?:/s|ps)\s*", re.ASCII)


DEFAULT_NETWORK = "400gbps"
"""Of a GPU to other nodes, unless a user says otherwise: one InfiniBand NDR card each."""


def parse_network(text: str) -> float:
    """Bytes a second of `400gbps`, `400 Gbit/s` or `50GB/s`: the rate of one GPU in one direction.

    A small b is a bit, a capital B a byte, prefixes are powers of 1,000. Raises UsageError for anything else.
    """
    found = _RATE.fullmatch(text)
    rate = float(found[1]) * 1000 ** " kmgt".index(found[2].lower() or " ") * _UNITS[found[3]] if found else 0.0
    if not rate or math.isinf(rate):
        raise UsageError(f"network {text!r} is no rate; write 400gbps (bits) or 50GB/s (bytes), of one GPU")
    return rate


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _dashed(name: str) -> str:
    return name.lower().replace(" ", "-")
