"""The report of a scaling study: one page that needs nothing else, study.html, its pictures as PNG files, results.json.

Everything is read from the study's folder (megagpt.scaling.experiments); runs that failed or are missing are listed
with what is known of them, and the others count. A study may still be going on.
"""

import base64
import importlib.metadata
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2

from megagpt.config.yaml12 import dump
from megagpt.data.atomic import replace_file
from megagpt.errors import UserError
from megagpt.scaling.devices import DEFAULT_NETWORK, parse_network
from megagpt.scaling.experiments import LAUNCHERS, StudyFolder
from megagpt.scaling.fits import Fit, fit_curve
from megagpt.scaling.measurements import Curve, Interval, Point, Results, measure
from megagpt.scaling.pictures import PICTURES, Drawn
from megagpt.scaling.prediction import Predictor
from megagpt.training.history import printable
from megagpt.training.plots import compact

UNKNOWN = "–"

LEARNING_RATES = {
    "none": "The learning rate is the same for every batch (lr_scaling: none), so losses cannot be compared.",
    "sqrt": "The learning rate grows with the square root of the batch (lr_scaling: sqrt).",
    "linear": "The learning rate grows in proportion to the batch (lr_scaling: linear).",
}

DEFAULT_PREDICTOR = Predictor(parse_network(DEFAULT_NETWORK))

PIXELS_A_REM = 28
"""Of the pictures."""


@dataclass(frozen=True)
class Reported:
    """What the report found."""

    results: Results
    fits: dict[str, Fit]
    extrapolated: dict[str, list[int]]
    predictor: Predictor
    page: Path

    def lines(self) -> list[str]:
        """A line a point and a line a problem, for a terminal."""
        found = []
        for curve in self.results.curves:
            for point in curve.points:
                seconds = with_interval(point.step_seconds.interval, digits)
                rate = compact(point.tokens_per_second.value)
                efficiency = with_interval(curve.efficiency(point), percent)
                ranks = f"{point.ranks} rank{'s' * (point.ranks > 1)}"
                planned = self.predictor.step_seconds(point)
                plan = f", planned {digits(planned)} s/step" if planned else ""
                found.append(f"{curve.name}, {ranks}: {seconds} s/step, {rate} tokens/s, efficiency {efficiency}{plan}")
        titles = {entry.name: entry.title for entry in self.results.folder.entries}
        return found + [f"{titles[name]}: {why}" for name, why in self.results.problems.items()]


def write_report(folder: StudyFolder, predictor: Predictor = DEFAULT_PREDICTOR) -> Reported:
    """Write study.html, results.json and a PNG file a picture into FOLDER/report.

    Pictures of an earlier report go. Raises UserError for damaged metrics or an output that cannot be written.
    """
    results, output = measure(folder), folder.path / "report"
    fits = {curve.name: fit for curve in results.curves if (fit := fit_curve(folder.stored.kind, curve))}
    extrapolated = {curve.name: _further_ranks(folder, curve) for curve in results.curves}
    drawn = Drawn(folder.stored.kind, results.curves, fits, extrapolated)
    pictures = [(picture, content) for picture in PICTURES if (content := picture.render(drawn)) is not None]
    reported = Reported(results, fits, extrapolated, predictor, output / "study.html")
    try:
        output.mkdir(parents=True, exist_ok=True)
        for picture in PICTURES:
            (output / f"{picture.name}.png").unlink(missing_ok=True)
        for picture, content in pictures:
            (output / f"{picture.name}.png").write_bytes(content)
        replace_file(output / "results.json", (json.dumps(_as_json(reported), indent=1) + "\n").encode())
        replace_file(reported.page, _to_html(reported, pictures).encode())
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error.strerror}") from error
    return reported


Cell = tuple[str, str]
"""Of a table: a value, and its interval or nothing."""


def with_interval(interval: Interval, text: Callable[[float], str]) -> str:
    """A value and its interval: "0.213 (0.209 to 0.217)"."""
    if interval.low == interval.high:
        return text(interval.value)
    return f"{text(interval.value)} ({text(interval.low)} to {text(interval.high)})"


