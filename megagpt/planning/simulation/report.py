"""A simulation as tables, as JSON, and as one page with PNG files beside it."""

import base64
import importlib.metadata
import importlib.resources
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2

from megagpt.data.atomic import replace_file
from megagpt.errors import UserError
from megagpt.planning.report import PIXELS_A_REM, UNKNOWN, layout_text
from megagpt.planning.simulation.job import PARTS, Job
from megagpt.planning.simulation.pictures import Drawing, draw
from megagpt.planning.simulation.scenarios import ENOUGH
from megagpt.planning.simulation.stragglers import Stragglers
from megagpt.planning.simulation.study import Agreement, Outcome, Simulation
from megagpt.planning.units import duration_text, size_text
from megagpt.scaling.measurements import Interval

PAGE = "simulation.html"


@dataclass(frozen=True)
class Table:
    """Columns with their rows."""

    title: str
    columns: tuple[str, ...]
    rows: list[list[str]]


def tables(simulation: Simulation) -> list[Table]:
    """What a terminal and the page show."""
    return [_scenarios(simulation), _time(simulation), _agreement(simulation)]


def conditions_lines(simulation: Simulation) -> list[str]:
    """What was played, in sentences."""
    conditions, job = simulation.conditions, simulation.outcomes[simulation.chosen].scenario.job
    law = "exponential lives" if conditions.shape == 1 else f"Weibull lives of shape {conditions.shape:g}"
    waits = "the run goes on with fewer nodes" if conditions.fewer_nodes else "the run waits"
    return [
        f"Nodes: {job.nodes:,}, each with {duration_text(job.wear.mtbf_seconds)} between failures ({law}), back after "
        f"{duration_text(job.wear.repair_seconds)} on average; without a spare {waits}.",
        _restart_line(job),
        f"A step: {duration_text(job.step_seconds)}; {_stragglers(conditions.stragglers)}. A checkpoint: "
        f"{size_text(simulation.plan.checkpoint.size)}, written in {duration_text(job.saving.write_seconds)}.",
        f"Played: {conditions.days:g} days, {conditions.runs} runs; in brackets: 95 % intervals of the mean.",
    ]


def verdict(simulation: Simulation) -> str:
    """The chosen scenario, in a sentence."""
    outcome = simulation.outcomes[simulation.chosen]
    text = f"{outcome.scenario.name}: goodput {_interval(outcome.goodput, _percent)}"
    return f"{text}; all steps take {_days(simulation, outcome)}"


def as_json(simulation: Simulation, source: str) -> dict[str, Any]:
    """Everything, in seconds and shares of 1; an interval is its value and its ends."""
    conditions = asdict(simulation.conditions)
    return {
        "source": source,
        "simpy": importlib.metadata.version("simpy"),
        "layout": asdict(simulation.plan.layout),
        "conditions": conditions,
        "chosen": simulation.chosen,
        "scenarios": [_outcome_json(simulation, outcome) for outcome in simulation.outcomes],
        "closed_form": [_agreement_json(agreement) for agreement in simulation.agreements],
        "intervals": [
            {
                "asynchronous": sweep.asynchronous,
                "best_seconds": sweep.best_seconds,
                "points": [
                    {**_agreement_json(assumed), "goodput": asdict(real)} for assumed, real in sweep.points
                ],
            }
            for sweep in simulation.sweeps
        ],
        "spares": [
            {
                "spares": outcome.scenario.job.spares,
                "goodput": asdict(outcome.goodput),
                "goodput_of_all_nodes": asdict(outcome.goodput_of_all_nodes),
            }
            for outcome in simulation.over_spares
        ],
    }  # fmt: skip


def write_report(simulation: Simulation, source: str, folder: Path) -> Path:
    """Write the page, results.json and a PNG file a picture; returns the page. Raises UserError if it cannot."""
    pictures = draw(simulation)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            replace_file(folder / f"{picture.name}.png", picture.png)
        replace_file(folder / "results.json", (json.dumps(as_json(simulation, source), indent=1) + "\n").encode())
        replace_file(folder / PAGE, _page(simulation, source, pictures).encode())
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from error
    return folder / PAGE


