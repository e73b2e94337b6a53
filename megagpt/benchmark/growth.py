"""How the cost of a training step grows with sequence length, depth, width and batch, one at a time.

The points of an axis take turns, so that whatever else the machine does slows all of them. Ideal is time in proportion
to the floating-point operations of a step, from the point that runs at the most of them a second.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megagpt.benchmark.slope import draw_slope
from megagpt.benchmark.train import random_batch
from megagpt.benchmark.turns import machine, take_turns
from megagpt.config.schema import RunConfig
from megagpt.errors import UsageError
from megagpt.model.counts import flops_per_token
from megagpt.training.engine import Engine

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FACTORS = (0.5, 1, 2, 4)
"""Of what the configuration says."""
AXES = ("sequence length", "depth", "width", "batch")
_UNITS = {"sequence length": "tokens", "depth": "layers", "width": "hidden size", "batch": "sequences"}


@dataclass(frozen=True)
class Growth:
    """What one axis cost."""

    axis: str
    sizes: list[int]
    flops: list[int]
    """Of a step."""
    seconds: list[float]
    """Median of a step."""

    @property
    def ideal_seconds(self) -> list[float]:
        """At the highest rate of the points."""
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


def measure_growth(config: RunConfig, steps: int, device: torch.device, report: Callable[[str], None]) -> list[Growth]:
    """All axes, each at FACTORS of `config`, whose batch is one micro-batch. `report` is given a line about each point.

    Raises UsageError for a configuration that cannot be halved.
    """
    if dist.get_world_size() > 1:
        raise UsageError("growth is that of one process; start it without a launcher")
    ladders = {axis: [scaled(config, axis, factor) for factor in FACTORS] for axis in AXES}
    return [_measure(axis, configs, steps, device, report) for axis, configs in ladders.items()]


def as_json(growths: Sequence[Growth], device: torch.device) -> dict[str, Any]:
    """JSON types."""
    points = {
        growth.axis: [
            {"size": size, "flops": flops, "step_seconds": seconds, "ideal_seconds": ideal}
            for size, flops, seconds, ideal in zip(
                growth.sizes, growth.flops, growth.seconds, growth.ideal_seconds, strict=True
            )
        ]
        for growth in growths
    }
    return {"machine": machine(device, "deepspeed"), "axes": points}


def draw(growths: Sequence[Growth], path: Path) -> None:
    """A PNG file with a panel an axis: measured times, and the ideal slope."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 6.4), layout="constrained")
    for axes, growth in zip(figure.subplots(2, 2).flat, growths, strict=True):
        _panel(axes, growth)
    figure.savefig(path, dpi=140)


def _panel(axes: "Axes", growth: Growth) -> None:
    draw_slope(axes, growth.sizes, growth.seconds, growth.ideal_seconds, "as its FLOPs", base=2)
    axes.set_xlabel(f"{growth.axis}, {_UNITS[growth.axis]}")
    axes.set_ylabel("s a step")


def _measure(
    axis: str, configs: list[RunConfig], steps: int, device: torch.device, report: Callable[[str], None]
) -> Growth:
    engines = [Engine(config, config.train.global_batch_size, 1, device) for config in configs]
    contenders: dict[str, Callable[[], object]] = {
        str(number): _step(engine, random_batch(engine.config, device)) for number, engine in enumerate(engines)
    }
    take_turns(contenders, 2)  # compile; let the allocator find its size
    times = [statistics.median(seconds) for seconds in take_turns(contenders, steps).values()]
    for engine in engines:
        engine.close()
    growth = Growth(axis, [_size(config, axis) for config in configs], [_flops(config) for config in configs], times)
    for size, flops, seconds, ideal in zip(growth.sizes, growth.flops, times, growth.ideal_seconds, strict=True):
        report(
            f"{axis} {size:,}: {seconds:.3f} s a step, {flops / seconds / 1e9:,.0f} GFLOP/s, "
            f"{seconds / ideal:.2f} x ideal"
        )
    return growth


def _step(engine: Engine, batch: Any) -> Callable[[], object]:
    return lambda: engine.step([batch], engine.config.optimizer.lr).read()


def _size(config: RunConfig, axis: str) -> int:
    sizes = (config.seq_len, config.model.num_layers, config.model.hidden_size, config.train.global_batch_size)
    return dict(zip(AXES, sizes, strict=True))[axis]


def _flops(config: RunConfig) -> int:
    return flops_per_token(config.model, config.seq_len) * config.seq_len * config.train.global_batch_size


def _whole(value: float, axis: str) -> int:
    if value < 1 or value != int(value):
        raise UsageError(f"{axis}: {value:g} is no size; choose a configuration whose {axis} can be halved")
    return int(value)
