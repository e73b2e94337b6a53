"""How well the time model predicts published runs that its parameters were not fitted to.

Every data-parallel run is predicted by a fit to the other folds, none of which has its project's model; then once more
by a fit to the other projects alone, which is how far a new project's software is from the known ones. Runs that split
layers over GPUs, or run on GPUs other than as sold, are predicted by the fit to all data-parallel runs, which is the
one that the project ships.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megagpt.model.counts import parameter_count
from megagpt.planning.calibration import FOLDS, fit, folds, log_errors
from megagpt.planning.efficiency import FILE, Calibration, stored_form
from megagpt.planning.published import PublishedRun, load_published
from megagpt.scaling.pictures import MARKERS
from megagpt.training.plots import LIGHT, Picture, Theme, compact, render

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZES = ((1e9, "below 1 B"), (1e10, "1 B to 10 B"), (float("inf"), "above 10 B"))
"""Classes by parameters: upper ends and names."""
PICTURE = "planning_accuracy.png"
_RESULT = "planning_accuracy.json"


@dataclass(frozen=True)
class Judged:
    """A published run beside its prediction."""

    run: PublishedRun
    log_error: float
    """ln(predicted / measured) of the step time: below 0 predicts too fast."""

    @property
    def error(self) -> float:
        """Predicted over measured step time, minus 1."""
        return float(np.expm1(self.log_error))

    @property
    def size(self) -> str:
        """Class of the model."""
        count = parameter_count(self.run.model)
        return next(name for end, name in SIZES if count < end)


@dataclass(frozen=True)
class Line:
    """Errors of some runs together."""

    name: tuple[str, ...]
    runs: int
    median: float
    """Of the errors' sizes."""
    bias: float
    """Median of the errors with their signs: below 0 predicts too fast."""
    worst: float
    """The error of the largest size, with its sign."""


@dataclass(frozen=True)
class ValidationReport:
    """What was predicted how well."""

    calibration: Calibration
    """Fitted to all data-parallel runs."""
    held_out: list[Judged]
    """Data-parallel runs, each predicted by a fit without its project's model."""
    other_projects: list[Judged]
    """The same runs, each predicted by a fit without its project."""
    elsewhere: list[Judged]
    """Runs that no fit has seen: layers split over GPUs, other power limits."""
    left_out: Counter[str]
    """Rows that cannot be predicted, by reason."""

    def lines(self, judged: Sequence[Judged], *keys: str) -> list[Line]:
        """Errors by `gpu`, `size`, `project`: by what the keys name, sorted."""
        groups: dict[tuple[str, ...], list[float]] = {}
        for one in judged:
            named = {"gpu": one.run.cluster.device.name, "size": one.size, "project": one.run.project}
            groups.setdefault(tuple(named[key] for key in keys), []).append(one.error)
        return [_line(name, errors) for name, errors in sorted(groups.items())]

    def data_parallel(self, judged: Sequence[Judged]) -> list[Judged]:
        """Those of them that split nothing but the batch over GPUs."""
        return [one for one in judged if one.run.data_parallel_only]

    def text(self) -> str:
        """Tables for a terminal or a page, in Markdown."""
        whole = self.data_parallel(self.held_out)
        parts = [
            _table("Held out: data-parallel runs by GPU and size", self.lines(whole, "gpu", "size")),
            _table("All of them", self.lines(whole)),
            _table("The same, predicted without their project", self.lines(self.other_projects, "project")),
            _table("Never fitted, by project and GPU", self.lines(self.elsewhere, "project", "gpu")),
            "Worst of the held-out\n\n" + "\n".join(map(_worst, sorted(self.held_out, key=_size_of_error)[:-13:-1])),
            "Rows left out\n\n" + "\n".join(f"- {count}: {reason}" for reason, count in self.left_out.most_common()),
        ]
        return "\n\n".join(parts) + "\n"

    def to_json(self) -> dict[str, Any]:
        """All figures as JSON types."""
        judged = {"held_out": self.held_out, "other_projects": self.other_projects, "elsewhere": self.elsewhere}
        return {
            "calibration": asdict(self.calibration),
            **{name: [_row(one) for one in ones] for name, ones in judged.items()},
            "left_out": dict(self.left_out),
        }


def validate(output_folder: Path) -> ValidationReport:
    """Fit, predict what was held out, and write planning_accuracy.json, its .png and efficiency.json into the folder.

    The folder may be new. efficiency.json is the fit to all runs, in the form that the project ships. Takes a minute.
    """
    runs, left_out = load_published()
    parts = folds(runs)
    fitted = [run for part in parts for run in part]
    calibration = fit(fitted)
    held_out, other_projects = [], []
    for number in range(FOLDS):
        others = [run for other, part in enumerate(parts) if other != number for run in part]
        held_out += _judged(parts[number], fit(others))
    for project in sorted({run.project for run in fitted}):
        others = [run for run in fitted if run.project != project]
        other_projects += _judged([run for run in fitted if run.project == project], fit(others))
    elsewhere = _judged([run for run in runs if not run.may_be_fitted], calibration)
    report = ValidationReport(calibration, held_out, other_projects, elsewhere, left_out)
    output_folder.mkdir(parents=True, exist_ok=True)
    (output_folder / _RESULT).write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
    (output_folder / Path(FILE).name).write_text(stored_form(calibration, len(fitted)), encoding="utf-8")
    (output_folder / PICTURE).write_bytes(draw(report))
    return report


