"""The report of a scaling-law study: one page that needs nothing else, laws.html, its pictures, results.json.

Everything is read from the study's folder (megagpt.scaling.experiments), coordinates.json included, which a coordinate
check leaves there. Runs that failed or are missing are listed with what is known of them, and the others count.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megagpt.config.yaml12 import dump
from megagpt.data.atomic import replace_file
from megagpt.errors import UserError
from megagpt.scaling.experiments import LAUNCHERS, StudyFolder
from megagpt.scaling.laws.coordinates import FLAT, STEPS, Coordinates, check_coordinates
from megagpt.scaling.laws.findings import Findings, find
from megagpt.scaling.laws.fit import COEFFICIENTS
from megagpt.scaling.laws.law import PUBLISHED
from megagpt.scaling.laws.pictures import PICTURES, Drawn
from megagpt.scaling.laws.study import LawsConfig, short
from megagpt.scaling.measurements import Interval
from megagpt.scaling.report import UNKNOWN, Cell, digits, failures, page_template, with_interval
from megagpt.training.history import printable
from megagpt.training.plots import compact

COUNTED = {"all": "all of them", "body": "without embeddings and head"}
_COORDINATES = "coordinates.json"


@dataclass(frozen=True)
class LawsReported:
    """What the report found."""

    findings: Findings
    coordinates: list[Coordinates]
    titles: dict[str, str]
    """Of the runs, by name."""
    page: Path

    def lines(self) -> list[str]:
        """The law, the prediction, the optima and a line a problem, for a terminal."""
        found, lines = self.findings, []
        for run in found.ladder.runs:
            lines.append(f"{self.titles[run.name]}: N {run.parameters:,}, D {run.tokens:,}, loss {run.loss:.4f}")
        if found.fit:
            values = (f"{name} {with_interval(found.fit.coefficient(name), digits)}" for name in COEFFICIENTS)
            lines.append(f"L(N, D) = E + A / N^alpha + B / D^beta: {', '.join(values)}")
        for one in found.held_out:
            lines.append(f"held out: {self.titles[one.run.name]}: predicted {with_interval(one.predicted, _loss)}, "
                         f"measured {one.run.loss:.4f}, {100 * one.error:+.2f} %")  # fmt: skip
        for best in found.best:
            size, tokens = with_interval(best.parameters, compact), with_interval(best.tokens, compact)
            loss = with_interval(best.loss, _loss)
            lines.append(f"best for {short(best.flops)} FLOPs: N {size}, D {tokens}, loss {loss}")
        lines += _doubts(found)
        lines += [_coordinates_text(one) for one in self.coordinates]
        return lines + [f"{self.titles[name]}: {why}" for name, why in found.ladder.problems.items()]


def write_laws_report(folder: StudyFolder) -> LawsReported:
    """Write laws.html, results.json and a PNG file a picture into FOLDER/report.

    Pictures of an earlier report go. Raises UserError for damaged metrics or an output that cannot be written.
    """
    output = folder.path / "report"
    found, coordinates = find(folder), _read_coordinates(folder)
    titles = {entry.name: entry.stored.curve for entry in folder.entries}
    reported = LawsReported(found, coordinates, titles, output / "laws.html")
    drawn = Drawn(found, coordinates, folder.stored.ladder.count)
    pictures = [(picture, content) for picture in PICTURES if (content := picture.render(drawn)) is not None]
    try:
        output.mkdir(parents=True, exist_ok=True)
        for picture in PICTURES:
            (output / f"{picture.name}.png").unlink(missing_ok=True)
        for picture, content in pictures:
            (output / f"{picture.name}.png").write_bytes(content)
        replace_file(output / "results.json", (json.dumps(_as_json(reported), indent=1) + "\n").encode())
        replace_file(reported.page, _to_html(folder, reported, pictures).encode())
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error.strerror}") from error
    return reported


def check_and_keep_coordinates(folder: StudyFolder) -> None:
    """Check the first size of a study, and leave what was found in its folder for the report."""
    config = folder.entries[0].stored.run_config()
    found = [one.described() for one in check_coordinates(config)]
    replace_file(folder.path / _COORDINATES, (json.dumps(found, indent=1) + "\n").encode())


def _read_coordinates(folder: StudyFolder) -> list[Coordinates]:
    path = folder.path / _COORDINATES
    if not path.is_file():
        return []
    try:
        return [Coordinates(**one) for one in json.loads(path.read_bytes())]
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}); make it again with --coordinates") from None


def _loss(value: float) -> str:
    return f"{value:.4f}"


def _cell(interval: Interval, text: Callable[[float], str]) -> Cell:
    return text(interval.value), f"{text(interval.low)} to {text(interval.high)}"


def _rule(folder: StudyFolder, found: Findings) -> list[str]:
    """What was trained and what N, D and FLOPs are, in sentences."""
    study = folder.stored.ladder
    seconds = [run.seconds for run in found.ladder.runs if run.seconds is not None]
    sentences = [
        f"{len(found.ladder.runs)} of {len(folder.entries)} runs have finished. Each has a schedule of its own: "
        f"warm-up for {100 * study.warmup_share:g} % of its steps, then a cosine to the end of its budget.",
        _learning_rates(study),
        f"N is the number of parameters, {COUNTED[study.count]}; D counts the tokens of all steps; FLOPs are those of "
        "forward and backward over D, by megagpt.model.counts. Losses are of the whole validation dataset after the "
        "last step, in nats a token.",
        "Intervals are 95 %.",
    ]
    if seconds:
        sentences.append(f"Runs were started {LAUNCHERS[folder.stored.launcher]}, and took {sum(seconds) / 60:.0f} "
                         "minutes together.")  # fmt: skip
    return sentences


def _learning_rates(study: LawsConfig) -> str:
    if study.transfer == "mup":
        return f"The learning rate of the first size, {study.lr:g}, serves all by muP (Yang et al. 2022)."
    if study.lr_exponent:
        return f"The learning rate goes from size to size as N^{study.lr_exponent:g}, from {study.lr:g} at the first."
    return f"The learning rate is {study.lr:g} for all sizes, as it is."


def _doubts(found: Findings) -> list[str]:
    """What the reader should know before believing the law."""
    doubts = []
    if found.unfitted:
        doubts.append(f"No law: there are {found.unfitted}.")
    if found.unpredicted and not found.unfitted:
        doubts.append(f"Nothing is predicted: {found.unpredicted}.")
    if found.fit and found.fit.at_bounds:
        doubts.append(f"The runs do not determine {', '.join(found.fit.at_bounds)}: the fit left it at its bound.")
    if found.fit and found.cost.misfit > 0.05:
        doubts.append(f"FLOPs a token are not a power law of N, which optima take them for: up to "
                      f"{100 * found.cost.misfit:.0f} % off.")  # fmt: skip
    doubts += [f"IsoFLOP curve of {short(curve.flops)} FLOPs: {curve.problem}." for curve in found.isoflops
               if curve.problem]  # fmt: skip
    return doubts


def _coordinates_text(found: Coordinates) -> str:
    names = {"mup": "muP", "standard": "One learning rate for all widths"}
    exponents = ", ".join(f"{place} {exponent:+.2f}" for place, exponent in found.exponents.items())
    verdict = "no change depends on the width" if found.is_flat else "changes depend on the width"
    return (f"{names[found.parametrisation]}, {STEPS} steps, widths {found.widths[0]} to {found.widths[-1]}: exponents "
            f"{exponents}; {verdict} (at most {FLAT:g} up or down)")  # fmt: skip


RUN_COLUMNS = (
    ("Run", ""),
    ("N", "parameters"),
    ("D", "tokens"),
    ("D / N", ""),
    ("Compute", "FLOPs"),
    ("Steps", ""),
    ("Learning rate", "peak"),
    ("Loss", "nats/token"),
    ("Law", "nats/token"),
    ("Residual", "of the law"),
)


def _run_rows(reported: LawsReported) -> list[list[Cell]]:
    rows, fit = [], reported.findings.fit
    for number, run in enumerate(reported.findings.ladder.runs):
        law = float(fit.law.loss(run.parameters, run.tokens)) if fit else None
        rows.append([
            (reported.titles[run.name], ""), (f"{run.parameters:,}", ""), (f"{run.tokens:,}", ""),
            (digits(run.tokens / run.parameters), ""), (short(run.flops), ""), (f"{run.steps:,}", ""),
            (f"{run.lr:.3g}", ""), (_loss(run.loss), ""), (UNKNOWN if law is None else _loss(law), ""),
            (f"{100 * (run.loss / law - 1):+.2f} %" if law and fit and number < len(fit.residuals) else UNKNOWN, ""),
        ])  # fmt: skip
    return rows


def _coefficient_rows(found: Findings) -> list[list[Cell]]:
    """The law's coefficients, and those that others published."""
    if found.fit is None:
        return []
    ours = [_cell(found.fit.coefficient(name), digits) for name in COEFFICIENTS]
    rows = [[("this ladder", ""), *ours, _cell(found.fit.size_exponent(found.cost), digits)]]
    for name, law in PUBLISHED.items():
        rows.append([(name, ""), *((digits(getattr(law, one)), "") for one in COEFFICIENTS),
                     (digits(law.size_exponent()), "")])  # fmt: skip
    return rows


