"""How the cost of a training step grows with sequence length, depth, width and batch, and falls with ranks.

The points of an axis take turns, so that whatever else the machine does slows all of them. Ideal is time in proportion
to the floating-point operations of a step, from the point that runs at the most of them a second. Ranks are processes
of one thread that share a fixed batch: ideal is the time of one over their number, or over that of the CPUs where those
are fewer. Their points are jobs of their own, in turns too: 1, 2, 3, 4, then back.
"""

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
import torch.distributed as dist

from megagpt.benchmark.fresh import call, joined
from megagpt.benchmark.parts import step_parts
from megagpt.benchmark.slope import draw_slope
from megagpt.benchmark.train import random_batch
from megagpt.benchmark.turns import take_turns
from megagpt.config.schema import RunConfig
from megagpt.data.loader import Batch
from megagpt.errors import UsageError
from megagpt.model.counts import flops_per_token
from megagpt.training.engine import Engine

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FACTORS = (0.5, 1, 2, 4)
"""Of what the configuration says."""
AXES = ("sequence length", "depth", "width", "batch", "ranks")
RANKS = (1, 2, 3, 4)
"""On the axis of ranks."""
_UNITS = {
    "sequence length": "tokens",
    "depth": "layers",
    "width": "hidden size",
    "batch": "sequences",
    "ranks": "processes of one thread",
}
_COLUMNS = 3
"""Panels beside each other."""
_DIVISIBLE = 12
"""What the batch that ranks share is a multiple of."""


@dataclass(frozen=True)
class Growth:
    """What one axis cost."""

    axis: str
    sizes: list[int]
    flops: list[int]
    """Of a step."""
    seconds: list[float]
    """Median of a step."""
    cpus: int = 0
    """Those that ranks share; 0: no axis of ranks."""
    parts: list[dict[str, float]] = field(default_factory=list)
    """Of each point of an axis of ranks: medians of rank 0's seconds in forward (which waits for nobody), in backward
    with the reduction of gradients, and in the update with the gathering of weights."""
    profiles: list[dict[str, float]] = field(default_factory=list)
    """Of each point of another axis, on CPUs: where the seconds of one more step went, as megagpt.benchmark.parts."""

    @property
    def ideal_seconds(self) -> list[float]:
        """At the highest rate of the points; of ranks, the time of the first point shared by those that have a CPU."""
        if self.cpus:
            return [self.seconds[0] * self.sizes[0] / min(size, self.cpus) for size in self.sizes]
        rate = max(flops / seconds for flops, seconds in zip(self.flops, self.seconds, strict=True))
        return [flops / rate for flops in self.flops]


def scaled(config: RunConfig, axis: str, factor: float) -> RunConfig:
    """`config` with one thing changed; width in whole heads of the same size. Raises UsageError where it cannot be."""
    model, train = config.model, config.train
    if axis == "sequence length":
        size = _whole(config.seq_len * factor, axis)
        model = model.model_copy(update={"max_seq_len": size})
        config = config.model_copy(update={"data": config.data.model_copy(update={"seq_len": size})})
    elif axis == "depth":
        model = model.model_copy(update={"num_layers": _whole(model.num_layers * factor, axis)})
    elif axis == "width":
        heads, key_heads = (_whole(n * factor, axis) for n in (model.num_attention_heads, model.kv_heads))
        sizes = {"hidden_size": heads * model.head_dim, "num_attention_heads": heads, "num_kv_heads": key_heads}
        if model.ffn_hidden_size:
            sizes["ffn_hidden_size"] = _whole(model.ffn_hidden_size * factor, axis)
        model = model.model_copy(update=sizes)
    else:
        size = _whole(train.global_batch_size * factor, axis)
        train = train.model_copy(update={"global_batch_size": size})
    return config.model_copy(update={"model": model, "train": train})