def _page(simulation: Simulation, source: str, pictures: list[Drawing]) -> str:
    template = importlib.resources.files(__package__).joinpath("simulation.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode("ascii")
    environment.filters["width"] = lambda png: int.from_bytes(png[16:20]) / PIXELS_A_REM
    return environment.from_string(template).render(
        source=source,
        layout=layout_text(simulation.plan),
        verdict=verdict(simulation),
        conditions=conditions_lines(simulation),
        tables=tables(simulation),
        pictures=pictures,
        enough=f"{100 * ENOUGH:g} %",
        seed=simulation.conditions.seed,
    )


def _restart_line(job: Job) -> str:
    line = (
        f"A restart: {duration_text(job.detection_seconds)} until a failure is noticed, "
        f"{duration_text(job.start_seconds)} until training goes on"
    )
    if job.replacement_seconds:
        line += f", {duration_text(job.replacement_seconds)} more for another node"
    if job.preemption:
        every, away = (duration_text(value) for value in (job.preemption.every_seconds, job.preemption.away_seconds))
        line += f". Pre-empted every {every} on average, for {away}"
    return f"{line}."


def _stragglers(stragglers: Stragglers) -> str:
    jitter = f"a node's varies by {100 * stragglers.jitter:g} % (log-normal)"
    parts = [jitter] if stragglers.jitter else []
    if stragglers.slow_share:
        parts.append(f"{100 * stragglers.slow_share:g} % of nodes take {stragglers.slow_factor:g} times as long")
    return "; ".join(parts) or "nodes are equal"


def _scenarios(simulation: Simulation) -> Table:
    columns = ("scenario", "saves every", "goodput", "gain", "of all nodes", "failures", "all steps")
    rows = []
    for place, outcome in enumerate(simulation.outcomes):
        scenario = outcome.scenario
        rows.append([
            scenario.name + (" (this run)" if place == simulation.chosen else ""),
            duration_text(scenario.every_seconds),
            _interval(outcome.goodput, _percent),
            _interval(outcome.gain(simulation.outcomes[0]), _points) if place else UNKNOWN,
            _percent(outcome.goodput_of_all_nodes.value),
            f"{outcome.interruptions.value:,.0f}",
            _days(simulation, outcome),
        ])  # fmt: skip
    return Table("Goodput", columns, rows)


def _time(simulation: Simulation) -> Table:
    shares = [outcome.parts for outcome in simulation.outcomes]
    rows = [
        [part, *(_interval(parts[part], _percent) for parts in shares)]
        for part in PARTS
        if any(parts[part].value for parts in shares)
    ]
    return Table("Where the time goes", ("", *(outcome.scenario.name for outcome in simulation.outcomes)), rows)


def _agreement(simulation: Simulation) -> Table:
    columns = ("checkpoints", "saved every", "closed form", "simulated, as it assumes", "in the interval")
    rows = [
        [
            "asynchronous" if one.asynchronous else "synchronous",
            duration_text(one.every_seconds),
            _percent(one.closed_form),
            _interval(one.simulated, _percent),
            {True: "yes", False: "no", None: "too few failures to say"}[one.agrees],
        ]
        for one in simulation.agreements
    ]
    return Table("The closed form, and runs as it assumes them: equal nodes, a spare always at hand", columns, rows)


def _days(simulation: Simulation, outcome: Outcome) -> str:
    goodput = outcome.goodput.value
    return duration_text(simulation.plan.training_seconds / goodput) if goodput > 0 else "for ever"


def _interval(interval: Interval, text: Callable[[float], str]) -> str:
    if interval.low == interval.high:
        return text(interval.value)
    return f"{text(interval.value)} ({text(interval.low)} to {text(interval.high)})"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _points(share: float) -> str:
    return f"{100 * share:+.2f}"


def _outcome_json(simulation: Simulation, outcome: Outcome) -> dict[str, Any]:
    scenario, goodput = outcome.scenario, outcome.goodput
    return {
        "name": scenario.name,
        "asynchronous": scenario.asynchronous,
        "spares": scenario.job.spares,
        "every_steps": scenario.job.saving.every_steps,
        "every_seconds": scenario.every_seconds,
        "stall_seconds": scenario.job.saving.stall_seconds,
        "write_seconds": scenario.job.saving.write_seconds,
        "goodput": asdict(goodput),
        "goodput_of_all_nodes": asdict(outcome.goodput_of_all_nodes),
        "gain": asdict(outcome.gain(simulation.outcomes[0])),
        "parts": {part: asdict(interval) for part, interval in outcome.parts.items()},
        "interruptions": asdict(outcome.interruptions),
        "seconds": simulation.plan.training_seconds / goodput.value if goodput.value > 0 else None,
        "goodputs": outcome.goodputs.tolist(),
    }


def _agreement_json(agreement: Agreement) -> dict[str, Any]:
    return {
        "asynchronous": agreement.asynchronous,
        "every_seconds": agreement.every_seconds,
        "closed_form": agreement.closed_form,
        "as_assumed": asdict(agreement.simulated),
        "failures": agreement.failures,
    }
