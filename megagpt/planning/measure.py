"""This machine as a device of the time model: what its products, passes, copies and collectives reach, in seconds.

Rates are measured in one process with the threads that it has, so on a CPU they are those of a single rank; collectives
among processes started for it, as many as GPUs, or two on a CPU. What cannot be measured in seconds keeps the value
that published runs give: how much of the communication hides, and what compiling saves.
"""

import functools
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megagpt.errors import UserError
from megagpt.planning.efficiency import Efficiency, fitted
from megagpt.planning.work import WEIGHT_BYTES, Product
from megagpt.scaling.device_check import best_seconds, check_device
from megagpt.scaling.devices import Cluster, Device, recognize
from megagpt.scaling.fabric import Fabric

Precision = Literal["bf16", "fp16", "fp32"]

NAME = "this machine"
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_SIZES = {"cuda": (8192, 4096), "cpu": (2048, 512)}
"""Tokens and width of the products: those of training on such a device."""
_HEAD_COLUMNS = 16384
_SEQUENCES = {"cuda": (8, 2048), "cpu": (4, 512)}
_HEADS, _HEAD_DIM = 8, 64
_KERNELS_A_BLOCK = 10
_CPU_RANKS = 2
_TIMEOUT = timedelta(seconds=60)


@dataclass(frozen=True)
class Measured:
    """What step_time needs to know about this machine."""

    cluster: Cluster
    """One node of as many devices as exchanged data; its network is taken to be as fast as its links, and a single
    GPU's links as its memory."""
    efficiency: Efficiency


def measure_device(precision: Precision = "bf16", seconds: float = 10.0) -> Measured:
    """Measure for about `seconds`: the first GPU if there is one, else the CPU.

    Peaks of a GPU that the table knows stay the data sheet's; those of others are the fastest product seen, in the
    given precision only. Raises UserError if processes of this machine cannot exchange data.
    """
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(kind, 0) if kind == "cuda" else torch.device(kind)
    share = seconds / 6
    products = _measure_products(device, precision, share)
    memory = check_device(device, share).memory_bytes_per_second if kind == "cuda" else _copy_rate(device, share)
    fastest = max(product.flops / taken for product, taken in products)
    row = recognize(torch.cuda.get_device_name(device)) if kind == "cuda" else None
    peak = (row.peak_flops(precision) if row else None) or fastest
    ranks = torch.cuda.device_count() if kind == "cuda" else _CPU_RANKS
    links = _measure_links(kind, ranks, share) if ranks > 1 else memory
    measured = row or _unknown_device(device, precision, peak, memory, links)
    measured = replace(measured, name=f"{NAME} ({measured.name})", memory_bandwidth=memory, link_bandwidth=links)
    known = fitted(measured.architecture if row else "ampere")
    efficiency = replace(
        known,
        matmul=_matmul_share(products, peak, memory, WEIGHT_BYTES[precision]),
        attention=_attention_rate(device, precision, share) / peak,
        memory=_passes_rate(device, precision, share) / memory,
        links=1.0,
        overlap=known.overlap if kind == "cuda" else 0.0,
        block_seconds=_KERNELS_A_BLOCK * _kernel_seconds(device),
    )
    return Measured(Cluster(measured, ranks, links), efficiency)


def _unknown_device(device: torch.device, precision: Precision, peak: float, memory: float, links: float) -> Device:
    """A row for a device that the table does not have; only the measured precision has a peak."""
    teraflops = {name: peak / 1e12 if name == precision else None for name in _DTYPES}
    on_gpu = device.type == "cuda"
    memory_bytes = torch.cuda.get_device_properties(device).total_memory if on_gpu else _host_memory()
    return Device(
        name=torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        pattern="",
        architecture="measured",
        fp8=None,
        bf16=teraflops["bf16"],
        fp16=teraflops["fp16"],
        fp32=teraflops["fp32"] or 0.0,
        memory_bytes=memory_bytes,
        memory_bandwidth=memory,
        link_bandwidth=links,
        host_bandwidth=memory,
        source="measured",
    )


