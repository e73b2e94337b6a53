"""Does one device compute rightly, and how fast: a matrix product, a copy in its memory, a copy from the host's.

The matrices hold -1, 0 and 1, so that every sum is an integer that bf16 and fp16 hold exactly, in whatever order it is
added: one wrong element is a broken device. The product is checked against a second way to compute it, A (B x) for some
vectors x of -1 and 1 (Freivalds 1977), which finds any single wrong element for sure.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# Short on a CPU, where other processes may take the core away in between.
_SIZES = {"cuda": 8192, "cpu": 256}
_COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 23}
_PINNED_BYTES = 1 << 28
_VECTORS = 4
_ONE_IN = 6  # of six elements one is -1 and one is 1: sums of 8,192 products then stay below 256, bf16's exact range


@dataclass(frozen=True)
class DeviceCheck:
    """What a device did."""

    matmul_flops: float
    """FLOP a second of a square product: bf16 (else fp16) on a GPU, fp32 on a CPU."""
    memory_bytes_per_second: float
    """Read plus written, by a copy: of 1 GiB on a GPU, of 8 MiB on a CPU, which its cache may hold."""
    host_bytes_per_second: float | None
    """From pinned host memory to the device; None on a CPU."""
    exact: bool
    """Whether all elements of the product were right, at the first and at the last repetition."""


def check_device(device: torch.device, seconds: float) -> DeviceCheck:
    """Compute and copy on `device` for about `seconds`."""
    kind, share = device.type, seconds / 3
    size, nbytes = _SIZES[kind], _COPY_BYTES[kind]
    dtype = torch.float32
    if kind == "cuda":
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    generator = torch.Generator(device).manual_seed(0)
    left, right = (_random_signs(_ONE_IN, (size, size), generator, device, dtype) for _ in range(2))
    product = left @ right
    exact = is_product(product, left, right)
    matmul_seconds = best_seconds(lambda: torch.mm(left, right, out=product), share, device)
    exact = exact and is_product(product, left, right)
    source = torch.ones(nbytes // 4, device=device)
    target = torch.empty_like(source)
    memory_seconds = best_seconds(lambda: target.copy_(source), share, device)
    host_rate = None
    if kind == "cuda":
        pinned = torch.ones(_PINNED_BYTES // 4, pin_memory=True)
        part = target[: len(pinned)]
        host_rate = _PINNED_BYTES / best_seconds(lambda: part.copy_(pinned, non_blocking=True), share, device)
    return DeviceCheck(2 * size**3 / matmul_seconds, 2 * nbytes / memory_seconds, host_rate, exact)


def is_product(product: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether `product`, of whole numbers, is left @ right; a wrong one passes only if its errors cancel."""
    generator = torch.Generator(product.device).manual_seed(1)
    shape = (product.shape[1], _VECTORS)
    vectors = _random_signs(2, shape, generator, product.device, torch.float32)
    expected = left.float() @ (right.float() @ vectors)
    return bool(torch.equal(product.float() @ vectors, expected))


def _random_signs(
    one_in: int, shape: tuple[int, int], generator: torch.Generator, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """-1 and 1, each with probability 1 / one_in, else 0."""
    drawn = torch.randint(one_in, shape, generator=generator, device=device, dtype=torch.int8)
    return (drawn == 0).to(dtype) - (drawn == 1).to(dtype)


def best_seconds(action: Callable[[], object], seconds: float, device: torch.device) -> float:
    """The shortest time of one repetition of `action`, over at least three of them and about `seconds`."""
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < until:
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)
