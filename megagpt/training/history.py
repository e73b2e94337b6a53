"""What a run did, read from its metrics.jsonl into columns of numbers: the source of pictures and reports.

The file is read once, piece by piece, and a record becomes a row of float64, about 150 bytes. Every field but `kind`
and `step` may be missing, as in the files of older versions: NaN then, as for null. A run that went back (a restart
from a checkpoint, a rollback) has several records of one step: the last one counts, see `Columns.counted`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megagpt.errors import UsageError, UserError
from megagpt.training.metrics import Record, numbered_records

Floats = npt.NDArray[np.float64]

TRAIN_FIELDS = (
    *("step", "tokens", "loss", "lr", "grad_norm", "step_seconds", "data_seconds", "forward_backward_seconds"),
    *("optimizer_seconds", "checkpoint_seconds", "evaluation_seconds", "tokens_per_second"),
    *("tokens_per_second_per_rank", "mfu", "skipped_steps", "goodput", "peak_memory_bytes", "straggler_ratio"),
)
VALIDATION_FIELDS = ("step", "loss", "perplexity", "bits_per_byte", "seconds")
CHECKPOINT_FIELDS = ("step", "seconds", "stall_seconds", "bytes")

TIME_PARTS = ("data", "forward-backward", "optimizer", "rest of step", "checkpoint", "evaluation", "not training")
"""Where the time of a run goes. rest of step: what the records do not split further; not training: starting, being
down, and work whose records were dropped when it had to be done again."""

_ROWS_AT_ONCE = 5_000


class Columns:
    """Records of one kind as one array a field, each of shape (records,) in the order of the file."""

    def __init__(self, fields: tuple[str, ...], path: Path) -> None:
        self._fields, self._path = fields, path
        self._pending: list[tuple[int, Record]] = []
        self._chunks: list[Floats] = []
        self._length = 0
        self.restarts: list[tuple[int, float]] = []
        """(how many of the records were there, the step it went on from) of each start of the run."""

    def __len__(self) -> int:
        return self._length

    def add(self, line: int, record: Record) -> None:
        """Take a record and the number of its line."""
        self._pending.append((line, record))
        self._length += 1
        if len(self._pending) == _ROWS_AT_ONCE:
            self._flush()

    def restart(self, step: float) -> None:
        """Take notice that the run starts from `step`: records of later steps, so far, no longer count."""
        self.restarts.append((self._length, step))

    def close(self) -> None:
        """Make the arrays, after the last record."""
        self._flush()
        whole = np.concatenate([np.empty((len(self._fields), 0)), *self._chunks], axis=1)
        whole[~np.isfinite(whole)] = np.nan
        self._chunks = []
        self.values: dict[str, Floats] = dict(zip(self._fields, whole, strict=True))
        self.is_counted = _is_counted(self.values["step"], self.restarts)
        """Whether the record counts, (records,) of bool: no later one is of the same step or an earlier one."""

    def counted(self, name: str) -> Floats:
        """A field of the records that count; their steps increase."""
        return self.values[name][self.is_counted]

    def _flush(self) -> None:
        rows = [self._column(name) for name in self._fields]
        self._chunks.append(np.array(rows))
        self._pending = []

    def _column(self, name: str) -> Floats:
        values = [record.get(name) for _, record in self._pending]
        try:
            column = np.array(values, dtype=np.float64)  # None becomes NaN
        except (TypeError, ValueError, OverflowError):
            column = np.empty(())
        if column.shape == (len(values),) and (name != "step" or np.isfinite(column).all()):
            return column
        for line, record in self._pending:  # one by one, to name the line
            _step(self._path, line, record) if name == "step" else _number(self._path, line, record, name)
        raise AssertionError(f"{name}: no value explains why they are no column")


def _is_counted(steps: Floats, restarts: list[tuple[int, float]]) -> npt.NDArray[np.bool_]:
    if not len(steps):
        return np.zeros(0, dtype=bool)
    following = np.append(steps[1:], np.inf)
    for length, step in restarts:
        if length:
            following[length - 1] = min(following[length - 1], step + 0.5)  # step itself was done
    return steps < np.minimum.accumulate(following[::-1])[::-1]


@dataclass(frozen=True)
class Event:
    """One thing that happened, for the list of a report."""

    kind: str
    """start, stop, killed (no stop before the next start), or the `event` of an event record: spike, rollback, ..."""
    step: int
    time: float | None
    """Seconds since 1970; None: an older file."""
    text: str
    world_size: int | None = None
    """Ranks, of a start; None: not recorded, or another kind."""


@dataclass
class History:
    """One run."""

    folder: Path
    name: str
    """What pictures and tables call it."""
    train: Columns
    checkpoints: Columns
    validation: dict[str, Columns] = field(default_factory=dict)
    """By dataset."""
    events: list[Event] = field(default_factory=list)
    """In the order of the file."""
    first_time: float | None = None
    """Time of the first record that has one, in seconds since 1970; None: none has, as in older files."""
    last_time: float | None = None
    """Time of the last record."""
    device: str | None = None
    """What a rank of the last start computed on; None: not recorded."""

    @property
    def starts(self) -> list[Event]:
        """The first start and every restart; none in older files."""
        return [event for event in self.events if event.kind == "start"]

    @property
    def wall_seconds(self) -> float | None:
        """From the first record to the last, pauses included."""
        if self.first_time is None or self.last_time is None:
            return None
        return self.last_time - self.first_time

    @property
    def last_step(self) -> int:
        """The last step that counts and was recorded."""
        steps = [columns.counted("step")[-1] for columns in _all_columns(self) if len(columns)]
        return int(max(steps, default=self.events[-1].step if self.events else 0))

    def tokens_at(self, steps: Floats) -> Floats:
        """Tokens that had been read when these steps were done, by the training records that count."""
        known, tokens = self.train.counted("step"), self.train.counted("tokens")
        known, tokens = known[np.isfinite(tokens)], tokens[np.isfinite(tokens)]
        if not len(known):
            return np.full(len(steps), np.nan)
        return np.interp(steps, np.append(0, known), np.append(0, tokens))

    def ranks(self) -> Floats:
        """World size at each training record, (records,), NaN where it is not known."""
        ranks = np.full(len(self.train), np.nan)
        for (length, _), start in zip(self.train.restarts, self.starts, strict=True):
            ranks[length:] = np.nan if start.world_size is None else start.world_size
        return ranks

    def steps_covered(self) -> Floats:
        """How many steps each training record is the mean of, (records,)."""
        steps = self.train.values["step"]
        before = np.append(0, steps[:-1])
        for length, step in self.train.restarts:
            before[length : length + 1] = step
        covered = steps - before
        forward = covered > 0
        if not forward.all():  # went back without a restart (a rollback): as many as usual
            covered[~forward] = np.median(covered[forward]) if forward.any() else 1
        return covered

    def time_spent(self) -> dict[str, float]:
        """Seconds by TIME_PARTS, repeated steps included; without "not training" where the wall time is not known."""
        covered = self.steps_covered()

        def total(name: str) -> float:
            return float(np.nansum(self.train.values[name] * covered))

        spent = {
            "data": total("data_seconds"),
            "forward-backward": total("forward_backward_seconds"),
            "optimizer": total("optimizer_seconds"),
        }
        spent["rest of step"] = max(0.0, total("step_seconds") - sum(spent.values()))
        spent["checkpoint"] = total("checkpoint_seconds")
        if np.isnan(self.train.values["checkpoint_seconds"]).all():
            spent["checkpoint"] = float(np.nansum(self.checkpoint_stalls()))
        spent["evaluation"] = total("evaluation_seconds")
        if np.isnan(self.train.values["evaluation_seconds"]).all():
            spent["evaluation"] = float(sum(np.nansum(one.values["seconds"]) for one in self.validation.values()))
        if self.wall_seconds is not None:
            spent["not training"] = max(0.0, self.wall_seconds - sum(spent.values()))
        return spent

    def checkpoint_stalls(self) -> Floats:
        """Seconds that training stood still for each checkpoint; in older files all of its `seconds`."""
        stalls, seconds = self.checkpoints.values["stall_seconds"], self.checkpoints.values["seconds"]
        return np.where(np.isnan(stalls), seconds, stalls)


def read_histories(run_dirs: Sequence[Path]) -> list[History]:
    """The runs in these folders, called by as many last parts of their paths as tell them apart.

    Raises UsageError for a folder that is no run or is given twice, UserError for an empty or damaged file.
    """
    for number, run_dir in enumerate(run_dirs):
        if run_dir.resolve() in [earlier.resolve() for earlier in run_dirs[:number]]:
            raise UsageError(f"{run_dir}: is given twice; give each run once")
        if not (run_dir / "metrics.jsonl").is_file():
            raise UsageError(f"{run_dir}: no run: it has no metrics.jsonl; give the folder that train.run_dir names")
    names = distinct_names(run_dirs)
    return [read_history(run_dir, name) for run_dir, name in zip(run_dirs, names, strict=True)]


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path; as many more of all as are needed to tell them apart."""
    paths = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, paths), default=0) + 1):
        names = [str(Path(*path[-length:])) for path in paths]
        if len(set(names)) == len(names):
            break
    return [printable(name) for name in names]


