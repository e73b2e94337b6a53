"""Pictures of training runs: loss, throughput, learning rate, gradient norm, goodput, and where the time went.

Several runs share the axes, one colour each (Okabe & Ito's palette, which the colour-blind can tell apart). A curve of
any length is drawn with at most POINTS points that keep its extremes (`thin`), noisy ones with a line of medians of
1/MEDIANS of the run each before them. Missing values leave gaps. Sized to be read at the width of a phone.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megagpt.training.history import TIME_PARTS, Columns, Floats, History, read_histories
from megagpt.training.sinks import duration

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS = 2000
MEDIANS = 200

_WIDTH, _HEIGHT, _DPI = 5.4, 3.0, 200  # inches, inches, dots an inch
_LINE_STYLES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
_LONGEST_LABEL = 48


@dataclass(frozen=True)
class Theme:
    """Colours of a picture."""

    paper: str
    ink: str
    quiet: str
    grid: str
    series: tuple[str, ...]
    """Of runs, or of the curves of one run."""
    parts: tuple[str, ...]
    """Of megagpt.training.history.TIME_PARTS."""


LIGHT = Theme(
    paper="#ffffff",
    ink="#1f2328",
    quiet="#656d76",
    grid="#e4e8ec",
    series=("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4d4d4d"),
    parts=("#cc79a7", "#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#b6bdc5"),
)
DARK = Theme(
    paper="#0d1117",
    ink="#e6edf3",
    quiet="#9198a1",
    grid="#262c34",
    series=("#4aa8e8", "#ff8138", "#1fc493", "#e59bc4", "#f2b632", "#9bd8ff", "#b5bcc4"),
    parts=("#e59bc4", "#3385c6", "#86ccf5", "#1fae83", "#f2b632", "#ff8138", "#4b535d"),
)


@dataclass(frozen=True)
class Picture:
    """One kind of picture."""

    name: str
    """Of its file, without .png."""
    title: str
    note: str
    """How to read it."""
    draw: "Callable[[Sequence[History], Theme], Figure | None]"
    """Draws it; None: the runs have no data for it."""


def render(picture: Picture, runs: Sequence[History], theme: Theme) -> bytes | None:
    """The picture as a PNG file; None: the runs have no data for it."""
    import matplotlib

    style: dict[Any, Any] = {
        "figure.facecolor": theme.paper, "axes.facecolor": theme.paper, "axes.edgecolor": theme.quiet,
        "axes.labelcolor": theme.ink, "text.color": theme.ink, "xtick.color": theme.quiet, "ytick.color": theme.quiet,
        "xtick.labelcolor": theme.ink, "ytick.labelcolor": theme.ink, "grid.color": theme.grid,
        "text.parse_math": False,  # a name may have a dollar sign
        "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
        "axes.titlelocation": "left", "axes.titleweight": "bold", "axes.titlesize": 11, "font.size": 9.5,
        "legend.frameon": False, "legend.fontsize": 9, "legend.handlelength": 1.8, "lines.solid_capstyle": "round",
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = picture.draw(runs, theme)
        if figure is None:
            return None
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=_DPI)
    return content.getvalue()


def plot_losses(run_dir: Path, baselines: dict[str, float] | None = None) -> Path:
    """Draw training and validation loss by step from run_dir/metrics.jsonl into run_dir/loss.png; returns its path.

    baselines: losses of other models by name, drawn as dashed lines. Raises UserError as read_histories does.
    """
    picture = Picture("loss", "Loss", "", lambda runs, theme: _draw_loss(runs, theme, baselines))
    content = render(picture, read_histories([run_dir]), LIGHT)
    path = run_dir / "loss.png"
    assert content is not None, "a picture with baselines has data"
    path.write_bytes(content)
    return path


def thin(x: Floats, y: Floats, points: int = POINTS) -> tuple[Floats, Floats]:
    """At most `points` points of a curve, (n,) and (n,), that show what all of them would.

    Of each of equally many neighbours the lowest, the highest and, where there is one, a missing value (NaN) stay.
    """
    if len(y) <= points:
        return x, y
    rows = _rows(y, (points - 2) // 3)
    missing = np.isnan(rows)
    missing.reshape(-1)[len(y) :] = False  # the padding
    begins = np.arange(len(rows)) * rows.shape[1]
    lowest = begins + np.where(np.isnan(rows), np.inf, rows).argmin(axis=1)
    highest = begins + np.where(np.isnan(rows), -np.inf, rows).argmax(axis=1)
    gaps = (begins + missing.argmax(axis=1))[missing.any(axis=1)]
    chosen = np.unique(np.concatenate([lowest, highest, gaps, [0, len(y) - 1]]))
    return x[chosen], y[chosen]


def medians(x: Floats, y: Floats, bins: int = MEDIANS) -> tuple[Floats, Floats]:
    """The mean place and the median value of each of at most `bins` stretches of equally many points; NaN: no value."""
    rows, places = _rows(y, bins), _rows(x, bins)
    has_value = ~np.isnan(rows).all(axis=1)
    values = np.full(len(rows), np.nan)
    values[has_value] = np.nanmedian(rows[has_value], axis=1)
    return np.nanmean(places, axis=1), values


def _rows(values: Floats, rows: int) -> Floats:
    """`values` cut into at most so many rows of equal length, the last one filled up with NaN."""
    length = -(-len(values) // rows)
    padded = np.full(-(-len(values) // length) * length, np.nan)
    padded[: len(values)] = values
    return padded.reshape(-1, length)


# ---- the pictures


def _draw_loss(runs: Sequence[History], theme: Theme, baselines: dict[str, float] | None = None) -> "Figure | None":
    """Training loss; of one run also that of its validation datasets, as there are colours left for it."""
    validation = runs[0].validation if len(runs) == 1 else {}
    has_training = any(np.isfinite(run.train.counted("loss")).any() for run in runs)
    if not has_training and not validation and not baselines:
        return None
    panels = _panels_by_tokens(runs)
    figure, all_axes = _figure(len(panels), "Loss" if len(runs) == 1 else "Training loss", runs)
    for axes, (label, place) in zip(all_axes, panels, strict=True):
        axes.set(xlabel=label, ylabel="cross-entropy, nats/token")
        for number, run in enumerate(runs):
            steps, loss = run.train.counted("step"), run.train.counted("loss")
            name = "training" if len(runs) == 1 else run.name
            _noisy_curve(axes, place(run, steps), loss, theme, number, name)
        for number, (dataset, columns) in enumerate(validation.items(), start=1):
            finite = columns.counted("loss")[np.isfinite(columns.counted("loss"))]
            name = f"{dataset} (last {finite[-1]:.3f})" if len(finite) else dataset
            _validation_curve(axes, place(runs[0], columns.counted("step")), columns, theme, number, name)
        for name, baseline in (baselines or {}).items():
            line = axes.axhline(baseline, color=theme.quiet, linewidth=1, linestyle=(0, (4, 3)))
            line.set_label(_label(f"{name} ({baseline:.3f})"))
        _scale_loss(axes)
        if label == "optimizer step":
            _mark_events(axes, runs, theme, ("restarts", "spikes", "skipped"))
    _legend(figure, all_axes[0])
    return figure


def _draw_validation(runs: Sequence[History], theme: Theme) -> "Figure | None":
    """Validation loss of several runs, a panel a dataset."""
    datasets = list(dict.fromkeys(name for run in runs for name in run.validation))
    if len(runs) == 1 or not datasets:
        return None
    panels = _panels_by_tokens(runs)
    figure, all_axes = _figure(len(datasets) * len(panels), "", runs, height=0.85 * _HEIGHT)
    cells = [(dataset, *panel) for dataset in datasets for panel in panels]
    for axes, (dataset, label, place) in zip(all_axes, cells, strict=True):
        axes.set(xlabel=label, ylabel="cross-entropy, nats/token", title=f"Validation loss: {_short(dataset)}")
        for number, run in enumerate(runs):
            if dataset in run.validation:
                columns = run.validation[dataset]
                _validation_curve(axes, place(run, columns.counted("step")), columns, theme, number, run.name)
        _scale_loss(axes)
    _legend(figure, *all_axes)
    return figure


def _draw_throughput(runs: Sequence[History], theme: Theme) -> "Figure | None":
    """Tokens a second of all ranks, and of one rank where there is more than one."""
    rates = {"Throughput": [run.train.counted("tokens_per_second") for run in runs]}
    if any(np.nanmax(run.ranks(), initial=1) > 1 for run in runs):
        rates["Throughput of a rank"] = [tokens_per_second_per_rank(run) for run in runs]
    rates = {title: curves for title, curves in rates.items() if any(np.isfinite(curve).any() for curve in curves)}
    if not rates:
        return None
    figure, all_axes = _figure(len(rates), "", runs, height=0.85 * _HEIGHT)
    for axes, (title, curves) in zip(all_axes, rates.items(), strict=True):
        unit = "tokens/s" if title == "Throughput" else "tokens/s/rank"
        axes.set(xlabel="optimizer step", ylabel=unit, title=_title(title, runs))
        for number, (run, curve) in enumerate(zip(runs, curves, strict=True)):
            _noisy_curve(axes, run.train.counted("step"), curve, theme, number, _legend_name(run, runs))
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda value, _: compact(value))
        _mark_events(axes, runs, theme, ("restarts",))
        _mark_world_sizes(axes, runs, theme)
    _legend(figure, *all_axes)
    return figure


def _draw_learning_rate(runs: Sequence[History], theme: Theme) -> "Figure | None":
    figure = _draw_simple(runs, theme, "lr", "Learning rate", "learning rate")
    if figure:
        figure.axes[0].set_ylim(bottom=0)
        figure.axes[0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        _legend(figure, figure.axes[0])
    return figure


def _draw_gradient_norm(runs: Sequence[History], theme: Theme) -> "Figure | None":
    figure = _draw_simple(runs, theme, "grad_norm", "Gradient norm", "global L2 norm", is_noisy=True)
    if figure:
        low, high = _extent(figure.axes[0])
        if low > 0 and high > 5 * low:
            _scale_log(figure.axes[0])
        _mark_events(figure.axes[0], runs, theme, ("restarts", "spikes", "skipped"))
        _legend(figure, figure.axes[0])
    return figure


def _draw_goodput(runs: Sequence[History], theme: Theme) -> "Figure | None":
    figure = _draw_simple(runs, theme, "goodput", "Goodput", "time in steps that count, %", scale=100)
    if figure:
        figure.axes[0].set_ylim(0, 102)
        _mark_events(figure.axes[0], runs, theme, ("restarts",))
        _legend(figure, figure.axes[0])
    return figure


def _draw_simple(
    runs: Sequence[History], theme: Theme, name: str, title: str, unit: str, scale: float = 1, is_noisy: bool = False
) -> "Figure | None":
    """A field of the training records by step."""
    if not any(np.isfinite(run.train.counted(name)).any() for run in runs):
        return None
    figure, (axes,) = _figure(1, title, runs)
    axes.set(xlabel="optimizer step", ylabel=unit)
    for number, run in enumerate(runs):
        draw = _noisy_curve if is_noisy else _curve
        draw(axes, run.train.counted("step"), scale * run.train.counted(name), theme, number, _legend_name(run, runs))
    return figure


def _draw_time(runs: Sequence[History], theme: Theme) -> "Figure | None":
    """A bar a run: the share of each part of its time."""
    spent = [run.time_spent() for run in runs]
    if not any(sum(parts.values()) for parts in spent):
        return None
    used = [part for part in TIME_PARTS if any(parts.get(part, 0) > 0 for parts in spent)]
    figure, (axes,) = _figure(1, "Where the time went", runs, height=0.85 + 0.55 * len(runs))
    axes.set(xlabel="share of the time, %", xlim=(0, 100), ylim=(len(runs) - 0.45, -0.75), yticks=[])
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    for row, (run, parts) in enumerate(zip(runs, spent, strict=True)):
        whole, left = sum(parts.values()), 0.0
        name = f"{_short(run.name)}: " if len(runs) > 1 else ""
        kind = "wall time" if parts.get("not training") else "recorded"
        axes.text(0, row - 0.34, f"{name}{duration(whole)} {kind}", fontsize=9, va="bottom")
        for part in used:
            share = 100 * parts.get(part, 0) / (whole or 1)
            color = theme.parts[TIME_PARTS.index(part)]
            axes.barh(row, share, 0.58, left=left, color=color, edgecolor=theme.paper, linewidth=0.6)
            if share >= 6:
                axes.text(left + share / 2, row, f"{share:.0f} %", ha="center", va="center", fontsize=9,
                          color=_readable_on(color))  # fmt: skip
            left += share
    details = [""] * len(used)
    if len(runs) == 1:
        whole = sum(spent[0].values())
        details = [f": {duration(spent[0][part])}, {100 * spent[0][part] / whole:.1f} %" for part in used]
    _parts_legend(figure, theme, used, details)
    return figure


def _draw_step_time(runs: Sequence[History], theme: Theme) -> "Figure | None":
    """Seconds a step over the run, stacked by what they were spent on; a panel a run."""
    stacks = [(run, *_stack(run)) for run in runs if len(run.train)]
    stacks = [stack for stack in stacks if any(values.any() for values in stack[2].values())]
    if not stacks:
        return None
    figure, all_axes = _figure(len(stacks), "", (), height=_HEIGHT if len(stacks) == 1 else 0.66 * _HEIGHT)
    used = [part for part in TIME_PARTS if any(part in parts and parts[part].any() for _, _, parts in stacks)]
    for axes, (run, steps, parts) in zip(all_axes, stacks, strict=True):
        layers = [parts[part] for part in used]
        axes.stackplot(steps, layers, colors=[theme.parts[TIME_PARTS.index(part)] for part in used], linewidth=0)
        total = np.sum(layers, axis=0)
        axes.set(ylabel="seconds/step", title=_title("Time of a step", [run]), xlim=(steps[0], steps[-1]))
        axes.set_ylim(0, min(1.1 * total.max(), 3 * np.median(total[total > 0])))
        axes.xaxis.set_major_formatter(lambda value, _: compact(value))
    all_axes[-1].set_xlabel("optimizer step")
    _parts_legend(figure, theme, used)
    return figure


PICTURES = (
    Picture("loss", "Loss", "Training: of single batches.", _draw_loss),
    Picture("validation_loss", "Validation loss", "", _draw_validation),
    Picture("throughput", "Throughput", "Without checkpoints and evaluations.", _draw_throughput),
    Picture("gradient_norm", "Gradient norm", "Before clipping.", _draw_gradient_norm),
    Picture("learning_rate", "Learning rate", "", _draw_learning_rate),
    Picture(
        "goodput",
        "Goodput",
        "Time in steps that count (were not repeated after a restart) over the time since the first start.",
        _draw_goodput,
    ),
    Picture(
        "time",
        "Where the time went",
        "Not training: starting, being down, and steps whose records were dropped as they were done again.",
        _draw_time,
    ),
    Picture(
        "step_time",
        "Time of a step",
        f"Means of 1/{MEDIANS} of the records each. The axis ends at three times the median.",
        _draw_step_time,
    ),
)

HOW_DRAWN = (
    f"A curve of more than {POINTS:,} records is thinned to the lowest and the highest of equal stretches, so that no "
    f"extreme is lost. Loss, throughput and gradient norm of more than {2 * MEDIANS} records: faint the records, in "
    f"front of them a line of medians of 1/{MEDIANS} of the records each. Missing values (a skipped step's loss) leave "
    "gaps. Of a step that was done again the last record counts."
)
"""What holds for all pictures."""


def tokens_per_second_per_rank(run: History) -> Floats:
    """Of the training records that count; where it was not recorded, from the world size of the last start."""
    whole, each = run.train.values["tokens_per_second"], run.train.values["tokens_per_second_per_rank"]
    return np.where(np.isnan(each), whole / run.ranks(), each)[run.train.is_counted]


def compact(number: float, suffixes: Sequence[str] = ("", "k", "M", "B", "T")) -> str:
    """A number of at least 0 in three digits or so and a suffix for thousands, millions, ...: 950, 1.5k, 12.3M."""
    for suffix in suffixes[:-1]:
        if number < 999.5:
            return f"{number:.3g}{suffix}"
        number /= 1000
    return f"{number:,.3g}{suffixes[-1]}" if number < 999.5 else f"{number:,.0f}{suffixes[-1]}"


# ---- their parts


Place = Callable[[History, Floats], Floats]


def _panels_by_tokens(runs: Sequence[History]) -> list[tuple[str, Place]]:
    """The x-axes of losses, each with its label: by step; by tokens too where a step is not always as many tokens."""
    panels: list[tuple[str, Place]] = [("optimizer step", lambda _, steps: steps)]
    sizes = [run.train.counted("tokens") / run.train.counted("step").clip(1) for run in runs if len(run.train)]
    ends = [size[[0, -1]] for size in sizes if np.isfinite(size[[0, -1]]).all()]
    if ends and np.max(ends) > 1.001 * np.min(ends):
        panels.append(("tokens", lambda run, steps: run.tokens_at(steps)))
    return panels


def _figure(panels: int, title: str, runs: Sequence[History], height: float = _HEIGHT) -> "tuple[Figure, list[Axes]]":
    """A figure with so many axes, one below the other; the title is that of the first."""
    from matplotlib.figure import Figure  # the object interface: no global state, no display needed

    figure = Figure(figsize=(_WIDTH, height * panels), layout="constrained")
    all_axes = list(figure.subplots(panels, squeeze=False)[:, 0])
    for axes in all_axes:
        axes.xaxis.set_major_formatter(lambda value, _: compact(value) if value >= 0 else "")
    if title:
        all_axes[0].set_title(_title(title, runs))
    return figure, all_axes


def _title(title: str, runs: Sequence[History]) -> str:
    """With the name of the run, if there is one alone; a legend names several."""
    return f"{title}: {_short(runs[0].name)}" if len(runs) == 1 else title


def _legend_name(run: History, runs: Sequence[History]) -> str | None:
    """None: a picture of one run has its name in the title."""
    return run.name if len(runs) > 1 else None


def _short(text: str) -> str:
    """A name, its middle left out if it is long."""
    if len(text) <= _LONGEST_LABEL:
        return text
    half = (_LONGEST_LABEL - 1) // 2
    return f"{text[:half]}…{text[-half:]}"


def _label(name: str | None) -> str | None:
    """A name in a legend, from which matplotlib leaves out labels with a leading underscore."""
    return None if name is None else f" {_short(name)}" if name.startswith("_") else _short(name)


def _style(theme: Theme, number: int) -> dict:
    colors = theme.series
    return {"color": colors[number % len(colors)], "linestyle": _LINE_STYLES[number // len(colors) % len(_LINE_STYLES)]}


def _curve(axes: "Axes", x: Floats, y: Floats, theme: Theme, number: int, name: str | None, **style: object) -> None:
    """A line with gaps where y is NaN; a point that has no neighbour to draw a line to is a dot."""
    x, y = thin(x, y)
    merged = _style(theme, number) | {"linewidth": 1.4, "label": _label(name)} | style
    axes.plot(x, y, **merged)
    shown = np.pad(np.isfinite(y), 1)
    alone = shown[1:-1] & ~shown[:-2] & ~shown[2:]
    if alone.any():
        axes.plot(x[alone], y[alone], color=merged["color"], linestyle="", marker=".", alpha=merged.get("alpha"))


def _noisy_curve(axes: "Axes", x: Floats, y: Floats, theme: Theme, number: int, name: str | None) -> None:
    """Many values faint and their medians before them; few values as they are."""
    if len(y) <= 2 * MEDIANS:
        _curve(axes, x, y, theme, number, name)
        return
    _curve(axes, x, y, theme, number, None, linestyle="-", linewidth=0.5, alpha=0.35)
    axes.plot(*medians(x, y), **_style(theme, number), linewidth=1.4, label=_label(name), zorder=2.5)


def _validation_curve(axes: "Axes", x: Floats, columns: Columns, theme: Theme, number: int, name: str) -> None:
    """Points joined by a line; many points as a line alone."""
    y = columns.counted("loss")
    marker = "o" if len(y) <= 60 else ""
    _curve(axes, x, y, theme, number, name, marker=marker, markersize=3, zorder=3)


def _extent(axes: "Axes") -> tuple[float, float]:
    """The least and the greatest value that is drawn."""
    drawn = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines])
    drawn = drawn[np.isfinite(drawn)]
    return (float(drawn.min()), float(drawn.max())) if len(drawn) else (1.0, 1.0)


def _scale_loss(axes: "Axes") -> None:
    """Logarithmic where the first losses would press the others flat."""
    low, high = _extent(axes)
    if low > 0 and high > 2 * low:
        _scale_log(axes)


def _scale_log(axes: "Axes") -> None:
    """A logarithmic y-axis with plain numbers on it, about as many whatever the range."""
    low, high = _extent(axes)
    axes.set_yscale("log")
    decades = np.log10(high / low)
    if decades < 0.8:
        leading: tuple[float, ...] = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
    else:
        leading = (1, 1.5, 2, 3, 4, 6, 8) if decades < 1.3 else (1, 2, 3, 5) if decades < 2 else (1, 3)
    if decades > 4:
        return
    ticks = [lead * 10.0**power for power in range(-12, 13) for lead in leading]
    axes.set_yticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.set_ylim(low / 1.05, high * 1.05)


def _mark_events(axes: "Axes", runs: Sequence[History], theme: Theme, kinds: tuple[str, ...]) -> None:
    """Restarts, spikes and skipped steps of one run; of several they would be a thicket."""
    if len(runs) != 1:
        return
    run, across = runs[0], axes.get_xaxis_transform()
    if "restarts" in kinds and len(run.starts) > 1:
        places = _spaced([start.step for start in run.starts[1:]])
        axes.vlines(places, 0, 1, transform=across, color=theme.quiet, linewidth=0.8, linestyle=":", label="restart")
    spikes = [event.step for event in run.events if event.kind == "spike"]
    if "spikes" in kinds and spikes:
        axes.plot(_spaced(spikes), np.full(len(_spaced(spikes)), 0.985), transform=across, linestyle="", marker="v",
                  color=theme.ink, markersize=4, label="loss spike", clip_on=False)  # fmt: skip
    skipped = run.train.counted("skipped_steps")
    skipped_at = run.train.counted("step")[np.diff(skipped, prepend=0) > 0]
    if "skipped" in kinds and len(skipped_at):
        places = _spaced(skipped_at)
        axes.plot(places, np.full(len(places), 0.02), transform=across, linestyle="", marker="x", color=theme.ink,
                  markersize=4, label="skipped step", clip_on=False)  # fmt: skip


def _spaced(steps: Sequence[float] | Floats) -> Floats:
    """Of steps that fall on the same place of a picture the first."""
    ordered = np.unique(np.asarray(steps, dtype=float))
    _, first = np.unique(np.round(ordered / max(1.0, ordered[-1]) * POINTS / 4), return_index=True)
    return ordered[first]


def _mark_world_sizes(axes: "Axes", runs: Sequence[History], theme: Theme) -> None:
    """Above the axes of one run: on how many ranks it went on from here, where that changed and there is space."""
    sizes = [(start.step, start.world_size) for start in runs[0].starts]
    if len(runs) != 1 or len({size for _, size in sizes}) < 2:
        return
    title = axes.get_title(loc="left")
    axes.set_title(title, pad=16)
    last_step, last_place, last_size = runs[0].last_step or 1, -1.0, None
    for step, size in sizes:
        place = step / last_step
        if size is not None and size != last_size and last_place + 0.13 < place < 0.95:
            axes.text(step, 1.015, f"{size} ranks", transform=axes.get_xaxis_transform(), fontsize=8, color=theme.quiet)
            last_place = place
        last_size = size


def _legend(figure: "Figure", *all_axes: "Axes") -> None:
    """One legend below all axes, of the labels of all of them, each once."""
    entries: dict[str, Artist] = {}
    for axes in all_axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        _legend_below(figure, list(entries.values()), list(entries))


def _parts_legend(figure: "Figure", theme: Theme, used: Sequence[str], details: Sequence[str] | None = None) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(color=theme.parts[TIME_PARTS.index(part)]) for part in used]
    labels = [part + detail for part, detail in zip(used, details or [""] * len(used), strict=True)]
    _legend_below(figure, patches, labels, handlelength=1, handleheight=1)


def _legend_below(figure: "Figure", handles: "Sequence[Artist]", labels: Sequence[str], **style: float) -> None:
    """A legend for which the figure grows, so that the axes keep their height."""
    longest = max(map(len, labels))
    columns = 1 if longest > 34 else 2 if longest > 18 else 3
    figure.set_figheight(figure.get_figheight() + 0.2 * -(-len(labels) // columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, **style)


def _readable_on(color: str) -> str:
    """Black or white, whichever differs more in brightness (ITU-R BT.601)."""
    red, green, blue = (int(color[place : place + 2], 16) for place in (1, 3, 5))
    return "#ffffff" if 0.299 * red + 0.587 * green + 0.114 * blue < 140 else "#101418"


def _stack(run: History) -> tuple[Floats, dict[str, Floats]]:
    """Mean seconds a step by part and stretch of the run, as the corners of steps: x and each part (2 x bins,)."""
    train = run.train
    ends = train.counted("step")
    begins = ends - run.steps_covered()[train.is_counted]
    parts = {
        "data": train.counted("data_seconds"),
        "forward-backward": train.counted("forward_backward_seconds"),
        "optimizer": train.counted("optimizer_seconds"),
    }
    known = sum(np.nan_to_num(values) for values in parts.values())
    parts["rest of step"] = np.maximum(0, train.counted("step_seconds") - known)
    parts["checkpoint"] = train.counted("checkpoint_seconds")
    parts["evaluation"] = train.counted("evaluation_seconds")

    def means(values: Floats) -> Floats:
        rows = _rows(np.nan_to_num(values), MEDIANS)
        return np.repeat(np.nanmean(rows, axis=1), 2)

    corners = np.column_stack([_rows(begins, MEDIANS)[:, 0], np.nanmax(_rows(ends, MEDIANS), axis=1)]).reshape(-1)
    return corners, {part: means(values) for part, values in parts.items()}
