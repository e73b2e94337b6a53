"""How a run stands: what its folder tells, and what Slurm says of its job, judged together.

    sources = read_sources(run_dir)                 the folder, also while the run writes in it
    status = judge(sources, answer, now)            answer: what squeue said, see launch.squeue

What cannot be read is told in `Status.notes`, and the rest is shown. Without torch, and fast: reading the metrics takes
most of the time, some seconds for a million records.
"""

import difflib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from megagpt.config import load_config
from megagpt.config.schema import RunConfig
from megagpt.errors import UsageError, UserError
from megagpt.training.attempts import Attempt, Ending, read_attempts
from megagpt.training.checkpoint import CheckpointManifest, DamagedCheckpointError, complete_checkpoints, read_manifest
from megagpt.training.history import Floats, History, read_history
from megagpt.training.horizon import horizon
from megagpt.training.lock import Lock, read_lock
from megagpt.training.sinks import duration

State = Literal[
    "running", "starting", "stale", "waiting", "held", "finished", "stopped", "failed", "ended silently", "not started"
]
"""stale: alive as far as is known, but without a record for much longer than usual. waiting, held: in Slurm's queue."""

RECENT_RECORDS = 50
"""Training records, at most, of whose numbers the median is taken; none before the last start, if there are later."""
STALE_SECONDS = 60.0
"""Least silence that makes a run stale; else STALE_FACTOR times what usually passes between two records."""
STALE_FACTOR = 5
UNKNOWN_PAUSE_SECONDS = 600.0
"""How long a start and its first steps, or a first evaluation, may take: nothing tells what is usual."""


@dataclass(frozen=True)
class SlurmJob:
    """A job as squeue shows it."""

    id: str
    state: str
    """Slurm's word: PENDING, RUNNING, ..."""
    reason: str = ""
    """Why it waits; empty: it does not."""
    node_count: int | None = None
    nodes: str = ""
    """Their names, shortened by Slurm; empty: none yet."""
    time_left: str = ""
    """As Slurm writes it: 1-02:03:04."""
    start: float | None = None
    """When it started, or is expected to; None: not estimated."""

    @property
    def is_pending(self) -> bool:
        """Whether it is in the queue."""
        return self.state in ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")

    @property
    def is_held(self) -> bool:
        """Whether it stays there until somebody releases it."""
        words = f"{self.state} {self.reason}".lower()  # JobHeldUser, REQUEUE_HOLD, launch_failed_requeued_held, ...
        return self.is_pending and any(word in words for word in ("held", "hold", "special_exit"))

    @property
    def is_active(self) -> bool:
        """Whether it has nodes."""
        return self.state in ("RUNNING", "CONFIGURING", "RESIZING", "SIGNALING", "STAGE_OUT", "SUSPENDED", "STOPPED")


@dataclass(frozen=True)
class SlurmAnswer:
    """What was learned about a job; neither a job nor a problem: Slurm does not know it any more."""

    job: SlurmJob | None = None
    problem: str | None = None
    """Why Slurm could not be asked."""


@dataclass(frozen=True)
class SavedState:
    """The newest checkpoint that is whole."""

    name: str
    step: int
    time: float
    """When it was complete, seconds since 1970."""
    size: int
    """Bytes."""


@dataclass(frozen=True)
class Restart:
    """A start after the first."""

    time: float | None
    step: int
    """Where it went on from."""
    job: str | None
    ranks: int | None
    cause: Ending
    """How the attempt before had ended."""
    reason: str
    """The same in words."""


@dataclass(frozen=True)
class Training:
    """How far it has come and how fast it is; None: not known."""

    step: int = 0
    """The last step that was recorded."""
    tokens: int | None = None
    loss: float | None = None
    loss_step: int | None = None
    validation: dict[str, tuple[int, float]] = field(default_factory=dict)
    """The last evaluation of each dataset: step, loss."""
    tokens_per_second: float | None = None
    """Of all ranks; this, mfu and step_seconds are medians of the recent records."""
    mfu: float | None = None
    """A share of 1."""
    step_seconds: float | None = None
    goodput: float | None = None
    """As last recorded, a share of 1."""
    last_record: float | None = None
    """When the run last wrote one, seconds since 1970."""


@dataclass(frozen=True)
class TimeLeft:
    """How long the rest of the steps takes; None: not known."""

    productive_seconds: float | None = None
    """At the recent speed, with evaluations and checkpoints as often as so far, if nothing interrupts it."""
    productive_end: float | None = None
    """When that is, seconds since 1970; of a waiting job from its expected start on, None if it has none."""
    overall_seconds: float | None = None
    """At the rate since the first start, with all interruptions and waits; None: it neither runs nor waits."""
    overall_end: float | None = None


