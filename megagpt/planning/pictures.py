"""Pictures of a plan as PNG: memory and time by part, throughput over GPUs. All can be read in black and white."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megagpt.planning.plan import Plan
from megagpt.planning.search import CurvePoint
from megagpt.training.plots import LIGHT, Picture, Theme, compact, render

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GIB = 2**30
_STYLES: dict[str, tuple[str, Any]] = {"strong": ("o", "-"), "weak": ("s", (0, (5, 1.5)))}


@dataclass(frozen=True)
class Drawing:
    """A picture and what to say below it."""

    title: str
    note: str
    png: bytes


def draw_memory(plan: Plan, names: Mapping[str, str]) -> Drawing:
    """A bar a part, and the device's memory."""
    memory, device = plan.memory, plan.machine.cluster.device

    def draw(theme: Theme) -> "Figure":
        figure, axes = _figure(5.0 + 2.6, 0.27 * len(memory.parts) + 1.6)
        rows = [(names[name], size / _GIB, 0) for name, size in memory.parts.items() if size]
        rows += [("peak", memory.peak / _GIB, 1), ("peak and margin", memory.total / _GIB, 1)]
        _bars(axes, rows, theme)
        limit = device.memory_bytes / _GIB
        axes.axvline(limit, color=theme.ink, linewidth=1.2, linestyle=(0, (5, 1.5)))
        axes.annotate(f"{device.name}: {limit:.3g} GiB", (limit, 0), xytext=(-4, 14), textcoords="offset points",
                      ha="right", va="bottom", fontsize=8)  # fmt: skip
        axes.set_xlabel("GiB of a GPU")
        axes.set_xlim(0, 1.08 * max(limit, memory.total / _GIB))
        return figure

    note = f"Each part at its own largest; they do not all exist at once. The peak is at: {memory.moment}."
    return _drawing("Memory of a GPU", note, draw)


def draw_time(plan: Plan, names: Mapping[str, str]) -> Drawing:
    """A bar a part."""
    parts = {name: seconds for name, seconds in plan.time.parts.items() if seconds}
    scale, unit = (1.0, "s") if plan.time.total >= 1 else (1000.0, "ms")

    def draw(theme: Theme) -> "Figure":
        figure, axes = _figure(5.0 + 2.6, 0.27 * len(parts) + 1.2)
        _bars(axes, [(names.get(name, name), scale * seconds, 0) for name, seconds in parts.items()], theme)
        axes.set_xlabel(f"{unit} of a step")
        axes.set_xlim(0, 1.12 * scale * max(parts.values()))
        return figure

    return _drawing(
        "Time of a step", "Parts add up; communication counts as far as computation does not hide it.", draw
    )


def draw_curves(curves: Mapping[str, Sequence[CurvePoint]]) -> Drawing:
    """Throughput and efficiency over GPUs, strong and weak."""

    def draw(theme: Theme) -> "Figure":
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9.2, 3.3), layout="constrained")
        throughput, efficiency = figure.subplots(1, 2)
        for number, (kind, points) in enumerate(curves.items()):
            _curve(throughput, efficiency, kind, points, theme.series[number], theme)
        counts = sorted({point.gpus for points in curves.values() for point in points})
        for axes in (throughput, efficiency):
            axes.set_xscale("log")
            axes.set_xticks(counts, [f"{count:,}" for count in counts])
            axes.set_xticks([], minor=True)
            axes.set_xlabel("GPUs")
        throughput.set_yscale("log")
        throughput.set_ylabel("tokens/s")
        _plain(throughput)
        efficiency.set_ylabel("efficiency, % of the fewest GPUs'")
        efficiency.set_ylim(0, 109)
        efficiency.axhline(100, color=theme.quiet, linewidth=0.8, linestyle=":", label="ideal", zorder=1)
        handles, labels = efficiency.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
        return figure

    note = "Strong: the same batch on all. Weak: a batch that grows with the GPUs. Dotted: as fast a GPU as the fewest."
    return _drawing("Scaling", note, draw)


def _curve(
    throughput: "Axes", efficiency: "Axes", kind: str, points: Sequence[CurvePoint], color: str, theme: Theme
) -> None:
    known = [(point.gpus, point.time.tokens_per_second_per_gpu) for point in points if point.time]
    if not known:
        return
    marker, line = _STYLES[kind]
    gpus, first = [count for count, _ in known], known[0][1]
    style = {"color": color, "marker": marker, "linestyle": line, "linewidth": 1.3, "markersize": 5}
    throughput.plot(gpus, [count * rate for count, rate in known], label=f"{kind} scaling", **style)
    throughput.plot(gpus, [count * first for count in gpus], color=theme.quiet, linewidth=0.8, linestyle=":", zorder=1)
    efficiency.plot(gpus, [100 * rate / first for _, rate in known], label=f"{kind} scaling", **style)


def _figure(width: float, height: float) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _bars(axes: "Axes", rows: Sequence[tuple[str, float, int]], theme: Theme) -> None:
    """Bars with their numbers; those of kind 1 are sums and hatched."""
    places = range(len(rows))
    for place, (_, value, kind) in zip(places, rows, strict=True):
        axes.barh(place, value, 0.62, color=theme.paper if kind else theme.series[0], edgecolor=theme.ink,
                  linewidth=0.6, hatch="////" if kind else "")  # fmt: skip
        axes.annotate(
            f"{value:.3g}", (value, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.set_yticks(list(places), [name for name, _, _ in rows])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")


def _plain(axes: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _drawing(title: str, note: str, draw: "Callable[[Theme], Figure]") -> Drawing:
    png = render(Picture(title, title, note, lambda _, theme: draw(theme)), (), LIGHT)
    assert png is not None
    return Drawing(title, note, png)