def measure_growth(
    config: RunConfig, axes: Sequence[str] | None, steps: int, device: torch.device, report: Callable[[str], None]
) -> list[Growth]:
    """Each of `axes` at FACTORS of `config`, whose batch is one micro-batch. `report` is given a line about each point.

    axes: some of AXES; None: all, without ranks on a GPU. Raises UsageError for others, for a configuration that cannot
    be halved, and for ranks that are no processes on a CPU.
    """
    if dist.get_world_size() > 1:
        raise UsageError("growth is that of one process; start it without a launcher")
    on_cpu = device.type == "cpu"
    axes = [axis for axis in AXES if on_cpu or axis != "ranks"] if axes is None else axes
    if unknown := [axis for axis in axes if axis not in AXES]:
        raise UsageError(f"there is no axis {unknown[0]!r}; choose from {', '.join(AXES)}")
    if "ranks" in axes and not on_cpu:
        raise UsageError("ranks are processes on a CPU here; choose other axes, or set train.device=cpu")
    ladders = {axis: [scaled(config, axis, factor) for factor in FACTORS] for axis in axes if axis != "ranks"}
    found = [_measure(axis, configs, steps, device, report) for axis, configs in ladders.items()]
    return [*found, _measure_ranks(config, steps, report)] if "ranks" in axes else found


def as_json(growths: Sequence[Growth]) -> dict[str, Any]:
    """JSON types."""
    return {"axes": {growth.axis: _points(growth) for growth in growths}}


def _points(growth: Growth) -> list[dict[str, Any]]:
    rows = zip(growth.sizes, growth.flops, growth.seconds, growth.ideal_seconds, strict=True)
    points = [
        {"size": size, "flops": flops, "step_seconds": seconds, "ideal_seconds": ideal}
        for size, flops, seconds, ideal in rows
    ]
    if growth.cpus:
        return [{**point, **parts, "cpus": growth.cpus} for point, parts in zip(points, growth.parts, strict=True)]
    if growth.profiles:
        return [{**point, "parts_seconds": parts} for point, parts in zip(points, growth.profiles, strict=True)]
    return points


def from_json(result: Mapping[str, Any]) -> list[Growth]:
    """What `as_json` was given."""
    return [
        Growth(
            axis,
            sizes=[point["size"] for point in points],
            flops=[point["flops"] for point in points],
            seconds=[point["step_seconds"] for point in points],
            cpus=points[0].get("cpus", 0),
        )
        for axis, points in result["axes"].items()
    ]


def draw(growths: Sequence[Growth], path: Path | BinaryIO) -> None:
    """A PNG file with a panel an axis: measured times, and the ideal slope."""
    from matplotlib.figure import Figure

    # Rows of three; fewer in the last one stand in its middle.
    rows = [growths[start : start + _COLUMNS] for start in range(0, len(growths), _COLUMNS)]
    columns = min(_COLUMNS, len(growths))
    figure = Figure(figsize=(4.3 * columns, 3.4 * len(rows)), layout="constrained")
    grid = figure.add_gridspec(len(rows), 2 * columns)
    for number, row in enumerate(rows):
        left = columns - len(row)
        for place, growth in enumerate(row):
            first = left + 2 * place
            _panel(figure.add_subplot(grid[number, first : first + 2]), growth)
    figure.savefig(path, dpi=140)


def _panel(axes: "Axes", growth: Growth) -> None:
    ideal = "time of 1, shared" if growth.cpus else "as its FLOPs"
    draw_slope(axes, growth.sizes, growth.seconds, growth.ideal_seconds, ideal, base=2)
    if growth.cpus and growth.cpus < max(growth.sizes):
        axes.axvline(growth.cpus, color="0.6", linewidth=0.9, linestyle=":", label=f"{growth.cpus} CPUs")
        axes.legend(frameon=False)
    low, high = (math.log2(limit(growth.seconds + growth.ideal_seconds)) for limit in (min, max))
    axes.set_ylim(2 ** (math.floor(low) - 0.1), 2 ** (math.ceil(high) + 0.1))  # whole powers, which have the ticks
    axes.set_xlabel(f"{growth.axis}, {_UNITS[growth.axis]}")
    axes.set_ylabel("s a step")


