"""python -m launch.status: how runs stand, on one screen, from their folders and from Slurm's queue."""

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from launch.squeue import ask_slurm
from megagpt.errors import UsageError
from megagpt.training.attempts import Ending
from megagpt.training.history import distinct_names, printable
from megagpt.training.plots import compact
from megagpt.training.sinks import duration
from megagpt.training.status import State, Status, check_is_run, is_run, judge, read_sources
from tools.command import run_command, single_command

PROGRAM = "python -m launch.status"

UNKNOWN = "-"
BAR_LENGTH = 30
RESTARTS_SHOWN = 3

_STYLES: dict[State, str] = {
    "running": "green",
    "starting": "green",
    "finished": "green",
    "waiting": "yellow",
    "stopped": "yellow",
    "not started": "yellow",
    "stale": "red",
    "held": "red",
    "failed": "red",
    "ended silently": "red",
}
_CAUSES: dict[Ending, str] = {
    "signal": "stopped by a signal",
    "silent": "killed or node lost",
    "hang": "hung",
    "failure": "failed",
    "finished": "went on after its end",
}


def main(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders of runs (train.run_dir).")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a run and line.")] = False,
    watch: Annotated[
        float | None, typer.Option(min=1, metavar="SECONDS", help="Again and again, so often, until interrupted.")
    ] = None,
) -> None:
    """Show how a run stands: progress, time left, goodput, newest checkpoint, restarts, its job in Slurm's queue.

    Of several runs each is one line. A run may be going, waiting, or over; nothing in its folder is changed.

    Example: python -m launch.status runs/small --watch 10
    """
    folders = _chosen(runs)
    console = Console(highlight=False, markup=False, emoji=False)
    if watch is None:
        _print(_look(folders), as_json, console)
        return
    try:
        _watch(folders, as_json, console, watch)
    except KeyboardInterrupt:  # the way to end it
        return


def _chosen(paths: Sequence[Path]) -> list[Path]:
    """The runs among them. Of several, what is there but no run is left out: `runs/*` may name anything."""
    for number, path in enumerate(paths):
        if path.resolve() in [earlier.resolve() for earlier in paths[:number]]:
            raise UsageError(f"{path}: is given twice; give each run once")
        if len(paths) == 1 or not path.exists():
            check_is_run(path)
    runs = [path for path in paths if is_run(path)]
    if not runs:
        raise UsageError(f"{paths[0]} and {len(paths) - 1} more: no run; give folders that train.run_dir names")
    if left_out := [printable(str(path)) for path in paths if path not in runs]:
        print(f"left out, no runs: {', '.join(left_out)}", file=sys.stderr)
    return runs


def _look(folders: Sequence[Path]) -> list[Status]:
    names = [printable(str(folders[0]))] if len(folders) == 1 else distinct_names(folders)
    sources = [read_sources(folder, name) for folder, name in zip(folders, names, strict=True)]
    answers = ask_slurm({source.job_id for source in sources if source.job_id})
    now = time.time()
    return [judge(source, answers[source.job_id] if source.job_id else None, now) for source in sources]


def _watch(folders: Sequence[Path], as_json: bool, console: Console, seconds: float) -> None:
    if as_json or not console.is_terminal:
        while True:
            _print(_look(folders), as_json, console)
            print(end="" if as_json else "\n", flush=True)
            time.sleep(seconds)
    with Live(render(_look(folders)), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(seconds)
            live.update(render(_look(folders)), refresh=True)


def _print(statuses: Sequence[Status], as_json: bool, console: Console) -> None:
    if as_json:
        for status in statuses:
            print(json.dumps(dataclasses.asdict(status), allow_nan=False))
        return
    shown = render(statuses)
    if console.is_terminal:
        console.print(shown)
        return
    # In a file or pipe a line about one of several runs is as long as it needs to be; none is filled up with spaces.
    width = None if len(statuses) == 1 else max(console.width, console.measure(shown).maximum)
    with console.capture() as capture:
        console.print(shown, width=width)
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))


def render(statuses: Sequence[Status]) -> RenderableType:
    """A screen about one run, a line about each of several."""
    return _details(statuses[0]) if len(statuses) == 1 else _lines(statuses)


# ---- one run


def _details(status: Status) -> RenderableType:
    is_training = status.state in ("running", "stale") and status.ranks is not None
    ranks = f" on {status.ranks} rank{'s' * (status.ranks != 1)}" if is_training else ""
    detail = f": {status.detail}" if status.detail else ""
    state = Text.assemble((status.state, _STYLES[status.state]), ranks, detail)
    rows: list[tuple[str, str | Text]] = [
        ("Run", Text(status.name, style="bold")),
        ("State", state),
        ("Progress", _progress(status)),
        ("Loss", _losses(status)),
        ("Speed", _speed(status)),
        ("Time left", _time_left(status)),
        ("Goodput", _goodput(status)),
        ("Checkpoint", _checkpoint(status)),
        ("Restarts", _restarts(status)),
        ("Slurm job", _job(status)),
        ("Unreadable", "\n".join(printable(note) for note in status.notes)),
    ]
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for title, content in rows:
        if content:
            table.add_row(title, content)
    return table