def digits(value: float) -> str:
    """A number in three digits or so."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def percent(share: float) -> str:
    """A share of 1 in percent."""
    return f"{100 * share:.3g} %"


def _further_ranks(folder: StudyFolder, curve: Curve) -> list[int]:
    """The numbers of ranks to predict; unless the study names them, of a strong one those that can share its batch."""
    study, last = folder.stored.timing, curve.points[-1]
    if study.extrapolate_to:
        measured = [point.ranks for point in curve.points]
        return [count for count in study.extrapolate_to if count not in measured]
    doubled = [last.ranks * multiple for multiple in (2, 4, 8)]
    if folder.stored.kind == "weak":
        return doubled
    micro = last.runs[0].entry.stored.run_config().train.micro_batch_size or 1
    return [count for count in doubled if last.batch % (count * micro) == 0]


def _rule(folder: StudyFolder, curves: list[Curve]) -> list[str]:
    """What is held and what grows, in sentences."""
    stored = folder.stored
    study = stored.timing
    if stored.kind == "strong":
        lines = ["Strong scaling: the global batch is the same on every number of ranks, so a rank's share shrinks."]
    else:
        lines = ["Weak scaling: a rank's sequences are the same on every number of ranks, the global batch grows."]
        lines.append(LEARNING_RATES[study.lr_scaling])
    lines.append("Ideal is that a rank reads as many tokens/s as on the smallest number of ranks that was measured.")
    lines.append(f"Each run: {study.steps} steps, the first {study.discard_steps} after every start not counted.")
    lines.append(
        f"{study.repeats} runs a point; intervals are 95 %, of the mean of runs (Student's t)."
        if study.repeats > 1
        else "One run a point; intervals are 95 %, of the mean of batches of its steps (Student's t), and do not hold "
        "what differs from run to run."
    )
    devices = sorted({run.device for curve in curves for point in curve.points for run in point.runs if run.device})
    lines.append(f"Runs were started {LAUNCHERS[stored.launcher]}{f', on {_join(devices)}' if devices else ''}.")
    if shared := sorted({point.ranks for curve in curves for point in curve.points if point.shared_cores}):
        lines.append(f"On {_join(list(map(str, shared)))} ranks there were fewer CPU cores than ranks: hollow in the "
                     "pictures, and left out of the fits.")  # fmt: skip
    return lines


def _plan_rule(reported: Reported) -> list[str]:
    """What the predictions are, if there are any."""
    predictor = reported.predictor
    if not any(predictor.step_seconds(point) for curve in reported.results.curves for point in curve.points):
        return []
    gigabits = predictor.network_bytes_per_second * 8 / 1e9
    devices = "devices without a row in its table are this machine, as measured" if predictor.measured else ""
    network = f"with {gigabits:,.4g} Gbit/s a GPU between nodes"
    return [f"Planned: what tools.plan says, {network}{f'; {devices}' if devices else ''}."]


def _join(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


COLUMNS = (
    ("Ranks", ""),
    ("Nodes", ""),
    ("Batch", "sequences"),
    ("Time of a step", "s, mean"),
    ("Median", "s"),
    ("Throughput", "tokens/s"),
    ("Speed-up", "over first row"),
    ("Efficiency", "of ideal"),
    ("Planned step", "s"),
    ("Planned efficiency", "of ideal"),
    ("Serial share", "Karp-Flatt"),
    ("MFU", ""),
    ("Memory", "GiB, rank 0"),
    ("Slowest rank", "over median"),
)


def _point_row(curve: Curve, point: Point, kind: str, predictor: Predictor) -> list[Cell]:
    planned, planned_efficiency = predictor.step_seconds(point), predictor.efficiency(curve, point)
    memory, straggler, mfu = (point.mean(name) for name in ("peak_memory_bytes", "straggler_ratio", "mfu"))
    serial = curve.serial_share(point) if kind == "strong" else None
    return [
        (f"{point.ranks:,}{'*' if point.shared_cores else ''}", ""),
        (f"{point.nodes:,}", ""),
        (f"{point.batch:,}", ""),
        _cell(point.step_seconds.interval, digits),
        (digits(point.mean("median_seconds") or 0.0), ""),
        _cell(point.tokens_per_second, compact),
        (f"{curve.speedup(point):.2f}", ""),
        _cell(curve.efficiency(point), percent),
        (UNKNOWN if planned is None else digits(planned), ""),
        (UNKNOWN if planned_efficiency is None else percent(planned_efficiency), ""),
        (UNKNOWN if serial is None else percent(serial), ""),
        (UNKNOWN if mfu is None else percent(mfu), ""),
        (UNKNOWN if memory is None else f"{memory / 2**30:.2f}", ""),
        (UNKNOWN if straggler is None else f"{straggler:.2f}", ""),
    ]


def _table(curve: Curve, kind: str, predictor: Predictor) -> tuple[list[tuple[str, str]], list[list[Cell]]]:
    """Columns and rows of a curve; a column of which nothing is known is left out."""
    rows = [_point_row(curve, point, kind, predictor) for point in curve.points]
    shown = [place for place in range(len(COLUMNS)) if any(row[place][0] != UNKNOWN for row in rows)]
    return [COLUMNS[place] for place in shown], [[row[place] for place in shown] for row in rows]


def _cell(interval: Interval, text: Callable[[float], str]) -> Cell:
    if interval.low == interval.high:
        return text(interval.value), ""
    return text(interval.value), f"{text(interval.low)} to {text(interval.high)}"


def _fit_texts(fit: Fit, points: int) -> list[str]:
    lines = []
    if fit.amdahl:
        share = fit.amdahl.serial_share
        limit = f"at most {digits(1 / share.value)} times as fast as one rank" if share.value > 0 else "no limit"
        lines.append(f"Amdahl's law alone: serial share {with_interval(share, percent)}, {limit}"
                     f"{_misfit_text(fit.amdahl.misfit)}.")  # fmt: skip
    for form in fit.forms:
        terms = ", ".join(f"{term}: {with_interval(value, digits)} s" for term, value in form.coefficients.items())
        lines.append(f"T(R) = {' + '.join(form.terms)} (weight {percent(form.weight)}): {terms}.")
    if points > 2:
        lines.append(
            f"The better of them{_misfit_text(fit.misfit) or ': as many coefficients as points, so nothing tests it'}."
        )
    else:
        lines.append("Two numbers of ranks cannot test a law: measure three or more.")
    return lines


def _misfit_text(misfit: float | None) -> str:
    if misfit is None:
        return ""
    verdict = "it describes the points" if misfit < 2 else "it does not describe the points"
    return f": misses the points by {misfit:.2g} times their standard errors, so {verdict}"


def _prediction_rows(fit: Fit, curve: Curve, ranks: list[int], kind: str) -> list[list[Cell]]:
    rows = []
    last = curve.points[-1]
    for count, seconds, efficiency in zip(ranks, fit.seconds(ranks), fit.efficiency(ranks), strict=True):
        tokens = last.tokens if kind == "strong" else last.tokens * count / last.ranks
        rate = Interval(tokens / seconds.value, tokens / seconds.high, tokens / seconds.low)
        rows.append([(f"{count:,}", ""), _cell(seconds, digits), _cell(rate, compact), _cell(efficiency, percent)])
    return rows


def _to_html(reported: Reported, pictures: list[tuple[Any, bytes]]) -> str:
    results, stored = reported.results, reported.results.folder.stored
    return page_template("study.html.j2").render(
        title=f"{Path(stored.source).stem}: {stored.kind} scaling",
        source=printable(stored.source),
        rule=[*_rule(results.folder, results.curves), *_plan_rule(reported)],
        curves=[(curve.name, *_table(curve, stored.kind, reported.predictor)) for curve in results.curves],
        fits=[
            (
                curve.name,
                _fit_texts(fit, sum(not point.shared_cores for point in curve.points)),
                _prediction_rows(fit, curve, reported.extrapolated[curve.name], stored.kind),
            )
            for curve in results.curves
            if (fit := reported.fits.get(curve.name))
        ],
        pictures=pictures,
        problems=[(entry.title, results.problems[entry.name], entry.name) for entry in results.folder.entries
                  if entry.name in results.problems],
        failures=failures(results.folder),
        study=dump(stored.study.model_dump(mode="json")),
        versions=stored.versions,
    )  # fmt: skip


def page_template(name: str) -> jinja2.Template:
    """A template of this package, which may ask for a picture's `base64` and its `width` on the page."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("megagpt.scaling", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode("ascii")
    environment.filters["width"] = _width
    return environment.get_template(name)


