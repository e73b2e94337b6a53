"""What the runs of a study took, from their metrics.jsonl: means with 95% intervals, efficiency against ideal.

The first `discard_steps` steps after every start are left out. With one run a point, the interval of a mean comes from
the means of consecutive batches of its steps (steps one after the other are not independent); with several, from the
means of the runs, which differ by placement and time of day, too. Both are Student's t.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import stats

from megagpt.errors import UserError
from megagpt.scaling.experiments import EntryFolder, StudyFolder
from megagpt.training.history import Floats, History, read_history

PARTS = ("data", "forward-backward", "optimizer", "rest of step")
"""Where the time of a step goes; of megagpt.training.history.TIME_PARTS."""

_MOST_BATCHES = 10
_LEAST_STEPS = 4


@dataclass(frozen=True)
class Interval:
    """A value and its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Mean:
    """A mean, its standard error, and the degrees of freedom of that."""

    value: float
    error: float
    freedom: int

    @property
    def interval(self) -> Interval:
        """95%, by the logarithm: of what is above 0 both ends are, however wide it is."""
        factor = math.exp(float(stats.t.ppf(0.975, self.freedom)) * self.error / self.value)
        return Interval(self.value, self.value / factor, self.value * factor)


@dataclass(frozen=True)
class Measurement:
    """What one run took."""

    entry: EntryFolder
    step_seconds: Mean
    median_seconds: float
    """Of a step."""
    steps: int
    """How many were measured."""
    parts: dict[str, float]
    """Mean seconds a step, by PARTS."""
    mfu: float | None
    peak_memory_bytes: float | None
    """Of rank 0."""
    straggler_ratio: float | None
    device: str | None

    @classmethod
    def of(cls, entry: EntryFolder, discard_steps: int) -> "Measurement":
        """From the run's last attempt, which has finished. Raises UserError if it cannot be used."""
        attempt, ranks = entry.last, entry.stored.ranks
        assert attempt is not None
        history = read_history(entry.run_dir(attempt), entry.name)
        if other := {start.world_size for start in history.starts} - {ranks, None}:
            raise UserError(f"ran on {other.pop()} ranks, not on {ranks}")
        kept = _measured(history, discard_steps)
        seconds = history.train.values["step_seconds"][kept]
        if len(seconds) < _LEAST_STEPS or not np.isfinite(seconds).all():
            raise UserError(f"{len(seconds)} usable steps after the first {discard_steps} of each start are too few")

        def mean(name: str) -> float | None:
            values = history.train.values[name][kept]
            return float(np.nanmean(values)) if np.isfinite(values).any() else None

        whole = float(seconds.mean())
        parts = {"data": mean("data_seconds") or 0.0, "forward-backward": mean("forward_backward_seconds") or 0.0}
        parts["optimizer"] = mean("optimizer_seconds") or 0.0
        parts["rest of step"] = max(0.0, whole - sum(parts.values()))
        flops = history.train.values["mfu"][kept] * seconds  # mfu x seconds is the same for all steps
        known = flops[np.isfinite(flops)]
        memory = history.train.values["peak_memory_bytes"]
        return cls(
            entry=entry,
            step_seconds=batch_mean(seconds),
            median_seconds=float(np.median(seconds)),
            steps=len(seconds),
            parts=parts,
            mfu=float(known[0]) / whole if len(known) else None,
            peak_memory_bytes=float(np.nanmax(memory)) if np.isfinite(memory).any() else None,
            straggler_ratio=mean("straggler_ratio"),
            device=history.device,
        )


@dataclass(frozen=True)
class Point:
    """The runs of a curve on one number of ranks."""

    ranks: int
    nodes: int
    batch: int
    """Sequences a step."""
    tokens: int
    """Tokens a step."""
    lr: float
    runs: list[Measurement]
    step_seconds: Mean
    shared_cores: int | None
    """CPU cores that the ranks shared, if there were fewer than ranks: not to be compared with the others."""

    @property
    def tokens_per_second(self) -> Interval:
        """Of all ranks."""
        seconds = self.step_seconds.interval
        slowest = self.tokens / seconds.high
        return Interval(
            self.tokens / seconds.value, slowest, self.tokens / seconds.low if seconds.low > 0 else math.inf
        )

    @property
    def parts(self) -> dict[str, float]:
        """Mean seconds a step, by PARTS."""
        return {part: float(np.mean([run.parts[part] for run in self.runs])) for part in PARTS}

    def mean(self, name: str) -> float | None:
        """Of a field of the measurements; None: no run has it."""
        values = [value for run in self.runs if (value := getattr(run, name)) is not None]
        return float(np.mean(values)) if values else None