def _measure(
    axis: str, configs: list[RunConfig], steps: int, device: torch.device, report: Callable[[str], None]
) -> Growth:
    torch.compiler.reset()  # or all axes' sizes would count against the versions of a block
    engines = [Engine(config, config.train.global_batch_size, 1, device) for config in configs]
    contenders: dict[str, Callable[[], object]] = {
        str(number): _step(engine, random_batch(engine.config, device)) for number, engine in enumerate(engines)
    }
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):  # each size is compiled for itself
        take_turns(contenders, 2)  # compile; let the allocator find its size
    times = [statistics.median(seconds) for seconds in take_turns(contenders, steps).values()]
    profiles = [step_parts(step) for step in contenders.values()] if device.type == "cpu" else []
    for engine in engines:
        engine.close()
    sizes, flops = [_size(config, axis) for config in configs], [_flops(config) for config in configs]
    growth = Growth(axis, sizes, flops, times, profiles=profiles)
    _report(growth, report)
    return growth


def _step(engine: Engine, batch: Batch) -> Callable[[], object]:
    return lambda: engine.step([batch], engine.config.optimizer.lr).read()


def _measure_ranks(config: RunConfig, steps: int, report: Callable[[str], None]) -> Growth:
    size = max(config.train.global_batch_size // _DIVISIBLE, 1) * _DIVISIBLE
    train = config.train.model_copy(update={"global_batch_size": size, "micro_batch_size": None})
    config = config.model_copy(update={"train": train})
    arguments = {"config": config.model_dump(mode="json"), "steps": -(-steps // 2)}
    records: dict[int, list[dict[str, float]]] = {ranks: [] for ranks in RANKS}
    for ranks in (*RANKS, *reversed(RANKS)):
        records[ranks] += call(__name__, "steps_on_rank", arguments, ranks=ranks, threads=1)["steps"]
    medians = [
        {key: statistics.median(record[key] for record in found) for key in found[0]} for found in records.values()
    ]
    seconds = [median.pop("step_seconds") for median in medians]
    flops = [_flops(config)] * len(RANKS)
    growth = Growth("ranks", list(RANKS), flops, seconds, len(os.sched_getaffinity(0)), medians)
    _report(growth, report)
    return growth


def steps_on_rank(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """On each of several new processes: seconds of a run's steps after two, from the moment that all begin each."""
    with joined() as rank:
        config, device = RunConfig.model_validate(arguments["config"]), torch.device("cpu")
        share = config.train.global_batch_size // dist.get_world_size()
        engine = Engine(config, share, 1, device)
        batch = random_batch(config, device)[rank * share : (rank + 1) * share]
        records = [_timed_step(engine, batch) for _ in range(arguments["steps"] + 2)]
        engine.close()
    return {"steps": records[2:]}


def _timed_step(engine: Engine, batch: Batch) -> dict[str, float]:
    dist.barrier()
    started = time.perf_counter()
    numbers = engine.step([batch], engine.config.optimizer.lr).read()
    dist.barrier()
    return {
        "step_seconds": time.perf_counter() - started,
        "forward_seconds": numbers.own_seconds,
        "backward_seconds": numbers.forward_backward_seconds - numbers.own_seconds,
        "optimizer_seconds": numbers.optimizer_seconds,
    }


def _report(growth: Growth, report: Callable[[str], None]) -> None:
    for size, flops, seconds, ideal in zip(
        growth.sizes, growth.flops, growth.seconds, growth.ideal_seconds, strict=True
    ):
        report(
            f"{growth.axis} {size:,}: {seconds:.3f} s a step, {flops / seconds / 1e9:,.0f} GFLOP/s, "
            f"{seconds / ideal:.2f} x ideal"
        )


def _size(config: RunConfig, axis: str) -> int:
    sizes = (config.seq_len, config.model.num_layers, config.model.hidden_size, config.train.global_batch_size)
    return dict(zip(AXES, sizes, strict=False))[axis]


def _flops(config: RunConfig) -> int:
    return flops_per_token(config.model, config.seq_len) * config.seq_len * config.train.global_batch_size


def _whole(value: float, axis: str) -> int:
    if value < 1 or value != int(value):
        raise UsageError(f"{axis}: {value:g} is no size; choose a configuration whose {axis} can be halved")
    return int(value)