def draw(report: ValidationReport) -> bytes:
    """Predicted against published throughput, and their ratio by model size, as a PNG file."""
    picture = Picture(PICTURE, "Predicted against published", "", lambda _, theme: _draw(report, theme))
    content = render(picture, (), LIGHT)
    assert content is not None, "there are runs to draw"
    return content


def _judged(runs: Sequence[PublishedRun], calibration: Calibration) -> list[Judged]:
    return [Judged(run, float(error)) for run, error in zip(runs, log_errors(runs, calibration), strict=True)]


def _line(name: tuple[str, ...], errors: Sequence[float]) -> Line:
    return Line(name, len(errors), float(np.median(np.abs(errors))), float(np.median(errors)), max(errors, key=abs))


def _size_of_error(one: Judged) -> float:
    return abs(one.log_error)


def _table(title: str, lines: Sequence[Line]) -> str:
    rows = [f"| {' | '.join(line.name) or 'all'} | {line.runs} | {line.median:.1%} | {line.bias:+.1%} | "
            f"{line.worst:+.1%} |" for line in lines]  # fmt: skip
    names = " | " * max(0, len(lines[0].name) - 1) if lines else ""
    head = f"| {names} | runs | median error | bias | worst |"
    return "\n".join([title, "", head, "|" + "---|" * (head.count("|") - 1), *rows])


def _worst(one: Judged) -> str:
    run, layout = one.run, one.run.layout
    return (f"- {one.error:+.1%}  {run.project}, {run.name}, {layout.gpus} x {run.cluster.device.name}, "
            f"{layout.seq_len:,} tokens, micro-batch {layout.micro_batch}")  # fmt: skip


def _row(one: Judged) -> dict[str, Any]:
    run = one.run
    return {
        "source": run.source,
        "model": run.name,
        "gpu": run.gpu,
        "gpus": run.layout.gpus,
        "seq_len": run.layout.seq_len,
        "micro_batch": run.layout.micro_batch,
        "tokens_per_second_per_gpu": run.tokens_per_second_per_gpu,
        "predicted_tokens_per_second_per_gpu": run.tokens_per_second_per_gpu / (1 + one.error),
        "mfu": run.mfu,
        "error": one.error,
    }


def _draw(report: ValidationReport, theme: Theme) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.9), layout="constrained")
    against, ratios = figure.subplots(1, 2)
    everything = [*report.held_out, *report.elsewhere]
    for number, project in enumerate(sorted({one.run.project for one in everything})):
        style: dict[str, Any] = {"marker": MARKERS[number % len(MARKERS)], "linestyle": "", "markersize": 4.5,
                                 "color": theme.series[number % len(theme.series)], "alpha": 0.75}  # fmt: skip
        if number >= len(MARKERS):
            style["marker"] = "*"
        for whole, face in ((True, style["color"]), (False, "none")):
            ones = [one for one in everything if one.run.project == project and one.run.data_parallel_only == whole]
            if not ones:
                continue
            rates = np.array([one.run.tokens_per_second_per_gpu for one in ones])
            speeds = np.exp([-one.log_error for one in ones])
            label = f"{project}, {'data-parallel' if whole else 'model-parallel'}"
            against.plot(rates, rates * speeds, label=label, markerfacecolor=face, **style)
            ratios.plot([parameter_count(one.run.model) for one in ones], speeds, markerfacecolor=face, **style)
    _finish(against, ratios, theme)
    handles, labels = against.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, handlelength=1.2)
    return figure


def _finish(against: "Axes", ratios: "Axes", theme: Theme) -> None:
    """Scales, and the lines of equality with 10 % to each side."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    against.set(xscale="log", yscale="log", xlabel="published tokens/s of a GPU", ylabel="predicted tokens/s of a GPU",
                title="Throughput")  # fmt: skip
    ends = np.array([15.0, 3e5])
    for factor, line in ((0.9, ":"), (1.0, "-"), (1.1, ":")):
        against.plot(ends, factor * ends, color=theme.quiet, linewidth=0.9, linestyle=line, zorder=1)
        ratios.axhline(factor, color=theme.quiet, linewidth=0.9, linestyle=line, zorder=1)
    ratios.set(xscale="log", yscale="log", xlabel="parameters", ylabel="predicted / published tokens/s",
               title="Ratio (dotted: 10 %)", ylim=(0.75, 2.0))  # fmt: skip
    plain = FuncFormatter(lambda value, _: compact(value))
    for axis in (against.xaxis, against.yaxis, ratios.xaxis):
        axis.set_major_formatter(plain)
    ratios.set_yticks([0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 1.75])
    ratios.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for axis in (against.xaxis, against.yaxis, ratios.xaxis, ratios.yaxis):
        axis.set_minor_formatter(NullFormatter())