@dataclass
class Curve:
    """One combination of the matrix: points by number of ranks, ascending."""

    name: str
    points: list[Point] = field(default_factory=list)

    @property
    def base(self) -> Point:
        """What efficiency is relative to: the smallest number of ranks that was measured."""
        return self.points[0]

    def efficiency(self, point: Point) -> Interval:
        """Tokens/s of a rank over those of the base: 1 is ideal, in strong and in weak scaling."""
        base = self.base
        ratio = (point.tokens / point.step_seconds.value / point.ranks) / (
            base.tokens / base.step_seconds.value / base.ranks
        )
        if point is base:
            return Interval(1.0, 1.0, 1.0)
        errors = [one.step_seconds.error / one.step_seconds.value for one in (point, base)]
        variance = sum(error**2 for error in errors)
        freedom = variance**2 / max(sum(error**4 / one.step_seconds.freedom for error, one in
                                        zip(errors, (point, base), strict=True)), 1e-300)  # fmt: skip
        half = float(stats.t.ppf(0.975, max(1.0, freedom))) * math.sqrt(variance)
        return Interval(ratio, ratio * math.exp(-half), ratio * math.exp(half))

    def speedup(self, point: Point) -> float:
        """Tokens/s over those of the base."""
        return self.efficiency(point).value * point.ranks / self.base.ranks

    def serial_share(self, point: Point) -> float | None:
        """Karp and Flatt's (1990) experimentally determined serial share; None: the base, or below the base's ranks.

        If it grows with the ranks, the loss is not a serial part but communication or imbalance.
        """
        more = point.ranks / self.base.ranks
        return None if more <= 1 else (1 / self.speedup(point) - 1 / more) / (1 - 1 / more)


@dataclass
class Results:
    """A study as measured."""

    folder: StudyFolder
    curves: list[Curve]
    """Those with at least one point."""
    problems: dict[str, str]
    """Why a run is not among the points, by its name."""


def measure(folder: StudyFolder) -> Results:
    """Read every finished run of a study; the others, and what cannot be used, are `problems`."""
    study = folder.stored.timing
    measured: dict[tuple[str, int], list[Measurement]] = {}
    problems: dict[str, str] = {}
    for entry in folder.entries:
        if entry.state != "finished":
            problems[entry.name] = why_not(entry)
            continue
        try:
            run = Measurement.of(entry, study.discard_steps)
        except UserError as error:
            problems[entry.name] = f"finished, but cannot be used: {error}"
            continue
        measured.setdefault((entry.stored.curve, entry.stored.ranks), []).append(run)
    curves = [Curve(name) for name in folder.curves]
    for curve in curves:
        sizes = sorted(ranks for name, ranks in measured if name == curve.name)
        curve.points = [_point(measured[curve.name, ranks]) for ranks in sizes]
    return Results(folder, [curve for curve in curves if curve.points], problems)


def batch_mean(values: Floats) -> Mean:
    """The mean of a series whose neighbours depend on each other, by the method of batch means."""
    batches = np.array_split(values, min(_MOST_BATCHES, len(values) // 2))
    means = np.array([batch.mean() for batch in batches])
    return Mean(float(values.mean()), float(means.std(ddof=1)) / math.sqrt(len(means)), len(means) - 1)


def _measured(history: History, discard_steps: int) -> np.ndarray:
    """Which records count: none of the first steps after a start, none that was done again."""
    steps = history.train.values["step"]
    started_at = np.zeros(len(steps))
    for length, step in history.train.restarts:
        started_at[length:] = step
    return history.train.is_counted & (steps > started_at + discard_steps)


def _point(runs: Sequence[Measurement]) -> Point:
    stored = runs[0].entry.stored
    config = stored.run_config()
    mean = runs[0].step_seconds
    if len(runs) > 1:
        means = np.array([run.step_seconds.value for run in runs])
        mean = Mean(float(means.mean()), float(means.std(ddof=1)) / math.sqrt(len(means)), len(means) - 1)
    shared = [run.entry.last.shared_cores for run in runs if run.entry.last and run.entry.last.shared_cores]
    batch = config.train.global_batch_size
    return Point(stored.ranks, stored.nodes, batch, batch * config.seq_len, config.optimizer.lr, list(runs), mean,
                 min(shared, default=None))  # fmt: skip


def why_not(entry: EntryFolder) -> str:
    """Of a run that has not finished: what became of it."""
    attempt = entry.last
    if attempt is None:
        return "not started yet"
    if attempt.state == "running":
        return f"running or queued{f' (job {attempt.job_id})' if attempt.job_id else ''}"
    code = "" if attempt.exit_code is None else f" with exit code {attempt.exit_code}"
    return f"failed{code}: {attempt.error}"
