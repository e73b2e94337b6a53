"""A picture of how preprocessing's cost grows with the text: the ladder of `linear`, and what each stage takes a MB."""

from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from megagpt.benchmark.corpus_runs import Result
from megagpt.benchmark.slope import draw_slope, finish

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GROUPS = {
    "extract": ("extract",),
    "duplicates": ("exact", "keys", "bands", "clusters", "select"),
    "tokenize": ("proof", "tokenize"),
    "write": ("write", "join"),
    "other": ("other",),
}
_COLORS = ("#1f4e79", "#c0504d", "#7aa6c2", "#d9a441", "0.75")


def draw_linear(linear: Result, path: Path | BinaryIO) -> None:
    """A PNG file of the result of `linear`: seconds beside the ideal slope; seconds a MB, by stages."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    sizes = [round(size, 1) for size in linear["megabytes"]]
    draw_slope(left, sizes, linear["seconds"], linear["ideal_seconds"], "as the text, at the best rate", base=10)
    left.set_ylabel(f"s, {linear['workers']} workers")
    _stack(right, sizes, linear)
    for axes in (left, right):
        axes.set_xlabel("text, MB")
    figure.savefig(path, dpi=140)


def _stack(axes: "Axes", sizes: list[float], linear: Result) -> None:
    stages = linear["stage_seconds"]
    rates = {
        group: [sum(stages[name][place] for name in names if name in stages) / size for place, size in enumerate(sizes)]
        for group, names in _GROUPS.items()
    }
    axes.stackplot(sizes, list(rates.values()), labels=list(rates), colors=_COLORS)
    axes.set_ylabel("s a MB, by stages")
    finish(axes, sizes, base=10)
