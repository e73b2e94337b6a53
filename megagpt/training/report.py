"""The report of one or several runs: a page that needs nothing else, report.html, and its pictures as PNG files.

Everything in it is read from the runs' metrics.jsonl (megagpt.training.history). The page carries each picture twice,
for a light and a dark screen; a million records take some seconds.
"""

import base64
import importlib.resources
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import jinja2
import numpy as np

from megagpt.data.atomic import replace_file
from megagpt.errors import UsageError, UserError
from megagpt.training.history import Columns, Event, Floats, History, printable, read_histories
from megagpt.training.plots import (
    DARK,
    HOW_DRAWN,
    LIGHT,
    PICTURES,
    Picture,
    compact,
    render,
    tokens_per_second_per_rank,
)
from megagpt.training.sinks import duration

UNKNOWN = "–"
MOST_EVENTS = 300
"""Events of a run that the page lists."""
LAST_SHARE = 50
"""The final training loss is the median of the last 1/LAST_SHARE of the training records."""


@dataclass(frozen=True)
class Evaluation:
    """The loss on one validation dataset at one step."""

    step: int
    loss: float
    """Nats a token."""
    perplexity: float
    bits_per_byte: float | None
    """None: not recorded."""


@dataclass(frozen=True)
class Summary:
    """What the table on top says of one run; None: not recorded."""

    name: str
    steps: int
    """Steps done that count."""
    tokens: int | None
    """Tokens that they read."""
    training_loss: float | None
    """Median of the last 1/LAST_SHARE of the records."""
    last: dict[str, Evaluation] = field(default_factory=dict)
    """The last evaluation that has a loss, by validation dataset."""
    best: dict[str, Evaluation] = field(default_factory=dict)
    """The one with the least loss, by validation dataset."""
    tokens_per_second: float | None = None
    """Median over the records that count, of all ranks together."""
    tokens_per_second_per_rank: float | None = None
    """The same of one rank."""
    mfu: float | None = None
    """Median, a share of 1."""
    wall_seconds: float | None = None
    """From the first record to the last."""
    goodput: float | None = None
    """As last recorded, a share of 1."""
    world_sizes: tuple[int, ...] = ()
    """Ranks of each start, repetitions in a row left out."""
    restarts: int | None = None
    """Starts after the first."""
    skipped_steps: int | None = None
    """As last recorded."""
    spikes: int | None = None
    rollbacks: int | None = None
    checkpoints: int = 0
    """How many were written."""
    checkpoint_stall_seconds: float | None = None
    """Median time that training stood still for one."""
    checkpoint_bytes: float | None = None
    """Median size of one."""
    state: str = ""
    """How it ended, or when it was last heard from."""

    @classmethod
    def of(cls, run: History) -> "Summary":
        """Of one run."""
        last, best = {}, {}
        for dataset, columns in run.validation.items():
            loss = columns.counted("loss")
            known = np.flatnonzero(np.isfinite(loss))
            if len(known):
                last[dataset] = _evaluation(columns, known[-1])
                best[dataset] = _evaluation(columns, known[loss[known].argmin()])
        losses = run.train.counted("loss")
        kinds = [event.kind for event in run.events]
        sizes = [start.world_size for start in run.starts if start.world_size is not None]
        return cls(
            name=run.name,
            steps=run.last_step,
            tokens=_whole(_last(run.train.counted("tokens"))),
            training_loss=_median(losses[-max(1, len(losses) // LAST_SHARE) :]),
            last=last,
            best=best,
            tokens_per_second=_median(run.train.counted("tokens_per_second")),
            tokens_per_second_per_rank=_median(tokens_per_second_per_rank(run)),
            mfu=_median(run.train.counted("mfu")),
            wall_seconds=run.wall_seconds,
            goodput=_last(run.train.counted("goodput")),
            world_sizes=tuple(size for place, size in enumerate(sizes) if place == 0 or size != sizes[place - 1]),
            restarts=len(run.starts) - 1 if run.starts else None,
            skipped_steps=_whole(_last(run.train.counted("skipped_steps"))),
            spikes=kinds.count("spike") if kinds else None,
            rollbacks=kinds.count("rollback") if kinds else None,
            checkpoints=len(run.checkpoints),
            checkpoint_stall_seconds=_median(run.checkpoint_stalls()),
            checkpoint_bytes=_median(run.checkpoints.values["bytes"]),
            state=_state(run),
        )


def write_report(run_dirs: Sequence[Path], output: Path) -> list[Summary]:
    """Write report.html and a PNG file a picture into `output`; returns what the table says, run by run.

    Pictures of an earlier report in `output` go. Raises UsageError for a folder that is no run or is given twice and
    for an output that is a file, UserError for an empty or damaged metrics.jsonl or an output that cannot be written.
    """
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output}: is a file; name a folder for the report")
    runs = read_histories(run_dirs)
    summaries = [Summary.of(run) for run in runs]
    drawn = [(picture, render(picture, runs, LIGHT), render(picture, runs, DARK)) for picture in PICTURES]
    pictures = [(picture, light, dark) for picture, light, dark in drawn if light is not None and dark is not None]
    try:
        output.mkdir(parents=True, exist_ok=True)
        for picture in PICTURES:
            _png(output, picture).unlink(missing_ok=True)
        for picture, light, _ in pictures:
            _png(output, picture).write_bytes(light)
        replace_file(output / "report.html", _to_html(runs, summaries, pictures).encode())
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error.strerror}") from error
    return summaries


def table_rows(summaries: Sequence[Summary]) -> list[tuple[str, list[str]]]:
    """The table of the page: (what, its text for each run). A quantity that no run has is left out.

    A text may have details on a second line.
    """
    datasets = list(dict.fromkeys(name for summary in summaries for name in summary.last))
    rows = [
        ("Steps", [f"{one.steps:,}" for one in summaries]),
        ("Tokens", [_optional(one.tokens, compact) for one in summaries]),
        (
            f"Training loss, median of the last {100 // LAST_SHARE} %",
            [_optional(one.training_loss, "{:.4f}".format) for one in summaries],
        ),
    ]
    for dataset in datasets:
        for title, found in (
            ("last", [one.last.get(dataset) for one in summaries]),
            ("best", [one.best.get(dataset) for one in summaries]),
        ):
            rows.append((f"{dataset}: {title} loss", [_optional(one, _evaluation_text) for one in found]))
    rows += [
        ("Tokens/s, median", [_optional(one.tokens_per_second, compact) for one in summaries]),
        ("Tokens/s of a rank, median", [_optional(one.tokens_per_second_per_rank, compact) for one in summaries]),
        ("MFU, median", [_optional(one.mfu, _percent) for one in summaries]),
        ("Ranks", [" → ".join(map(str, one.world_sizes)) or UNKNOWN for one in summaries]),
        ("Wall time", [_optional(one.wall_seconds, duration) for one in summaries]),
        ("Goodput", [_optional(one.goodput, _percent) for one in summaries]),
        ("Restarts", [_optional(one.restarts, str) for one in summaries]),
        ("Skipped steps", [_optional(one.skipped_steps, "{:,}".format) for one in summaries]),
        ("Loss spikes", [_optional(one.spikes, "{:,}".format) for one in summaries]),
        ("Rollbacks", [_optional(one.rollbacks, "{:,}".format) for one in summaries]),
        ("Checkpoints", [f"{one.checkpoints:,}" for one in summaries]),
        ("Checkpoint stall, median", [_optional(one.checkpoint_stall_seconds, _seconds) for one in summaries]),
        ("Checkpoint size, median", [_optional(one.checkpoint_bytes, _size) for one in summaries]),
        ("State", [one.state for one in summaries]),
    ]
    return [(title, cells) for title, cells in rows if set(cells) != {UNKNOWN}]


def listed_events(run: History) -> list[Event]:
    """The events of a run for its page, at most MOST_EVENTS: the oldest spikes and skipped steps go first."""
    too_many = max(0, len(run.events) - MOST_EVENTS)
    frequent = [place for place, event in enumerate(run.events) if event.kind in ("spike", "skipped")]
    left_out = set(frequent[:too_many])
    return [event for place, event in enumerate(run.events) if place not in left_out][-MOST_EVENTS:]


def _to_html(runs: list[History], summaries: list[Summary], pictures: list[tuple[Picture, bytes, bytes]]) -> str:
    source = importlib.resources.files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        base64=lambda content: base64.b64encode(content).decode("ascii"),
        count=lambda number: f"{number:,}",
        printable=lambda path: printable(str(path)),
        listed=listed_events,
        moment=lambda seconds: UNKNOWN if seconds is None else _moment(seconds),
    )
    return environment.from_string(source).render(
        runs=runs,
        rows=table_rows(summaries),
        pictures=pictures,
        colors=list(zip(LIGHT.series, DARK.series, strict=True)),
        how_drawn=HOW_DRAWN,
    )


