"""Pictures of a simulation: where the time goes, goodput over the checkpoint interval and over spares, progress.

All can be read in black and white; bars at points are 95 % intervals over the runs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from megagpt.planning.simulation.job import PARTS
from megagpt.planning.simulation.study import DAY, Outcome, Simulation, Sweep
from megagpt.scaling.measurements import Interval
from megagpt.training.plots import LIGHT, Picture, Theme, render

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HATCHES = ("", "....", "\\\\\\\\", "////", "xxxx", "----", "||", "oo", "++++")
_LINES: tuple[Any, ...] = ((0, (1.5, 1.2)), (0, (5, 1.5)), (0, (6, 1.5, 1.5, 1.5)), "-")
_MINUTE = 60.0
_DOTS = {"linestyle": "", "markersize": 5}


@dataclass(frozen=True)
class Drawing:
    """A picture, the name of its file without .png, and what to say below it."""

    name: str
    title: str
    note: str
    png: bytes


def draw(simulation: Simulation) -> list[Drawing]:
    """All of them, with sweeps."""
    return [
        _drawing("time", "Where the time goes",
                 "Means of all runs. Below: what is not training, of the scenarios with spares if there are any.",
                 lambda theme: _draw_time(simulation, theme)),
        _drawing("interval", "Goodput over the time between checkpoints",
                 "Hollow: runs as the closed form assumes them. Full: under the conditions of this simulation. "
                 "Dashed, vertical: the closed form's best, with asynchronous saving at least the time of writing.",
                 lambda theme: _draw_intervals(simulation.sweeps, theme)),
        _drawing("spares", "Goodput over spare nodes",
                 f"{_saved(simulation)} checkpoints. Of all nodes: spares count as nodes that could have trained.",
                 lambda theme: _draw_spares(simulation, theme)),
        _drawing("progress", "Progress of one run",
                 "The first run of each scenario; all meet the same failures. Thin: without any loss.",
                 lambda theme: _draw_progress(simulation, theme)),
    ]  # fmt: skip


def _draw_time(simulation: Simulation, theme: Theme) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    outcomes = simulation.outcomes
    spared = [outcome for outcome in outcomes if outcome.scenario.job.spares] or outcomes
    rows = len(outcomes) + len(spared)
    figure = Figure(figsize=(9.2, 0.42 * rows + 2.6), layout="constrained")
    whole, rest = figure.subplots(2, 1, height_ratios=[len(outcomes), len(spared)])
    _stack(whole, outcomes, PARTS, theme)
    whole.set(xlim=(0, 100), xlabel="% of the time")
    _stack(rest, spared, PARTS[1:], theme)
    lost = max(100 * (1 - outcome.goodput.value) for outcome in spared)
    rest.set(xlim=(0, 1.25 * lost or 1.0), xlabel="% of the time, training left out")
    used = [part for part in PARTS if any(outcome.parts[part].value > 0 for outcome in outcomes)]
    figure.legend([Patch(**_part_style(part, theme)) for part in used], used, loc="outside lower center", ncols=4)
    return figure


def _stack(axes: "Axes", outcomes: Sequence[Outcome], parts: Sequence[str], theme: Theme) -> None:
    for place, outcome in enumerate(outcomes):
        left, shares = 0.0, outcome.parts
        for part in parts:
            share = 100 * max(0.0, shares[part].value)
            axes.barh(place, share, 0.62, left=left, **_part_style(part, theme))
            left += share
        if parts[0] != PARTS[0]:
            axes.annotate(f"{left:.3g} %", (left, place), xytext=(4, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(outcomes)), [outcome.scenario.name for outcome in outcomes])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")


def _part_style(part: str, theme: Theme) -> dict[str, Any]:
    place = PARTS.index(part)
    colors = (theme.paper, *theme.series[:6], theme.grid, theme.series[6])
    return {"facecolor": colors[place], "hatch": _HATCHES[place], "edgecolor": theme.ink, "linewidth": 0.6}


def _draw_intervals(sweeps: Sequence[Sweep], theme: Theme) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 3.5), layout="constrained")
    for axes, sweep in zip(figure.subplots(1, 2), sweeps, strict=True):
        minutes = [assumed.every_seconds / _MINUTE for assumed, _ in sweep.points]
        steady = np.geomspace(min(minutes), max(minutes), 60)
        axes.plot(steady, [100 * share for share in sweep.closed_form(steady * _MINUTE)], color=theme.quiet,
                  linewidth=1.3, label="closed form")  # fmt: skip
        _error_bars(axes, minutes, [assumed.simulated for assumed, _ in sweep.points], theme.ink)
        axes.plot(minutes, [100 * assumed.simulated.value for assumed, _ in sweep.points], marker="o",
                  markerfacecolor=theme.paper, color=theme.ink, label="simulated, as it assumes", **_DOTS)  # fmt: skip
        _error_bars(axes, minutes, [real for _, real in sweep.points], theme.series[0])
        axes.plot(minutes, [100 * real.value for _, real in sweep.points], marker="s", color=theme.series[0],
                  label="simulated, these conditions", **_DOTS)  # fmt: skip
        axes.axvline(sweep.best_seconds / _MINUTE, color=theme.quiet, linewidth=0.9, linestyle=_LINES[1])
        axes.set(xscale="log", xlabel="training between checkpoints, minutes", ylabel="goodput, % of the time",
                 title="Asynchronous" if sweep.asynchronous else "Synchronous")  # fmt: skip
        _plain_ticks(axes, minutes)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def _plain_ticks(axes: "Axes", values: Sequence[float]) -> None:
    axes.set_xticks(values, [f"{value:.2g}" if value < 99.5 else f"{value:,.0f}" for value in values])
    axes.set_xticks([], minor=True)


def _error_bars(axes: "Axes", places: Sequence[float], values: Sequence[Interval], color: str) -> None:
    for place, value in zip(places, values, strict=True):
        axes.plot([place, place], [100 * value.low, 100 * value.high], color=color, linewidth=1, marker="_",
                  markersize=6)  # fmt: skip


def _draw_spares(simulation: Simulation, theme: Theme) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2, 3.5), layout="constrained")
    axes, outcomes = figure.subplots(), simulation.over_spares
    spares = [outcome.scenario.job.spares for outcome in outcomes]
    kinds = (
        ("of the nodes that train", [outcome.goodput for outcome in outcomes], "o", "-"),
        ("of all nodes", [outcome.goodput_of_all_nodes for outcome in outcomes], "s", _LINES[1]),
    )
    for number, (name, values, marker, line) in enumerate(kinds):
        color = theme.series[number]
        _error_bars(axes, spares, values, color)
        axes.plot(spares, [100 * value.value for value in values], color=color, marker=marker, linestyle=line,
                  linewidth=1.3, markersize=8 - 4 * number, label=name)  # fmt: skip
    axes.set(xlabel="spare nodes", ylabel="goodput, % of the time", ylim=(0, 104))
    axes.set_xticks(spares)
    axes.legend(loc="lower right")
    return figure


def _draw_progress(simulation: Simulation, theme: Theme) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes, days = figure.subplots(), simulation.conditions.days
    axes.plot([0, days], [0, days], color=theme.quiet, linewidth=0.7)
    for number, outcome in enumerate(simulation.outcomes):
        times, trained = np.array(outcome.runs[0].progress).T / DAY
        axes.plot(times, trained, color=theme.series[number], linewidth=1.5, linestyle=_LINES[number],
                  label=outcome.scenario.name)  # fmt: skip
    axes.set(xlabel="days", ylabel="days of training kept", xlim=(0, days), ylim=(0, days))
    axes.legend(loc="upper left")
    return figure


def _saved(simulation: Simulation) -> str:
    return "Asynchronous" if simulation.outcomes[simulation.chosen].scenario.asynchronous else "Synchronous"


def _drawing(name: str, title: str, note: str, draw: "Callable[[Theme], Figure]") -> Drawing:
    png = render(Picture(name, title, note, lambda _, theme: draw(theme)), (), LIGHT)
    assert png is not None
    return Drawing(name, title, note, png)