def _progress(status: Status) -> str:
    training, total = status.training, status.total_steps
    if not total:
        return f"step {training.step:,}"
    share = min(1.0, training.step / total)
    full = int(share * BAR_LENGTH)
    tokens = ""
    if training.tokens is not None and status.total_tokens:
        tokens = f"\n{compact(training.tokens)} of {compact(status.total_tokens)} tokens"
    return f"[{'#' * full}{'.' * (BAR_LENGTH - full)}] {share:.1%}, step {training.step:,} of {total:,}{tokens}"


def _losses(status: Status) -> str:
    training = status.training
    lines = [f"{training.loss:.4f} at step {training.loss_step:,}"] if training.loss is not None else []
    lines += [f"{loss:.4f} on {dataset} at step {step:,}" for dataset, (step, loss) in training.validation.items()]
    return "\n".join(lines)


def _speed(status: Status) -> str:
    training = status.training
    known = []
    if training.tokens_per_second is not None:
        known.append(f"{compact(training.tokens_per_second)} tokens/s")
    if training.mfu is not None:
        known.append(f"MFU {training.mfu:.1%}")
    if training.step_seconds is not None:
        known.append(f"{training.step_seconds:.3g} s a step")
    return ", ".join(known)


def _time_left(status: Status) -> str:
    left, lines = status.time_left, []
    if left.productive_seconds is not None:
        end = f", until {_clock(left.productive_end, status.now)}" if left.productive_end is not None else ""
        lines.append(f"{duration(left.productive_seconds)} of training{end}, if nothing interrupts it")
    if left.overall_seconds is not None and left.overall_end is not None:
        end = _clock(left.overall_end, status.now)
        lines.append(f"{duration(left.overall_seconds)}, until {end}, at the rate since its start, waits included")
    return "\n".join(lines)


def _goodput(status: Status) -> str:
    goodput = status.training.goodput
    return "" if goodput is None else f"{goodput:.1%} of the time since its first start went into steps that count"


def _checkpoint(status: Status) -> str:
    saved, unsaved = status.checkpoint, status.unsaved
    text = "none yet"
    if saved:
        size = compact(saved.size, (" bytes", " kB", " MB", " GB", " TB"))
        text = f"{saved.name}, {duration(max(0.0, status.now - saved.time))} old, {size}"
    if not unsaved.steps and not unsaved.seconds:
        return text
    work = f"{unsaved.steps:,} step{'s' * (unsaved.steps != 1)}, {duration(unsaved.seconds)} of work"
    return f"{text}\n{'dying now would lose' if status.is_alive else 'not saved:'} {work}"


def _restarts(status: Status) -> str:
    if not status.restarts:
        return "none"
    causes = ", ".join(f"{count} {_CAUSES[cause]}" for cause, count in status.cause_counts.items())
    lines = [f"{len(status.restarts)}: {causes}"]
    for restart in status.restarts[-RESTARTS_SHOWN:]:
        when = UNKNOWN if restart.time is None else _clock(restart.time, status.now)
        job = f" in job {restart.job}" if restart.job else ""
        why = f": {restart.reason}" if restart.reason and restart.cause not in ("silent", "finished") else ""
        lines.append(f"{when} from step {restart.step:,}{job}, {_CAUSES[restart.cause]}{why}")
    return "\n".join(lines)


def _job(status: Status) -> str:
    job = status.job
    if status.job_id is None:
        return ""
    if job is None:
        return f"{status.job_id}: {status.job_problem or 'Slurm does not know it any more'}"
    parts = [f"{job.id}: {job.state}"]
    if job.reason:
        parts.append(f"reason {job.reason}")
    if job.node_count:
        parts.append(f"{job.node_count} node{'s' * (job.node_count > 1)} {job.nodes}".strip())
    if job.is_active and job.time_left:
        parts.append(f"{job.time_left} left")
    if job.is_pending:
        parts.append(f"expected to start {_clock(job.start, status.now)}" if job.start else "no start is estimated yet")
    return ", ".join(parts)


# ---- several runs


def _lines(statuses: Sequence[Status]) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("run", overflow="ellipsis", no_wrap=True)
    for title in ("state", "step", "done", "loss", "left", "saved", "restarts", "job"):
        table.add_column(title, no_wrap=True, justify="left" if title in ("state", "job") else "right")
    for status in statuses:
        training, total, left = status.training, status.total_steps, status.time_left.productive_seconds
        table.add_row(
            status.name,
            Text(status.state, style=_STYLES[status.state]),
            f"{training.step:,}",
            f"{min(1.0, training.step / total):.0%}" if total else UNKNOWN,
            f"{training.loss:.3f}" if training.loss is not None else UNKNOWN,
            UNKNOWN if left is None else duration(left),
            UNKNOWN if status.checkpoint is None else f"{status.checkpoint.step:,}",
            str(len(status.restarts)),
            status.job_id or UNKNOWN,
        )
    noted = [status.name for status in statuses if status.notes]
    if not noted:
        return table
    return Group(table, Text(f"files that cannot be read: {', '.join(noted)}; look at each of these runs alone"))


def _clock(seconds: float, now: float) -> str:
    """A time of this day, or a day and time, on this machine's clock."""
    moment = datetime.fromtimestamp(seconds)
    return moment.strftime("%H:%M" if moment.date() == datetime.fromtimestamp(now).date() else "%Y-%m-%d %H:%M")


if __name__ == "__main__":
    run_command(single_command(main, PROGRAM), PROGRAM)