def _png(output: Path, picture: Picture) -> Path:
    return output / f"{picture.name}.png"


def _evaluation(columns: Columns, place: int) -> Evaluation:
    step, loss, perplexity, bits = (
        float(columns.counted(name)[place]) for name in ("step", "loss", "perplexity", "bits_per_byte")
    )
    if math.isnan(perplexity):
        perplexity = math.exp(min(loss, 700.0))
    return Evaluation(int(step), loss, perplexity, None if math.isnan(bits) else bits)


def _state(run: History) -> str:
    ends = [event for event in run.events if event.kind in ("start", "stop")]
    if ends and ends[-1].kind == "stop":
        return ends[-1].text if ends[-1].text == "finished" else f"stopped: {ends[-1].text}"
    if run.last_time is None:
        return UNKNOWN
    return f"no stop recorded; last heard from {_moment(run.last_time)} UTC"


def _last(values: Floats) -> float | None:
    known = values[np.isfinite(values)]
    return float(known[-1]) if len(known) else None


def _median(values: Floats) -> float | None:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else None


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)


def _optional(value, text) -> str:  # type: ignore[no-untyped-def]
    return UNKNOWN if value is None else text(value)


def _evaluation_text(evaluation: Evaluation) -> str:
    bits = "" if evaluation.bits_per_byte is None else f", {evaluation.bits_per_byte:.4f} bits per byte"
    return f"{evaluation.loss:.4f}\nstep {evaluation.step:,}, perplexity {evaluation.perplexity:,.2f}{bits}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 100 else duration(seconds)


def _size(number: float) -> str:
    return compact(number, (" bytes", " kB", " MB", " GB", " TB"))


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