def read_history(run_dir: Path, name: str) -> History:
    """The run in a folder, under this name. Raises UserError: nothing to read, or a damaged line (by its number)."""
    reader = _Reader(run_dir, name)
    try:
        for line, record in numbered_records(reader.path):
            reader.take(line, record)
    except OSError as error:
        raise UserError(f"{reader.path}: cannot be read: {error.strerror}") from error
    return reader.close()


class _Reader:
    """Sorts records into a History."""

    def __init__(self, run_dir: Path, name: str) -> None:
        self.path = run_dir / "metrics.jsonl"
        self._history = History(run_dir, name, Columns(TRAIN_FIELDS, self.path), Columns(CHECKPOINT_FIELDS, self.path))
        self._last: tuple[int, Record] | None = None  # the last line and its record
        self._last_train: tuple[int, Record] | None = None  # the same of training; a checkpoint's step may be earlier
        self._is_running = False  # a start was read, and no stop after it

    def take(self, line: int, record: Record) -> None:
        """Take the record of a line. Raises UserError if it is damaged."""
        history, kind = self._history, record["kind"]
        if history.first_time is None:
            history.first_time = _number(self.path, line, record, "time")
        if kind == "train":
            history.train.add(line, record)
            self._last_train = line, record
        elif kind == "validation":
            dataset = printable(str(record.get("dataset", "validation")))
            if dataset not in history.validation:
                history.validation[dataset] = Columns(VALIDATION_FIELDS, self.path)
            history.validation[dataset].add(line, record)
        elif kind == "checkpoint":
            history.checkpoints.add(line, record)
        elif kind in _TEXTS:
            self._take_event(line, record)
        self._last = line, record

    def close(self) -> History:
        """The history, after the last record. Raises UserError if there was none."""
        if self._last is None:
            raise UserError(f"{self.path}: no records yet; wait until the run has logged its first step")
        self._history.last_time = _number(self.path, *self._last, "time")
        for columns in _all_columns(self._history):
            columns.close()
        return self._history

    def _take_event(self, line: int, record: Record) -> None:
        history, kind, step = self._history, record["kind"], _step(self.path, line, record)
        ranks = None
        if kind == "start":
            if self._is_running and self._last:
                last_step = _step(self.path, *(self._last_train or self._last))
                last_time = _number(self.path, *self._last, "time")
                text = "no stop is recorded before the next start: killed, or stopped in steps that were done again"
                history.events.append(Event("killed", last_step, last_time, text))
            for columns in _all_columns(history):
                columns.restart(step)
            ranks = _number(self.path, line, record, "world_size")
            history.device = printable(str(record["device"])) if record.get("device") else None
        if kind != "event":
            self._is_running = kind == "start"
        name = printable(str(record.get("event", kind))) if kind == "event" else kind
        text = printable(_TEXTS[kind](record))
        time = _number(self.path, line, record, "time")
        history.events.append(Event(name, step, time, text, None if ranks is None else int(ranks)))