def failures(folder: StudyFolder) -> list[tuple[str, int, int | str, str, str]]:
    """(run, attempt, exit code, last error, output) of every failed attempt."""
    return [
        (entry.title, attempt.number, UNKNOWN if attempt.exit_code is None else attempt.exit_code,
         printable(attempt.error or UNKNOWN), printable(str(entry.log(attempt))))
        for entry in folder.entries for attempt in entry.stored.attempts if attempt.state == "failed"
    ]  # fmt: skip


def _width(png: bytes) -> float:
    """Of a picture on the page, in rem: as wide as it was drawn, at the page's size of letters."""
    return int.from_bytes(png[16:20]) / PIXELS_A_REM


def _as_json(reported: Reported) -> dict[str, Any]:
    results, stored = reported.results, reported.results.folder.stored
    curves = []
    for curve in results.curves:
        fit, ranks = reported.fits.get(curve.name), reported.extrapolated[curve.name]
        curves.append({
            "name": curve.name,
            "points": [
                {
                    "ranks": point.ranks, "nodes": point.nodes, "batch": point.batch, "lr": point.lr,
                    "step_seconds": asdict(point.step_seconds.interval),
                    "tokens_per_second": asdict(point.tokens_per_second),
                    "efficiency": asdict(curve.efficiency(point)),
                    "planned_step_seconds": reported.predictor.step_seconds(point),
                    "planned_efficiency": reported.predictor.efficiency(curve, point),
                    "parts": point.parts,
                    "mfu": point.mean("mfu"), "peak_memory_bytes": point.mean("peak_memory_bytes"),
                    "straggler_ratio": point.mean("straggler_ratio"), "shared_cores": point.shared_cores,
                    "runs": [run.entry.name for run in point.runs],
                }
                for point in curve.points
            ],
            "fit": None if fit is None else {
                "amdahl": asdict(fit.amdahl) if fit.amdahl else None,
                "forms": [asdict(form) for form in fit.forms],
                "misfit": fit.misfit,
                "predicted": [
                    {"ranks": count, "step_seconds": asdict(seconds), "efficiency": asdict(efficiency)}
                    for count, seconds, efficiency in zip(ranks, fit.seconds(ranks), fit.efficiency(ranks), strict=True)
                ],
            },
        })  # fmt: skip
    return {"kind": stored.kind, "source": stored.source, "curves": curves, "problems": results.problems,
            "versions": stored.versions}  # fmt: skip


def versions() -> dict[str, str]:
    """Of what decides how fast a run is."""
    return {name: importlib.metadata.version(name) for name in ("torch", "deepspeed")}