@dataclass(frozen=True)
class Unsaved:
    """What no checkpoint holds."""

    steps: int = 0
    seconds: float = 0.0
    """The work that is lost if the run dies now, or was lost when it died."""


@dataclass(frozen=True)
class Status:
    """How a run stands."""

    name: str
    folder: str
    now: float
    """When the question was put, seconds since 1970."""
    state: State
    detail: str
    """What there is to say about the state."""
    ranks: int | None
    """World size of the last start; None: it has not come to training, or an older file."""
    total_steps: int | None
    """None: there is no configuration to tell."""
    total_tokens: int | None
    training: Training
    time_left: TimeLeft
    checkpoint: SavedState | None
    unsaved: Unsaved
    restarts: list[Restart]
    job_id: str | None
    """The newest of the run's Slurm jobs; None: slurm/ did not start it."""
    job: SlurmJob | None
    job_problem: str | None
    """Why nothing is said about the job."""
    notes: list[str]
    """What could not be read."""

    @property
    def is_alive(self) -> bool:
        """Whether a process works on it, as far as is known."""
        return self.state in ("running", "starting", "stale")

    @property
    def cause_counts(self) -> dict[Ending, int]:
        """How often each cause made it start again, the most frequent first."""
        return dict(Counter(restart.cause for restart in self.restarts).most_common())


@dataclass
class Sources:
    """What a run folder holds."""

    folder: Path
    name: str
    history: History | None = None
    """None: no metrics yet."""
    attempts: list[Attempt] = field(default_factory=list)
    config: RunConfig | None = None
    checkpoint: SavedState | None = None
    manifest: CheckpointManifest | None = None
    """Of that checkpoint."""
    lock: Lock | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def job_id(self) -> str | None:
        """The newest Slurm job of the run."""
        return next((attempt.job for attempt in reversed(self.attempts) if attempt.job), None)


# ---- what there is to read


def is_run(folder: Path) -> bool:
    """Whether a training run has begun to write into this folder."""
    if any((folder / name).is_file() for name in ("metrics.jsonl", ".lock")):
        return True
    if any(folder.glob("checkpoints/step_*/manifest.json")) or any(folder.glob("logs/*/restarts.jsonl")):
        return True
    return (folder / "logs" / "rank_0.log").is_file()


def check_is_run(folder: Path) -> None:
    """Raise UsageError, which names runs that may be meant, if this folder is none."""
    if is_run(folder):
        return
    problem = "no run: it has no metrics.jsonl" if folder.is_dir() else "no such run folder"
    if inside := _runs_in(folder):
        raise UsageError(f"{folder}: {problem}; runs in it: {_some(inside)}")
    beside = [*_runs_in(folder.parent), *(_runs_in(Path("runs")) if len(folder.parts) == 1 else [])]
    near = difflib.get_close_matches(folder.name, [run.name for run in beside], cutoff=0.5)
    if near:
        advice = f"did you mean {_some([run for name in near for run in beside if run.name == name])}?"
    elif beside:
        advice = f"runs beside it: {_some(beside)}"
    else:
        advice = "give the folder that train.run_dir names"
    raise UsageError(f"{folder}: {problem}; {advice}")


def _runs_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and is_run(path)) if folder.is_dir() else []


def _some(runs: Sequence[Path], most: int = 5) -> str:
    rest = f" and {len(runs) - most} more" if len(runs) > most else ""
    return ", ".join(str(run) for run in runs[:most]) + rest


def read_sources(run_dir: Path, name: str) -> Sources:
    """Read a run folder; what cannot be read goes into `notes`."""
    sources = Sources(run_dir, name, lock=read_lock(run_dir))
    _read_checkpoint(sources)
    try:
        if (run_dir / "config.yaml").is_file():
            sources.config = load_config(run_dir / "config.yaml")
    except UserError as error:
        sources.notes.append(" ".join(str(error).split()))
    metrics = run_dir / "metrics.jsonl"
    try:
        if metrics.is_file() and metrics.stat().st_size:
            sources.history = read_history(run_dir, name)
    except UserError as error:
        sources.notes.append(str(error))
    try:
        sources.attempts = read_attempts(run_dir, sources.history.events if sources.history else [])
    except UserError as error:
        sources.notes.append(str(error))
    return sources