def _all_columns(history: History) -> list[Columns]:
    return [history.train, history.checkpoints, *history.validation.values()]


def _step(path: Path, line: int, record: Record) -> int:
    """The step, which every record has. Raises UserError naming the line for anything but a number."""
    step = _number(path, line, record, "step")
    if step is None:
        raise UserError(f"{path}:{line}: step is {record['step']!r}, not a number; the file is damaged")
    return int(step)


def _number(path: Path, line: int, record: Record, name: str) -> float | None:
    """A field; None where it is missing, null or not finite. Raises UserError naming the line for anything else."""
    value = record.get(name)
    if value is None:
        return None
    if not isinstance(value, int | float) or (isinstance(value, int) and abs(value) > 2**1000):
        raise UserError(f"{path}:{line}: {name} is {str(value)[:40]!r}, not a number; the file is damaged")
    return float(value) if math.isfinite(value) else None


def _start_text(record: Record) -> str:
    parts = {
        "world_size": "world size {}",
        "zero_stage": "ZeRO stage {}",
        "precision": "{}",
        "micro_batch_size": "micro-batch {}",
        "continues_from": "continues from {}",
    }
    return ", ".join(text.format(record[key]) for key, text in parts.items() if record.get(key) is not None)


def _event_text(record: Record) -> str:
    if record.get("message"):
        return str(record["message"])
    return ", ".join(f"{key} {value}" for key, value in record.items() if key not in ("kind", "step", "time", "event"))


_TEXTS: dict[str, Callable[[Record], str]] = {
    "start": _start_text,
    "stop": lambda record: str(record.get("reason") or "no reason is recorded"),
    "event": _event_text,
}


def printable(text: str) -> str:
    """`text` with control characters as their pictures, and "?" for what is no UTF-8 in a path."""
    visible = text.translate({code: chr(0x2400 + code) for code in range(32)} | {127: "\u2421"})
    return visible.encode(errors="replace").decode()