def _host_memory() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _measure_products(device: torch.device, precision: Precision, seconds: float) -> list[tuple[Product, float]]:
    """Forward and both backward products of a block's matrices and of an output head, with their seconds."""
    rows, width = _SIZES[device.type]
    shapes = [(width, width), (width, 4 * width), (4 * width, width), (width, _HEAD_COLUMNS)]
    share = seconds / (3 * len(shapes))
    measured = []
    for inner, columns in shapes:
        inputs, weight, gradient = (torch.randn(*shape, device=device, dtype=_DTYPES[precision])
                                    for shape in ((rows, inner), (columns, inner), (rows, columns)))  # fmt: skip
        actions: tuple[tuple[Product, Callable[[], object]], ...] = (
            (Product(rows, inner, columns), functools.partial(F.linear, inputs, weight)),
            (Product(rows, columns, inner), functools.partial(torch.mm, gradient, weight)),
            (Product(columns, rows, inner), functools.partial(torch.mm, gradient.T, inputs)),
        )
        measured += [(product, best_seconds(action, share, device)) for product, action in actions]
    return measured


def _matmul_share(products: list[tuple[Product, float]], peak: float, memory: float, nbytes: int) -> float:
    """The share of the peak with which the model's sum of work and traffic comes nearest to these times."""
    shares = [product.flops / peak / max(taken - product.elements * nbytes / memory, 0.1 * taken)
              for product, taken in products]  # fmt: skip
    return min(1.0, statistics.median(shares))


def _attention_rate(device: torch.device, precision: Precision, seconds: float) -> float:
    """Operations a second of causal attention, forward and backward, counting the needed half of the scores."""
    batch, length = _SEQUENCES[device.type]
    shape = (batch, _HEADS, length, _HEAD_DIM)
    query, key, value = (torch.randn(shape, device=device, dtype=_DTYPES[precision], requires_grad=True)
                         for _ in range(3))  # fmt: skip
    gradient = torch.randn(shape, device=device, dtype=_DTYPES[precision])

    def action() -> None:
        F.scaled_dot_product_attention(query, key, value, is_causal=True).backward(gradient)

    flops = 3 * 4 * batch * _HEADS * _HEAD_DIM * length * (length + 1) / 2
    return flops / best_seconds(action, seconds, device)


def _passes_rate(device: torch.device, precision: Precision, seconds: float) -> float:
    """Bytes a second of element-wise passes as in a block: norm, activation, sum; no cache holds them."""
    rows, width = _SIZES[device.type]
    left, right = (torch.randn(4 * rows, 4 * width, device=device, dtype=_DTYPES[precision]) for _ in range(2))

    def action() -> None:
        F.layer_norm(left, left.shape[1:])
        F.gelu(left)
        left.add(right)

    return (2 + 2 + 3) * left.nbytes / best_seconds(action, seconds, device)


def _copy_rate(device: torch.device, seconds: float) -> float:
    """Bytes a second, read plus written, of a copy that no cache holds."""
    source = torch.ones(1 << 26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best_seconds(lambda: target.copy_(source), seconds, device)


def _kernel_seconds(device: torch.device) -> float:
    """From one operation on hardly any data to the next."""
    one = torch.ones(8, device=device)
    repeats = 200

    def action() -> None:
        for _ in range(repeats):
            one.add_(1.0)

    return best_seconds(action, 0.05, device) / repeats


def _measure_links(kind: str, ranks: int, seconds: float) -> float:
    """Bytes a second of the slowest link in an all-reduce among so many processes of this machine.

    Raises UserError with the last line of what went wrong.
    """
    with tempfile.TemporaryDirectory(prefix="megagpt_links_") as folder:
        try:
            torch.multiprocessing.spawn(_exchange, args=(folder, kind, ranks, seconds), nprocs=ranks)
        except Exception as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f"{ranks} processes of this machine cannot exchange data: {reason}") from error
        busbw: float = json.loads((Path(folder) / "busbw.json").read_text(encoding="utf-8"))
    return busbw


def _exchange(rank: int, folder: str, kind: str, ranks: int, seconds: float) -> None:
    """One of the processes: an all-reduce among all; rank 0 writes its bus bandwidth."""
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=_TIMEOUT,
    )
    measured = Fabric(device, [list(range(ranks))]).within_node(seconds)
    assert measured is not None, "there are several ranks"
    if rank == 0:
        (Path(folder) / "busbw.json").write_text(json.dumps(measured.busbw), encoding="utf-8")
    dist.destroy_process_group()