def _held_out_rows(reported: LawsReported) -> list[list[Cell]]:
    return [
        [(reported.titles[one.run.name], ""), (_loss(one.run.loss), ""), _cell(one.predicted, _loss),
         (f"{100 * one.error:+.2f} %", ""),
         ("yes" if one.predicted.low <= one.run.loss <= one.predicted.high else "no", "")]
        for one in reported.findings.held_out
    ]  # fmt: skip


def _best_rows(found: Findings) -> list[list[Cell]]:
    return [
        [(short(best.flops), ""), _cell(best.parameters, compact), _cell(best.tokens, compact),
         (f"{best.tokens.value / best.parameters.value:.3g}", ""), _cell(best.loss, _loss),
         (UNKNOWN if best.by_isoflop is None else compact(best.by_isoflop), "")]
        for best in found.best
    ]  # fmt: skip


def _notes(found: Findings) -> list[str]:
    """How optima come about, in sentences."""
    if found.fit is None:
        return []
    notes = [
        f"A token costs {digits(found.cost.k)} N^{found.cost.kappa:.3f} FLOPs on this ladder (a power law through "
        f"its sizes, at most {100 * found.cost.misfit:.1f} % off); the usual 6 N holds for large models."
    ]
    if found.size_law:
        notes.append(f"The best size grows as C^{with_interval(found.size_law.exponent, digits)} by the minima of the "
                     "IsoFLOP curves.")  # fmt: skip
    return notes


