"""Contenders that take turns (A B A B ...), so that whatever else the machine does slows all of them."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch


def take_turns(contenders: dict[str, Callable[[], object]], repeats: int, uncounted: int = 0) -> dict[str, list[float]]:
    """Seconds of each run of each contender; to wait for a GPU is the contender's matter.

    uncounted: runs before each one that counts, so that it finds caches and memory as if there were no turns.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            for _ in range(uncounted):
                run()
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    return times


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """How many times as long theirs took as ours, turn by turn: median, min and max."""
    ratios = [their / our for their, our in zip(theirs, ours, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second that torch reads to find the largest element of 512 MiB, at best of 10."""
    source = torch.ones(1 << 27, device=device)
    times = take_turns({"read": lambda: source.max().item()}, 10)["read"]
    return source.nbytes / min(times)
