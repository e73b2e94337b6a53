"""Pictures of a scaling-law study: losses over compute, IsoFLOP curves, best sizes, residuals, the coordinate check.

Sizes and budgets differ by marker and line style as well as by colour: all of it can be read in black and white. Bars
and grey bands are 95 % intervals; what is hollow was held out of the fit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from megagpt.scaling.laws.coordinates import PLACES, Coordinates
from megagpt.scaling.laws.findings import Findings
from megagpt.scaling.laws.ladder import LadderRun
from megagpt.scaling.laws.study import short
from megagpt.scaling.pictures import LINES, MARKERS, StudyPicture
from megagpt.training.plots import Theme, compact

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIZE = (5.6, 3.6)  # inches
_LEGEND_ROW = 0.22


@dataclass(frozen=True)
class Drawn:
    """What the pictures show."""

    findings: Findings
    coordinates: list[Coordinates]
    counted: str
    """What N counts: all, or body."""


def _draw_loss(drawn: Drawn, theme: Theme) -> "Figure | None":
    found = drawn.findings
    if not found.ladder.runs:
        return None
    figure, axes = _figure("Loss over compute")
    held = {one.run.name: one.predicted for one in found.held_out}
    flops = np.array([run.flops for run in found.ladder.runs])
    span = np.geomspace(flops.min() / 1.3, flops.max() * 1.3, 100)
    for number, runs in enumerate(_by_size(found.ladder.runs)):
        color, marker, line = _style(theme, number)
        axes.plot([run.flops for run in runs], [run.loss for run in runs], linestyle="", marker=marker, color=color,
                  markersize=6, zorder=4, label=f"{runs[0].size}, N {compact(runs[0].parameters)}")  # fmt: skip
        hollow = [run for run in runs if run.name in held]
        axes.plot([run.flops for run in hollow], [run.loss for run in hollow], linestyle="", marker=marker, color=color,
                  markersize=6, markerfacecolor="white", zorder=5)  # fmt: skip
        if found.fit:
            near = span[(span > runs[0].flops / 1.3) & (span < runs[-1].flops * 1.3)]
            law = found.fit.law.loss(runs[0].parameters, near / runs[0].flops_per_token)
            axes.plot(near, law, color=color, linestyle=line, linewidth=1.1)
    if found.fit:
        best = [found.fit.law.optimum(one, found.cost).loss for one in span]
        axes.plot(span, best, color=theme.ink, linewidth=2, label="best of all sizes, by the law")
    for run in found.ladder.runs:
        if predicted := held.get(run.name):
            axes.plot([run.flops] * 2, [predicted.low, predicted.high], color=theme.ink, linewidth=0.9, marker="_",
                      markersize=6, zorder=3)  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel="validation loss, nats/token")
    _plain(axes.xaxis, axes.get_xlim(), short)
    _plain(axes.yaxis, axes.get_ylim(), lambda value: f"{value:.3g}")
    _legend(figure, axes)
    return figure


def _draw_isoflops(drawn: Drawn, theme: Theme) -> "Figure | None":
    curves = [curve for curve in drawn.findings.isoflops if curve.runs]
    if not curves:
        return None
    figure, axes = _figure("IsoFLOP curves")
    for number, curve in enumerate(curves):
        color, marker, line = _style(theme, number)
        sizes = np.array([run.parameters for run in curve.runs], dtype=float)
        axes.plot(sizes, [run.loss for run in curve.runs], linestyle="", marker=marker, color=color, markersize=6,
                  label=f"{short(curve.flops)} FLOPs")  # fmt: skip
        if curve.coefficients is None:
            continue
        span = np.geomspace(sizes[0] / 1.1, sizes[-1] * 1.1, 100)
        axes.plot(span, curve.loss(span), color=color, linestyle=line, linewidth=1.2)
        if best := curve.best:
            axes.plot([best.low, best.high], [curve.loss(np.array(best.value))] * 2, color=theme.ink, linewidth=1,
                      marker="|", markersize=7, zorder=4)  # fmt: skip
            axes.plot(best.value, curve.loss(np.array(best.value)), color=theme.ink, marker="*", markersize=12,
                      linestyle="", markerfacecolor="white", zorder=5,
                      label="minimum" if curve is _last_with_minimum(drawn) else None)  # fmt: skip
    axes.set(xscale="log", xlabel=f"parameters N ({drawn.counted})", ylabel="validation loss, nats/token")
    _plain(axes.xaxis, axes.get_xlim(), compact)
    _legend(figure, axes)
    return figure


def _draw_best_size(drawn: Drawn, theme: Theme) -> "Figure | None":
    found = drawn.findings
    if not found.fit:
        return None
    figure, axes = _figure("Best size for a budget")
    flops, sizes = ([getattr(run, name) for run in found.ladder.runs] for name in ("flops", "parameters"))
    most = max([*flops, *(one.flops for one in found.best)])
    span = np.geomspace(min(flops), most, 60)
    optima = [found.fit.optimum(one, found.cost)[0] for one in span]
    axes.fill_between(span, [one.low for one in optima], [one.high for one in optima], color=theme.quiet, alpha=0.22,
                      linewidth=0, label="95 % interval of the law")  # fmt: skip
    axes.plot(span, [one.value for one in optima], color=theme.series[0], linewidth=1.6, label="by the law L(N, D)")
    if found.size_law:
        axes.plot(span, found.size_law.parameters(span), color=theme.series[1], linestyle=LINES[1], linewidth=1.4,
                  label="by the minima of the IsoFLOP curves")  # fmt: skip
    for curve in found.isoflops:
        if best := curve.best:
            axes.plot([curve.flops] * 2, [best.low, best.high], color=theme.series[1], linewidth=1, marker="_")
            axes.plot(curve.flops, best.value, color=theme.series[1], marker="s", markersize=5, linestyle="")
    axes.plot(flops, sizes, linestyle="", marker="x", markersize=4.5, color=theme.quiet, label="runs")
    axes.axvline(max(flops), color=theme.quiet, linewidth=0.8, linestyle=LINES[1])
    axes.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel=f"parameters N ({drawn.counted})")
    low, high = min(one.value for one in optima), max(one.value for one in optima)
    axes.set_ylim(min(low, *sizes) / 3, max(high, *sizes) * 3)
    _plain(axes.xaxis, axes.get_xlim(), short)
    _plain(axes.yaxis, axes.get_ylim(), compact)
    _legend(figure, axes)
    return figure


def _draw_residuals(drawn: Drawn, theme: Theme) -> "Figure | None":
    found = drawn.findings
    if not found.fit:
        return None
    figure, axes = _figure("Residuals")
    axes.axhline(0, color=theme.ink, linewidth=0.8)
    residuals = dict(zip([run.name for run in found.ladder.runs], 100 * np.expm1(found.fit.residuals), strict=True))
    for number, runs in enumerate(_by_size(found.ladder.runs)):
        color, marker, line = _style(theme, number)
        axes.plot([run.flops for run in runs], [residuals[run.name] for run in runs], linestyle=line, linewidth=0.8,
                  marker=marker, markersize=6, color=color, label=runs[0].size)  # fmt: skip
        held = [one for one in found.held_out if one.run.size == runs[0].size]
        axes.plot([one.run.flops for one in held], [100 * (one.run.loss / one.predicted.value - 1) for one in held],
                  linestyle="", marker=marker, markersize=7, color=color, markerfacecolor="white")  # fmt: skip
    axes.set(xscale="log", xlabel="training FLOPs", ylabel="measured loss over the law's, %")
    _plain(axes.xaxis, axes.get_xlim(), short)
    _legend(figure, axes)
    return figure


def _draw_coordinates(drawn: Drawn, theme: Theme) -> "Figure | None":
    if not drawn.coordinates:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2 * 4.0, 3.2), layout="constrained")
    panels = list(figure.subplots(1, len(drawn.coordinates), sharey=True, squeeze=False).reshape(-1))
    titles = {"mup": "muP", "standard": "One learning rate for all widths"}
    for axes, found in zip(panels, drawn.coordinates, strict=True):
        for number, place in enumerate(PLACES):
            color, marker, line = _style(theme, number)
            axes.plot(found.widths, found.changes[place], color=color, marker=marker, linestyle=line, linewidth=1.3,
                      label=place)  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="hidden size", title=titles[found.parametrisation])
        axes.set_xticks(found.widths, [str(width) for width in found.widths])
        axes.set_xticks([], minor=True)
    panels[0].set_ylabel("change of activations, RMS")
    _plain(panels[0].yaxis, panels[0].get_ylim(), lambda value: f"{value:g}")
    _legend(figure, panels[0])
    return figure


PICTURES = (
    StudyPicture(
        "loss",
        "Loss over compute",
        "A marker a run, a line a size: the law fitted to all runs. Hollow runs were held out for the prediction; "
        "their bars are 95 % intervals of what the law of the other runs says of them.",
        _draw_loss,
    ),
    StudyPicture(
        "isoflop",
        "IsoFLOP curves",
        "Runs of the same FLOPs, a parabola in log N through them, and its minimum (star) with its 95 % interval, if "
        "it lies between the sizes.",
        _draw_isoflops,
    ),
    StudyPicture(
        "best_size",
        "Best size for a budget",
        "Right of the dashed vertical line nothing is trained. Squares are minima of IsoFLOP curves with 95 % "
        "intervals.",
        _draw_best_size,
    ),
    StudyPicture(
        "residuals",
        "Residuals",
        "Filled: the runs against the law of all of them. Hollow: held-out runs against the law of the others. A trend "
        "means that the law does not describe the ladder.",
        _draw_residuals,
    ),
    StudyPicture(
        "coordinates",
        "Coordinate check",
        "How far activations are from their initial values after a few steps, by width: muP's do not depend on it.",
        _draw_coordinates,
    ),
)


def _by_size(runs: Sequence[LadderRun]) -> list[list[LadderRun]]:
    """Runs of each size, by tokens."""
    return [[run for run in runs if run.size == size] for size in dict.fromkeys(run.size for run in runs)]


def _last_with_minimum(drawn: Drawn) -> object:
    return [curve for curve in drawn.findings.isoflops if curve.best][-1]


def _style(theme: Theme, number: int) -> tuple[str, str, Any]:
    """Colour, marker and line style of a size, budget or place."""
    return (
        theme.series[number % len(theme.series)],
        MARKERS[number % len(MARKERS)],
        LINES[number % len(LINES)],
    )


def _figure(title: str) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    return figure, axes


def _plain(axis: Any, limits: tuple[float, float], text: Callable[[float], str]) -> None:
    """Numbers in plain digits on a logarithmic axis, about six of them."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

    low, high = limits
    decades = np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8), tuple(np.arange(1, 10, 0.2))):
        ticks = [step * 10**decade for decade in decades for step in steps if low <= step * 10**decade <= high]
        if len(ticks) >= 4:
            break
    axis.set_major_locator(FixedLocator(ticks[:: -(-len(ticks) // 9)]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axis.set_minor_formatter(NullFormatter())


def _legend(figure: "Figure", axes: "Axes") -> None:
    """Below the axes, for which the figure grows."""
    handles, labels = axes.get_legend_handles_labels()
    columns = max(1, min(4, int(figure.get_figwidth() * 12 / (8 + max(map(len, labels))))))
    figure.set_figheight(figure.get_figheight() + _LEGEND_ROW * -(-len(labels) // columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=2.4)