def _read_checkpoint(sources: Sources) -> None:
    for path in reversed(complete_checkpoints(sources.folder / "checkpoints")):
        try:
            manifest = read_manifest(path)
            written = (path / "manifest.json").stat().st_mtime
        except (DamagedCheckpointError, FileNotFoundError) as error:
            if path.exists():  # else a newer one has just superseded it
                sources.notes.append(str(error))
        except UserError as error:
            sources.notes.append(str(error))
            return
        else:
            size = sum(file.size for file in manifest.files.values())
            sources.checkpoint, sources.manifest = SavedState(path.name, manifest.step, written, size), manifest
            return


# ---- what follows from it


def judge(sources: Sources, answer: SlurmAnswer | None, now: float) -> Status:
    """How the run stands. answer: about its newest job; None: Slurm was not asked, as slurm/ did not start the run."""
    attempts, manifest = sources.attempts, sources.manifest
    job = answer.job if answer else None
    state, detail = _state(sources, answer, now)
    length = None
    if sources.config is not None:
        length = horizon(sources.config, manifest) if manifest else horizon(sources.config)
    training = _training(sources)
    return Status(
        name=sources.name,
        folder=str(sources.folder),
        now=now,
        state=state,
        detail=detail,
        ranks=attempts[-1].ranks if attempts else None,
        total_steps=length.steps if length else None,
        total_tokens=length.tokens if length else None,
        training=training,
        time_left=_time_left(sources.history, length.tokens, state, job, now) if length else TimeLeft(),
        checkpoint=sources.checkpoint,
        unsaved=_unsaved(sources, now if state == "running" else None),
        restarts=[
            Restart(attempt.time, attempt.step, attempt.job, attempt.ranks, before.ending, before.reason)
            for before, attempt in pairwise(attempts)
            if before.ending is not None
        ],
        job_id=sources.job_id,
        job=job,
        job_problem=answer.problem if answer else None,
        notes=sources.notes,
    )


def _state(sources: Sources, answer: SlurmAnswer | None, now: float) -> tuple[State, str]:
    """The state and what there is to say about it. Slurm's word on the queue comes first, then signs of life."""
    last = sources.attempts[-1] if sources.attempts else None
    job = answer.job if answer else None
    if job and job.is_pending:
        return ("held" if job.is_held else "waiting"), job.reason
    if job and job.state == "SUSPENDED":
        return "waiting", "suspended by Slurm"
    begun = [last.time] if last and last.time is not None else []  # when what is alive may have begun
    if sources.lock and sources.lock.is_held:
        begun.append(sources.lock.since)
    if job and job.is_active and job.start is not None:
        begun.append(job.start)
    is_seen = bool(sources.lock and sources.lock.is_held) or bool(job and job.is_active)
    if is_seen and (last is None or last.ending is None or (last.end is not None and max(begun) > last.end)):
        return _liveliness(sources, max(begun, default=now), now)
    if last is None:
        return "not started", ""
    if last.ending is None:
        return _unwitnessed(sources, last, answer, now)
    if last.ending == "finished":
        return "finished", ""
    if last.decision == "hold":
        return "held", last.reason
    if last.ending == "signal":
        return "stopped", last.reason
    return "failed", last.reason.removeprefix("failed: ")


def _unwitnessed(sources: Sources, last: Attempt, answer: SlurmAnswer | None, now: float) -> tuple[State, str]:
    """The state of a run whose last attempt has no end, and nothing else is known to be alive."""
    if answer and last.job and answer.problem is None:
        if answer.job is None:
            return "ended silently", f"Slurm no longer knows its job {last.job}"
        return "ended silently", f"its job {last.job} was {answer.job.state}"
    if sources.lock and sources.lock.is_near:
        return "ended silently", "its process is gone, and wrote no reason"
    return _liveliness(sources, last.time or 0.0, now)


def _liveliness(sources: Sources, begun: float, now: float) -> tuple[State, str]:
    """Running, starting or stale, of an attempt that began then."""
    history = sources.history
    last_record = history.last_time if history is not None and (history.last_time or 0.0) >= begun else None
    has_steps = last_record is not None and history is not None and bool(_since_start(history).any())
    silence = now - (last_record or begun)
    usual = _usual_silence(history) if history is not None else None
    limit = STALE_SECONDS if usual is None else max(STALE_SECONDS, STALE_FACTOR * usual)
    evaluates_first = not (history and history.validation) and bool(sources.config and sources.config.data.validation)
    if not has_steps or evaluates_first:
        limit = max(limit, UNKNOWN_PAUSE_SECONDS)
    if silence > limit:
        often = f"; one comes every {duration(usual)} or so" if usual is not None and has_steps else ""
        return "stale", f"no record for {duration(silence)}{often}"
    return ("running" if has_steps else "starting"), ""


