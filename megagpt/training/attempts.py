"""The attempts that a run is made of: from each start, by Slurm or by hand, to what ended it.

metrics.jsonl has a start of each attempt that came as far as training, and a stop of those that could still write one,
unless the run went back behind them. Jobs of slurm/ write down every start and end in logs/<JOBID>/restarts.jsonl:

    {"event": "start", "job": "123", "restart": 0, "time": 1.76e9, "step": 400, "nodes": "node[1-2]"}
    {"event": "end", "job": "123", "restart": 0, "time": 1.76e9, "code": 85, "decision": "requeue", "reason": "..."}

with step: the newest checkpoint's, or 0; decision: done, requeue, stop or hold. A hang that nothing else tells of is
known by the time of its hang_rank_*.txt.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from megagpt.errors import UserError
from megagpt.training.history import Event, printable
from megagpt.training.supervision import HANG, LOST, REQUEUE

Ending = Literal["finished", "signal", "hang", "failure", "silent"]
"""silent: nothing was written before the next start; killed, or its node was lost."""

_SIGNALS = ("SIGTERM", "SIGUSR1")


@dataclass
class Attempt:
    """One of them."""

    time: float | None
    """When it started, seconds since 1970; None: not recorded."""
    step: int
    """Where it started."""
    job: str | None = None
    """Slurm's id; None: not started by slurm/."""
    nodes: str | None = None
    ranks: int | None = None
    """World size; None: it has not come to training, or an older file."""
    end: float | None = None
    """When it ended; None: nothing was written about that."""
    ending: Ending | None = None
    """None: of the last attempt, it may be going on."""
    decision: Literal["done", "requeue", "stop", "hold"] | None = None
    """What the job's script did next."""
    reason: str = ""
    """In words."""
    has_trained: bool = False
    """Whether it wrote its start to the metrics."""


class _JobLine(BaseModel):
    """A line of restarts.jsonl."""

    model_config = ConfigDict(extra="ignore", coerce_numbers_to_str=True)

    event: Literal["start", "end"]
    job: str
    restart: int
    time: float
    step: int = 0
    nodes: str | None = None
    code: int | None = None
    decision: Literal["done", "requeue", "stop", "hold"] | None = None
    reason: str | None = None


def read_attempts(run_dir: Path, events: Iterable[Event]) -> list[Attempt]:
    """All attempts, oldest first. events: of the run's history.

    Raises UserError for a restarts.jsonl that is damaged, not for one whose last line is still being written.
    """
    attempts: list[Attempt] = []
    happenings: list[_JobLine | Event] = [event for event in events if event.kind in ("start", "stop")]
    for file in (run_dir / "logs").glob("*/restarts.jsonl"):
        happenings += _read_lines(file)
    for happening in sorted(happenings, key=lambda one: one.time or 0.0):
        if isinstance(happening, Event):
            _take_record(attempts, happening)
        else:
            _take_line(attempts, happening)
    _find_hangs(attempts, run_dir / "logs")
    for attempt in attempts[:-1]:
        if attempt.ending is None:
            attempt.ending, attempt.reason = "silent", "nothing was written: killed, or its node was lost"
    return attempts


def _read_lines(file: Path) -> Iterable[_JobLine]:
    try:
        lines = file.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, start=1):
        try:
            yield _JobLine.model_validate_json(line)
        except ValueError:
            if line.endswith(b"\n"):
                raise UserError(f"{file}:{number}: not a start or end of a job; the file is damaged") from None


def _take_line(attempts: list[Attempt], line: _JobLine) -> None:
    if line.event == "start":
        nodes = None if line.nodes is None else printable(line.nodes)
        attempts.append(Attempt(line.time, line.step, printable(line.job), nodes))
        return
    attempt = next((one for one in reversed(attempts) if one.job == line.job), None)
    if attempt is None:
        return  # its start was lost, and with it what it could tell
    attempt.end, attempt.decision = line.time, line.decision
    attempt.ending = _ending_of_code(line) or attempt.ending
    attempt.reason = printable(line.reason or "") or attempt.reason


def _ending_of_code(line: _JobLine) -> Ending | None:
    if line.decision == "done" or line.code == 0:
        return "finished"
    if line.code == HANG:
        return "hang"
    if line.code == LOST:
        return "silent"
    if line.code == REQUEUE or (line.decision == "requeue" and (line.code or 0) > 128):  # a signal, unheard
        return "signal"
    return "failure"


def _take_record(attempts: list[Attempt], event: Event) -> None:
    last = attempts[-1] if attempts else None
    if event.kind == "stop":
        if last is not None and last.end is None:
            last.end, last.reason = event.time, event.text
            last.ending = "finished" if event.text == "finished" else "signal" if event.text in _SIGNALS else "failure"
        return
    if last is None or last.job is None or last.has_trained or last.end is not None:
        attempts.append(Attempt(event.time, event.step))
    attempts[-1].step, attempts[-1].ranks, attempts[-1].has_trained = event.step, event.world_size, True


def _find_hangs(attempts: list[Attempt], logs: Path) -> None:
    for file in (*logs.glob("hang_rank_*.txt"), *logs.glob("*/hang_rank_*.txt")):
        try:
            written, text = file.stat().st_mtime, file.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror}") from error
        attempt = next((one for one in reversed(attempts) if (one.time or 0.0) <= written), None)
        if attempt is not None and attempt.ending in (None, "failure"):
            attempt.ending, attempt.end = "hang", attempt.end or written
            attempt.reason = attempt.reason or printable(text.partition("\n")[0])
