"""Pictures of a scaling study: throughput, efficiency, where the time of a step goes, and what is to be expected.

Curves differ by marker and line style as well as by colour, parts of bars by hatching: all of it can be read in black
and white. Bars at points and grey bands are 95% intervals.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from megagpt.scaling.fits import TERMS, Fit
from megagpt.scaling.measurements import PARTS, Curve, Interval, Point
from megagpt.scaling.study import Kind
from megagpt.training.history import TIME_PARTS
from megagpt.training.plots import LIGHT, Picture, Theme, compact, render

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
HATCHES = {"data": "....", "forward-backward": "", "optimizer": "////", "rest of step": "xxxx"}

_PANEL = (4.6, 2.9)  # inches
_MOST_TICKS = 10


@dataclass(frozen=True)
class Drawn:
    """What the pictures show."""

    kind: Kind
    curves: list[Curve]
    fits: dict[str, Fit]
    """By curve, of those that could be fitted."""
    extrapolated: dict[str, list[int]]
    """Numbers of ranks to predict, by curve."""


DrawnT = TypeVar("DrawnT")


@dataclass(frozen=True)
class StudyPicture(Generic[DrawnT]):
    """One kind of picture."""

    name: str
    """Of its file, without .png."""
    title: str
    note: str
    """How to read it."""
    draw: "Callable[[DrawnT, Theme], Figure | None]"
    """Draws it; None: the study has no data for it."""

    def render(self, drawn: DrawnT) -> bytes | None:
        """As a PNG file; None: the study has no data for it."""
        return render(Picture(self.name, self.title, self.note, lambda _, theme: self.draw(drawn, theme)), (), LIGHT)


def _draw_throughput(drawn: Drawn, theme: Theme) -> "Figure | None":
    if not drawn.curves:
        return None
    figure, (axes,) = _panels(1)
    axes.set(xlabel="ranks", ylabel="tokens/s", title="Throughput", yscale="log")
    for number, curve in enumerate(drawn.curves):
        _points(axes, curve, [point.tokens_per_second for point in curve.points], theme, number, len(drawn.curves))
        ranks = np.array([point.ranks for point in curve.points])
        rate = curve.base.tokens_per_second.value / curve.base.ranks
        axes.plot(ranks, rate * ranks, color=theme.quiet, linewidth=0.8, linestyle=":",
                  label="ideal" if curve is drawn.curves[-1] else None, zorder=1)  # fmt: skip
    _scale_ranks(axes, [point.ranks for curve in drawn.curves for point in curve.points])
    _scale_plain(axes, lambda value: compact(value))
    _legend(figure, axes)
    return figure


def _draw_efficiency(drawn: Drawn, theme: Theme) -> "Figure | None":
    if not any(len(curve.points) > 1 for curve in drawn.curves):
        return None
    figure, (axes,) = _panels(1)
    axes.set(xlabel="ranks", ylabel="tokens/s of a rank, % of ideal", title="Efficiency")
    axes.axhline(100, color=theme.quiet, linewidth=0.8, linestyle=":", label="ideal", zorder=1)
    highest = 100.0
    for number, curve in enumerate(drawn.curves):
        shares = [_scaled(curve.efficiency(point), 100) for point in curve.points]
        _points(axes, curve, shares, theme, number, len(drawn.curves))
        highest = max([highest, *(share.value for share in shares), *(min(share.high, 150.0) for share in shares)])
    _scale_ranks(axes, [point.ranks for curve in drawn.curves for point in curve.points])
    axes.set_ylim(0, 1.06 * highest)
    _legend(figure, axes)
    return figure


def _draw_time(drawn: Drawn, theme: Theme) -> "Figure | None":
    """Stacked bars, a panel a curve."""
    if not drawn.curves:
        return None
    from matplotlib.patches import Patch
    from matplotlib.patheffects import Normal, Stroke

    figure, all_axes = _panels(len(drawn.curves))
    for axes, curve in zip(all_axes, drawn.curves, strict=True):
        places = np.arange(len(curve.points))
        bottom = np.zeros(len(places))
        for part in PARTS:
            seconds = np.array([point.parts[part] for point in curve.points])
            axes.bar(places, seconds, 0.62, bottom=bottom, **_part_style(part, theme))
            bottom += seconds
        for place, point in zip(places, curve.points, strict=True):
            ideal = _ideal_seconds(drawn.kind, curve, point.ranks)
            axes.plot([place - 0.4, place + 0.4], [ideal, ideal], color=theme.ink, linewidth=1.8,
                      path_effects=[Stroke(linewidth=4, foreground=theme.paper), Normal()])  # fmt: skip
        axes.set_xticks(places, [str(point.ranks) for point in curve.points])
        axes.grid(visible=False, axis="x")
        axes.set(xlabel="ranks", ylabel="seconds/step", title=curve.name)
    patches = [Patch(**_part_style(part, theme)) for part in PARTS]
    _legend_below(figure, [*patches, all_axes[0].lines[0]], [*PARTS, "ideal"])
    return figure


def _draw_prediction(drawn: Drawn, theme: Theme) -> "Figure | None":
    """Time of a step, measured, fitted and extrapolated; a panel a curve."""
    curves = [curve for curve in drawn.curves if curve.name in drawn.fits]
    if not curves:
        return None
    figure, all_axes = _panels(len(curves))
    for axes, curve in zip(all_axes, curves, strict=True):
        fit, measured = drawn.fits[curve.name], [point.ranks for point in curve.points]
        predicted = drawn.extrapolated[curve.name]
        ranks = np.geomspace(measured[0], max([*measured, *predicted]), 60)
        seconds = fit.seconds(list(ranks))
        axes.fill_between(ranks, [one.low for one in seconds], [one.high for one in seconds], color=theme.quiet,
                          alpha=0.22, linewidth=0, label="95 % interval")  # fmt: skip
        axes.plot(ranks, [one.value for one in seconds], color=theme.series[0], linewidth=1.5, label="fit")
        if fit.amdahl:
            law = sum(c * TERMS[term](ranks) for term, c in fit.amdahl.coefficients.items())
            axes.plot(ranks, law, color=theme.series[1], linewidth=1.2, linestyle=LINES[1], label="Amdahl's law")
        ideal = [_ideal_seconds(drawn.kind, curve, one) for one in ranks]
        axes.plot(ranks, ideal, color=theme.quiet, linewidth=0.8, linestyle=":", label="ideal")
        _error_bars(axes, curve.points, [point.step_seconds.interval for point in curve.points], theme.ink, "o", "")
        axes.lines[-1].set_label("measured")
        if max(predicted, default=0) > measured[-1]:
            axes.axvline(measured[-1], color=theme.quiet, linewidth=0.8, linestyle=LINES[1])
        axes.set(xlabel="ranks", ylabel="seconds/step", title=curve.name)
        if drawn.kind == "strong":
            axes.set_yscale("log")
            axes.set_ylim(bottom=0.6 * min(one.low for one in seconds))
            _scale_plain(axes, lambda value: f"{value:g}")
        else:
            axes.set_ylim(0, 1.5 * max(one.value for one in seconds))
        _scale_ranks(axes, [*measured, *predicted])
    _legend(figure, all_axes[0])
    return figure


PICTURES = (
    StudyPicture(
        "throughput",
        "Throughput",
        "Both axes are logarithmic. Ideal: the tokens/s of a rank stay those on the smallest number of ranks.",
        _draw_throughput,
    ),
    StudyPicture(
        "efficiency",
        "Efficiency",
        "Tokens/s of a rank, relative to the smallest measured number of ranks.",
        _draw_efficiency,
    ),
    StudyPicture(
        "time",
        "Where the time of a step goes",
        "Means of all measured steps. Communication is part of forward-backward (reduction of gradients) and of "
        "optimizer (gathering of weights); rest of step is what the metrics do not split further.",
        _draw_time,
    ),
    StudyPicture(
        "prediction",
        "Measured, fitted, extrapolated",
        "Right of the dashed vertical line nothing is measured. The band holds the errors of the measured times and "
        "the doubt about the form of the law; not what another network or another number of GPUs a node would do.",
        _draw_prediction,
    ),
)


def _ideal_seconds(kind: Kind, curve: Curve, ranks: float) -> float:
    seconds = curve.base.step_seconds.value
    return seconds * curve.base.ranks / ranks if kind == "strong" else seconds


def _scaled(interval: Interval, factor: float) -> Interval:
    return Interval(factor * interval.value, factor * interval.low, factor * interval.high)


def _panels(count: int) -> "tuple[Figure, list[Axes]]":
    """A figure of so many axes, in two columns if there are several."""
    from matplotlib.figure import Figure

    columns = 1 if count == 1 else 2
    rows = -(-count // columns)
    figure = Figure(figsize=(max(_PANEL[0] * columns, 5.4), _PANEL[1] * rows), layout="constrained")
    all_axes = list(figure.subplots(rows, columns, squeeze=False).reshape(-1))
    for axes in all_axes[count:]:
        axes.remove()
    return figure, all_axes[:count]


def _points(axes: "Axes", curve: Curve, values: Sequence[Interval], theme: Theme, number: int, count: int) -> None:
    """A curve with error bars; curves stand a little beside each other, so that their bars do."""
    aside = 1.025 ** (number - (count - 1) / 2)
    color, marker = theme.series[number % len(theme.series)], MARKERS[number % len(MARKERS)]
    line: Any = LINES[number % len(LINES)]
    _error_bars(axes, curve.points, values, color, marker, line, aside)
    axes.lines[-1].set_label(curve.name)


def _error_bars(
    axes: "Axes",
    points: Sequence[Point],
    values: Sequence[Interval],
    color: str,
    marker: str,
    line: Any,
    aside: float = 1.0,
) -> None:
    """Markers, hollow where the ranks shared CPU cores, joined by a line."""
    ranks = [aside * point.ranks for point in points]
    for place, value in zip(ranks, values, strict=True):
        axes.plot([place, place], [value.low, value.high], color=color, linewidth=1, marker="_", markersize=5)
    hollow = [place for place, point in enumerate(points) if point.shared_cores]
    axes.plot([ranks[place] for place in hollow], [values[place].value for place in hollow], color=color, linestyle="",
              marker=marker, markersize=6, markerfacecolor="white", zorder=4)  # fmt: skip
    axes.plot(ranks, [value.value for value in values], color=color, linestyle=line, linewidth=1.3, marker=marker,
              markersize=5)  # fmt: skip


def _part_style(part: str, theme: Theme) -> dict[str, Any]:
    color = theme.parts[TIME_PARTS.index(part)]
    return {"facecolor": color, "hatch": HATCHES[part], "edgecolor": theme.ink, "linewidth": 0.6}


def _scale_ranks(axes: "Axes", ranks: Sequence[int]) -> None:
    """A logarithmic axis with the numbers of ranks on it; of many, those that are furthest apart."""
    axes.set_xscale("log")
    known = sorted(set(ranks))
    step = -(-len(known) // _MOST_TICKS)
    shown = known[:: step or 1]
    axes.set_xticks(shown, [str(rank) for rank in shown])
    axes.set_xticks([], minor=True)
    axes.set_xlim(known[0] / 1.25, known[-1] * 1.25)


def _scale_plain(axes: "Axes", text: Callable[[float], str]) -> None:
    """Numbers in plain digits on a logarithmic y-axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_ylim()
    subs = (1.0, 2.0, 5.0) if high / low < 300 else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _legend(figure: "Figure", axes: "Axes") -> None:
    handles, labels = axes.get_legend_handles_labels()
    _legend_below(figure, handles, labels)


def _legend_below(figure: "Figure", handles: Sequence[Any], labels: Sequence[str]) -> None:
    """A legend for which the figure grows, so that the axes keep their height."""
    columns = max(1, int(figure.get_figwidth() * 12 / (8 + max(map(len, labels)))))
    columns = min(columns, 4)
    figure.set_figheight(figure.get_figheight() + 0.22 * -(-len(labels) // columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=2.4)