def _to_html(folder: StudyFolder, reported: LawsReported, pictures: list[tuple[Any, bytes]]) -> str:
    found, stored = reported.findings, folder.stored
    return page_template("laws/laws.html.j2").render(
        title=f"{Path(stored.source).stem}: scaling law",
        source=printable(stored.source),
        versions=stored.versions,
        rule=_rule(folder, found),
        doubts=_doubts(found),
        problems=[(reported.titles[name], why, name) for name, why in found.ladder.problems.items()],
        coefficients=_coefficient_rows(found),
        held_out=_held_out_rows(reported),
        best=_best_rows(found),
        notes=_notes(found),
        run_columns=RUN_COLUMNS,
        runs=_run_rows(reported),
        coordinates=[_coordinates_text(one) for one in reported.coordinates],
        pictures=pictures,
        failures=failures(folder),
        study=dump(stored.study.model_dump(mode="json")),
    )


def _as_json(reported: LawsReported) -> dict[str, Any]:
    found = reported.findings
    fit = found.fit
    return {
        "runs": [asdict(run) for run in found.ladder.runs],
        "problems": found.ladder.problems,
        "law": None if fit is None else {
            **{name: asdict(fit.coefficient(name)) for name in COEFFICIENTS},
            "size_exponent": asdict(fit.size_exponent(found.cost)),
            "residuals": fit.residuals.tolist(),
        },
        "cost": asdict(found.cost),
        "held_out": [
            {"run": one.run.name, "measured": one.run.loss, "predicted": asdict(one.predicted)}
            for one in found.held_out
        ],
        "isoflops": [
            {"flops": curve.flops, "parameters": asdict(curve.best) if curve.best else None, "problem": curve.problem}
            for curve in found.isoflops
        ],
        "isoflop_exponent": asdict(found.size_law.exponent) if found.size_law else None,
        "best": [asdict(best) for best in found.best],
        "doubts": _doubts(found),
        "coordinates": [one.described() | {"exponents": one.exponents} for one in reported.coordinates],
    }  # fmt: skip
