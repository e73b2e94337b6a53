"""Peak rates of accelerators: the denominator of MFU (model FLOPs utilisation; Chowdhery et al. 2022, appendix B).

Peaks are dense (without structured sparsity) rates in TFLOP/s from the vendors' data sheets, named with each row: of
the tensor cores for bf16 and fp16, of the plain cores for fp32, which torch uses by default. A device that is not in
the table has no peak here and its MFU is not reported: CPUs, laptops' chips of the same names, slices of a GPU (MIG).
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """One accelerator model; peaks in TFLOP/s by precision, dense."""

    name: str
    pattern: str
    """Words that torch.cuda.get_device_name() has, in this order, among others."""
    bf16: float | None
    fp16: float
    fp32: float
    source: str


# The first row whose pattern fits wins, so the special forms stand before the plain ones.
DEVICES = (
    Device("GB200", "GB200", 2500.0, 2500.0, 80.0, "NVIDIA GB200 NVL72 data sheet, per GPU"),
    Device("B200", "B200", 2250.0, 2250.0, 75.0, "NVIDIA DGX B200 data sheet, per GPU"),
    Device("H200 NVL", "H200 NVL", 835.5, 835.5, 60.0, "NVIDIA H200 data sheet, NVL"),
    Device("H200", "H200", 989.4, 989.4, 66.9, "NVIDIA H200 data sheet, SXM"),
    Device("H100 NVL", "H100 NVL", 835.5, 835.5, 60.0, "NVIDIA H100 data sheet, NVL"),
    Device("H100 PCIe", "H100 PCIe", 756.0, 756.0, 51.2, "NVIDIA H100 PCIe data sheet"),
    Device("H100 SXM", "H100", 989.4, 989.4, 66.9, "NVIDIA H100 data sheet, SXM"),
    Device("A100", "A100", 312.0, 312.0, 19.5, "NVIDIA A100 data sheet"),
    Device("A40", "A40", 149.7, 149.7, 37.4, "NVIDIA A40 data sheet"),
    Device("A30", "A30", 165.0, 165.0, 10.3, "NVIDIA A30 data sheet"),
    Device("A10", "A10", 125.0, 125.0, 31.2, "NVIDIA A10 data sheet"),
    Device("L40S", "L40S", 362.1, 362.1, 91.6, "NVIDIA L40S data sheet"),
    Device("L40", "L40", 181.1, 181.1, 90.5, "NVIDIA L40 data sheet"),
    Device("L4", "L4", 121.0, 121.0, 30.3, "NVIDIA L4 data sheet, half of the sparse rate"),
    Device("V100", "V100", None, 125.0, 15.7, "NVIDIA V100 data sheet, SXM2"),
    Device("RTX 4090", "RTX 4090", 165.2, 165.2, 82.6, "NVIDIA Ada architecture paper, fp32 accumulation"),
    Device("RTX 3090", "RTX 3090", 71.0, 71.0, 35.6, "NVIDIA Ampere GA102 architecture paper, fp32 accumulation"),
)


def peak_flops(device_name: str, precision: str) -> float | None:
    """Dense peak in FLOP/s of the device that calls itself `device_name`, in bf16, fp16 or fp32; None if unknown."""
    if re.search(r"\b(MIG|Laptop)\b", device_name):
        return None
    for device in DEVICES:
        words = r"\b.*\b".join(map(re.escape, device.pattern.split()))
        if re.search(rf"\b{words}\b", device_name):
            peak = {"bf16": device.bf16, "fp16": device.fp16, "fp32": device.fp32}[precision]
            return peak * 1e12 if peak else None
    return None