def _usual_silence(history: History) -> float | None:
    """Seconds between two records of training, with the longest pause for evaluation and checkpoint so far."""
    train, covered = history.train.values, history.steps_covered()
    between = covered * train["step_seconds"]
    if not np.isfinite(between).any():
        return None
    pauses = covered * (np.nan_to_num(train["evaluation_seconds"]) + np.nan_to_num(train["checkpoint_seconds"]))
    return float(np.nanmedian(between[-RECENT_RECORDS:]) + pauses.max())


def _since_start(history: History) -> npt.NDArray[np.bool_]:
    """Whether each training record was written since the last start, (records,)."""
    first = history.train.restarts[-1][0] if history.train.restarts else 0
    return np.arange(len(history.train)) >= first


def _recent(history: History, name: str) -> float | None:
    """The median of a field over the recent records that have it."""
    values, is_counted = history.train.values[name], history.train.is_counted
    for chosen in (is_counted & _since_start(history), is_counted):
        known = values[chosen & np.isfinite(values)]
        if len(known):
            return float(np.median(known[-RECENT_RECORDS:]))
    return None


def _last(values: Floats) -> float | None:
    known = values[np.isfinite(values)]
    return float(known[-1]) if len(known) else None


def _training(sources: Sources) -> Training:
    history, manifest = sources.history, sources.manifest
    if history is None:
        return Training(manifest.step, manifest.consumed_tokens) if manifest else Training()
    steps, losses = history.train.counted("step"), history.train.counted("loss")
    validation = {}
    for dataset, columns in history.validation.items():
        is_known = np.isfinite(columns.counted("loss"))
        if is_known.any():
            step, loss = (float(columns.counted(name)[is_known][-1]) for name in ("step", "loss"))
            validation[dataset] = int(step), loss
    tokens, loss_step = _last(history.train.counted("tokens")), _last(steps[np.isfinite(losses)])
    return Training(
        step=history.last_step,
        tokens=None if tokens is None else int(tokens),
        loss=_last(losses),
        loss_step=None if loss_step is None else int(loss_step),
        validation=validation,
        tokens_per_second=_recent(history, "tokens_per_second"),
        mfu=_recent(history, "mfu"),
        step_seconds=_recent(history, "step_seconds"),
        goodput=_last(history.train.counted("goodput")),
        last_record=history.last_time,
    )


def _time_left(history: History | None, total: int, state: State, job: SlurmJob | None, now: float) -> TimeLeft:
    """total: tokens of the whole run."""
    if history is None or state == "finished":
        return TimeLeft()
    tokens, rate = _last(history.train.counted("tokens")), _recent(history, "tokens_per_second")
    if tokens is None or not rate:
        return TimeLeft()
    left = max(0.0, total - tokens)
    spent = history.time_spent()
    pauses = spent["checkpoint"] + spent["evaluation"]
    stepping = sum(spent[part] for part in ("data", "forward-backward", "optimizer", "rest of step"))
    productive = left / rate * (1 + pauses / stepping if stepping else 1)
    productive_end = overall = None
    if state in ("running", "starting"):
        productive_end = now + productive
    elif state == "waiting" and job and job.start is not None:
        productive_end = max(now, job.start) + productive
    if state in ("running", "starting", "stale", "waiting") and history.first_time is not None:
        first_step = float(history.starts[0].step) if history.starts else 0.0
        done = tokens - float(history.tokens_at(np.array([first_step]))[0])
        overall = left * (now - history.first_time) / done if done > 0 else None
    return TimeLeft(productive, productive_end, overall, None if overall is None else now + overall)


def _unsaved(sources: Sources, running_at: float | None) -> Unsaved:
    """running_at: the time now, of a run that works: what it has done since its last record is not saved either."""
    history, saved = sources.history, sources.checkpoint.step if sources.checkpoint else 0
    if history is None or not len(history.train):
        return Unsaved()
    train, is_counted = history.train.values, history.train.is_counted
    steps, covered = train["step"][is_counted], history.steps_covered()[is_counted]
    parts = [np.nan_to_num(train[f"{part}_seconds"]) for part in ("step", "evaluation", "checkpoint")]
    seconds = np.sum(parts, axis=0)[is_counted]
    total = float((np.clip(steps - saved, 0, covered) * seconds).sum())
    if running_at is not None and history.last_time is not None:
        total += max(0.0, running_at - history.last_time)
    return Unsaved(max(0, int(steps[-1]) - saved), total)
