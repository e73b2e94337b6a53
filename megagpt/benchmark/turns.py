"""Contenders that take turns (A B A B ...), so that whatever else the machine does slows all of them."""

import importlib.metadata
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch


def take_turns(contenders: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run of each contender; to wait for a GPU is the contender's matter."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    return times


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """How many times as long theirs took as ours, turn by turn: median, min and max."""
    ratios = [their / our for their, our in zip(theirs, ours, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def machine(device: torch.device, *packages: str) -> dict[str, Any]:
    """What the figures were measured on: processor or GPU, threads, versions of torch and of `packages`."""
    names = ("torch", *packages)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cpus": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        **{name: importlib.metadata.version(name) for name in names},
    }


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second that a compiled loop (the largest element of 512 MiB) reads, at best of 10."""
    source = torch.ones(1 << 27, device=device)
    largest = torch.compile(lambda x: x.amax(), dynamic=False)
    times = []
    for _ in range(10):
        started = time.perf_counter()
        largest(source).item()
        times.append(time.perf_counter() - started)
    return source.nbytes / min(times)


def _processor() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        models = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return models[0] if models else "CPU"
