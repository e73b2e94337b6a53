"""What a person sees while a run works: a table with a row a stage on a terminal, plain lines elsewhere.

Rates and the time that is left count this run's work alone, not the results of an earlier one that it goes on from.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table

from megagpt.corpus.executor import Observer, Progress
from megagpt.corpus.reasons import REASONS

_SECONDS_BETWEEN_LINES = 10.0
_REFRESHES_A_SECOND = 4
_UNKNOWN = "–"


@contextlib.contextmanager
def display(console: Console, now: Callable[[], float] = time.monotonic) -> Iterator[Observer]:
    """Show the progress of a run on `console` while the context lasts; `now` tells the time in seconds."""
    board = Board(now)
    if not console.is_terminal or console.is_dumb_terminal:
        lines = _LinePrinter(console, board)
        yield lines.show
        return
    live = Live(
        console=console, get_renderable=lambda: board.table(console.width), refresh_per_second=_REFRESHES_A_SECOND
    )
    with live:
        yield board.update


@dataclass
class Row:
    """One stage."""

    progress: Progress
    start: float
    """When it began, in seconds of the clock, as all times here."""
    seen: float
    """When it was last heard of."""
    removed: int
    """Documents removed so far, by all stages."""

    @property
    def is_done(self) -> bool:
        """Whether all tasks are finished."""
        return self.progress.done == self.progress.tasks

    def elapsed(self, now: float) -> float:
        """Seconds of its work."""
        return (self.seen if self.is_done else now) - self.start

    def left(self, now: float) -> float | None:
        """Seconds that the rest will take at the pace of this run; None: it finished no task yet."""
        done_here = self.progress.done - self.progress.reused
        if self.is_done:
            return 0
        if not done_here:
            return None
        pace = (self.seen - self.start) / done_here
        return max(0, pace * (self.progress.tasks - self.progress.done) - (now - self.seen))

    def rate(self, *names: str) -> float | None:
        """This run's count of the first of these names that the stage has, a second; None: it has none."""
        seconds = self.seen - self.start
        amount = next((self.progress.new[name] for name in names if name in self.progress.new), None)
        return amount / seconds if amount is not None and seconds > 0 else None


@dataclass(frozen=True)
class Column:
    """A column of the table."""

    title: str
    width: int
    rank: int
    """Columns of the highest rank go first if the terminal is narrow."""
    text: Callable[[Row, float], str]
    """What a row shows at a time."""


COLUMNS = (
    Column("stage", 10, 0, lambda row, _: row.progress.stage),
    Column("chunks", 13, 0, lambda row, _: f"{row.progress.done:,}/{row.progress.tasks:,}"),
    Column("reused", 7, 6, lambda row, _: f"{row.progress.reused:,}" if row.progress.reused else ""),
    Column("docs/s", 7, 2, lambda row, _: compact(row.rate("documents"))),
    Column("MB/s", 6, 2, lambda row, _: compact(row.rate("bytes", "text_bytes"), 1e6)),
    Column("tokens/s", 8, 5, lambda row, _: compact(row.rate("tokens"))),
    Column("removed", 7, 3, lambda row, _: compact(row.removed)),
    Column("elapsed", 7, 4, lambda row, now: clock(row.elapsed(now))),
    Column("ETA", 7, 1, lambda row, now: "done" if row.is_done else clock(row.left(now))),
)


@dataclass
class Board:
    """The stages of a run, as far as they have begun."""

    now: Callable[[], float]
    rows: list[Row] = field(default_factory=list)
    _removed_on_reading: int = 0

    def update(self, progress: Progress) -> None:
        """Take notice of the progress of a stage, the last one or a new one."""
        now = self.now()
        if not self.rows or self.rows[-1].progress.stage != progress.stage:
            self.rows.append(Row(progress, now, now, self.rows[-1].removed if self.rows else 0))
        row = self.rows[-1]
        row.progress, row.seen = progress, now
        counts = progress.counts
        if progress.stage == "extract":
            row.removed = self._removed_on_reading = int(
                sum(counts.get(f"removed {reason.key}", 0) for reason in REASONS)
            )
        elif progress.stage in ("exact", "clusters"):  # a cluster's duplicates are the exact ones, too
            row.removed = max(row.removed, self._removed_on_reading + int(counts.get("duplicates", 0)))

    def table(self, width: int) -> RenderableType:
        """All rows, in at most `width` columns of characters, for which the last ones of COLUMNS may be left out."""
        now = self.now()
        columns = fitting(width)
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
        for column in columns:
            left = column.title == "stage"
            table.add_column(column.title, justify="left" if left else "right", width=column.width, no_wrap=True)
        for row in self.rows:
            style = "dim" if row.is_done and row is not self.rows[-1] else ""
            table.add_row(*(column.text(row, now) for column in columns), style=style)
        return table


def fitting(width: int) -> list[Column]:
    """The columns that a terminal of this width has space for; the first two are always there."""
    columns = list(COLUMNS)
    while sum(column.width + 1 for column in columns) - 1 > width and len(columns) > 2:
        columns.remove(max(columns, key=lambda column: column.rank))
    return columns


def compact(number: float | None, unit: float = 1) -> str:
    """`number` / `unit` in at most 7 characters: 9,999, 12.3k, 1.20M."""
    if number is None:
        return _UNKNOWN
    number /= unit
    if unit != 1 and number < 9999.5:
        return f"{number:,.1f}"
    if number < 9999.5:
        return f"{number:,.0f}"
    for suffix in "kMGT":
        number /= 1000
        if number < 999.5 or suffix == "T":
            return f"{number:.{2 if number < 9.995 else 1 if number < 99.95 else 0}f}{suffix}"
    raise AssertionError


def clock(seconds: float | None) -> str:
    """A duration as 0:05, 12:00 or 3:05:00; in days from 100 hours on."""
    if seconds is None:
        return _UNKNOWN
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 100:
        return f"{hours / 24:,.1f} d"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class _LinePrinter:
    """A line at the end of each stage, and every ten seconds."""

    def __init__(self, console: Console, board: Board) -> None:
        self._console, self._board = console, board
        self._last_line = board.now()

    def show(self, progress: Progress) -> None:
        self._board.update(progress)
        row = self._board.rows[-1]
        if row.is_done or row.seen - max(self._last_line, row.start) >= _SECONDS_BETWEEN_LINES:
            self._last_line = row.seen
            self._console.print(line(row, row.seen))


def line(row: Row, now: float) -> str:
    """What is to say about a stage in one line."""
    progress = row.progress
    parts = [f"{progress.stage:<11} {progress.done:,}/{progress.tasks:,}"]
    if progress.reused:
        parts.append(f"{progress.reused:,} from an earlier run")
    parts += [f"{progress.counts[name]:,.0f} {name}" for name in ("documents", "tokens") if name in progress.counts]
    for names, unit, title in (
        (("documents",), 1, "documents/s"),
        (("bytes", "text_bytes"), 1e6, "MB/s"),
        (("tokens",), 1, "tokens/s"),
    ):
        if (rate := row.rate(*names)) is not None:
            parts.append(f"{compact(rate, unit)} {title}")
    parts += [f"{row.removed:,} removed", clock(row.elapsed(now))]
    if not row.is_done:
        parts.append(f"ETA {clock(row.left(now))}")
    return ", ".join(parts)
