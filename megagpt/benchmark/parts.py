"""Where the time of a training step on a CPU goes, by what torch's profiler says of one."""

import time
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

PRODUCTS = "matrix products"
BLOCKS = "the blocks' other passes"
LOSS = "the loss's other passes"
OPTIMIZER = "AdamW"
REDUCTION = "reduction and gathering"
STATES = "casts, sums, norms and clipping of weights and gradients"
REST = "Python, DeepSpeed and waiting"
"""Of all ranks for each other, too."""

_PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}
_COLLECTIVES = ("c10d::", "gloo:", "record_param_comms")


def step_parts(step: Callable[[], object]) -> dict[str, float]:
    """Seconds of each part of one step, which must have been compiled before; they add up to the step's own."""
    seconds = dict.fromkeys((PRODUCTS, BLOCKS, LOSS, OPTIMIZER, REDUCTION, STATES, REST), 0.0)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        started = time.perf_counter()
        step()
        whole = time.perf_counter() - started
    for event in profiled.events() or ():
        if event.name.startswith(("aten::", "## Call Compiled", *_COLLECTIVES)):
            seconds[_part(event)] += event.self_cpu_time_total / 1e6
    seconds[REST] = whole - sum(seconds.values())
    return seconds


def _part(event: Any) -> str:
    """Of an event with time of its own."""
    if event.name in _PRODUCTS:
        return PRODUCTS
    above = [event.name]
    while event.cpu_parent is not None:
        event = event.cpu_parent
        above.append(event.name)
    if any(name.startswith(_COLLECTIVES) for name in above):
        return REDUCTION
    if any("_LinearCrossEntropy" in name for name in above):
        return LOSS
    if any(name.startswith("Optimizer.step") for name in above):
        return OPTIMIZER
    if any(name.startswith("## Call Compiled") or "CompiledFunction" in name for name in above):
        return BLOCKS
    return STATES
