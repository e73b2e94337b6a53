"""The display: its numbers from given progress, its width, and what a terminal and a log get to see."""

import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
from fcntl import ioctl
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

from megagpt.corpus.display import COLUMNS, Board, clock, compact, display, fitting, line
from megagpt.corpus.executor import Progress
from tests.unit.corpus.texts import write_jsonl

ROOT = Path(__file__).parents[3]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def shown(board: Board, width: int) -> list[str]:
    console = Console(width=width, force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(board.table(width))
    return Text.from_ansi(capture.get()).plain.splitlines()


def going_on(clock: Clock) -> Board:
    """A run that goes on from 20 of 50 chunks, and did 10 more in 5 seconds."""
    board = Board(clock)
    old = {"documents": 20_000, "bytes": 200e6, "removed clean": 40, "removed filter.language": 2}
    board.update(Progress("extract", 50, 20, 20, old, {}))
    clock.now += 5
    counts = {"documents": 30_000, "bytes": 300e6, "removed clean": 60, "removed filter.language": 3}
    board.update(Progress("extract", 50, 30, 20, counts, {"documents": 10_000, "bytes": 100e6}))
    return board


def test_rates_and_the_time_left_count_this_run_alone() -> None:
    now = Clock()
    board = going_on(now)
    header, row = shown(board, 120)
    assert header.split() == [column.title for column in COLUMNS]
    assert row.split() == ["extract", "30/50", "20", "2,000", "20.0", "–", "63", "0:05", "0:10"]
    now.now += 4
    assert shown(board, 120)[1].split()[-2:] == ["0:09", "0:06"]
    assert line(board.rows[0], now.now) == (
        "extract     30/50, 20 from an earlier run, 30,000 documents, 2,000 documents/s, 20.0 MB/s, 63 removed, 0:09, "
        "ETA 0:06"
    )


def test_nothing_is_said_of_the_time_left_before_a_task_of_this_run_is_done() -> None:
    now = Clock()
    board = Board(now)
    board.update(Progress("extract", 50, 20, 20, {"documents": 9}, {}))
    now.now += 60
    assert shown(board, 120)[1].split() == ["extract", "20/50", "20", "–", "–", "–", "0", "1:00", "–"]


def test_what_was_removed_adds_up_over_the_stages_and_copies_count_once() -> None:
    board = going_on(Clock())
    for stage, counts in (
        ("exact", {"documents": 1, "duplicates": 7}),
        ("bands", {"documents": 1}),
        ("clusters", {"duplicates": 17}),  # the exact copies among them
        ("select", {"documents": 1}),
    ):
        board.update(Progress(stage, 1, 1, 0, dict(counts), dict(counts)))
    assert [row.removed for row in board.rows] == [63, 70, 70, 80, 80]
    assert all(shown(board, 120)[number].split()[-1] == "done" for number in (2, 3, 4, 5))


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    board = going_on(Clock())
    board.update(Progress("tokenize", 16_384, 16_384, 0, {"tokens": 9e15}, {"documents": 9e9, "tokens": 9e15}))
    lines = shown(board, width)
    assert len(lines) == 3
    assert max(map(len, lines)) <= width
    titles = [column.title for column in fitting(width)]
    assert titles[:2] == ["stage", "chunks"]
    if width >= 60:
        assert {"docs/s", "MB/s", "removed", "ETA"} <= set(titles)
        assert "…" not in "".join(lines)


@pytest.mark.parametrize(
    ("number", "unit", "text"),
    [
        (None, 1, "–"),
        (0, 1, "0"),
        (9_999, 1, "9,999"),
        (9_999.6, 1, "10.0k"),
        (99_960, 1, "100k"),
        (1_234_567, 1, "1.23M"),
        (999_600, 1, "1.00M"),
        (3e15, 1, "3000T"),
        (12_345_678, 1e6, "12.3"),
    ],
)
def test_numbers_are_short(number: float | None, unit: float, text: str) -> None:
    assert compact(number, unit) == text


def test_durations() -> None:
    assert [clock(seconds) for seconds in (None, 0, 59.6, 3599, 3600 * 5 + 61, 3600 * 101)] == [
        *("–", "0:00", "1:00", "59:59", "5:01:01", "4.2 d")
    ]


def test_a_log_gets_a_line_a_stage_and_one_every_ten_seconds() -> None:
    now = Clock()
    console = Console(width=40, soft_wrap=True, force_terminal=False)
    with console.capture() as capture, display(console, now) as observe:
        for second in range(25):
            observe(Progress("extract", 25, second, 0, {"documents": second}, {"documents": second}))
            now.now += 1
        observe(Progress("extract", 25, 25, 0, {"documents": 25}, {"documents": 25}))
        observe(Progress("exact", 0, 0, 0, {}, {}))
    assert [text.split(",")[0].split() for text in capture.get().splitlines()] == [
        ["extract", "10/25"],
        ["extract", "20/25"],
        ["extract", "25/25"],
        ["exact", "0/0"],
    ]


@pytest.mark.slow
@pytest.mark.parametrize("width", [60, 120])
def test_a_terminal_shows_a_table_that_fits(tmp_path: Path, width: int) -> None:
    write_jsonl(tmp_path / "a.jsonl", [f"text number {number} " * 20 for number in range(50)])
    master, slave = pty.openpty()
    ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    arguments = ["--input", str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "out"), "--tokenizer", "bytes"]
    command = [sys.executable, "-m", "tools.preprocess", *arguments, "--workers", "1"]
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    environment["TERM"] = "xterm-256color"
    with subprocess.Popen(command, cwd=ROOT, stdin=slave, stdout=slave, stderr=slave, env=environment) as process:
        os.close(slave)
        output = read_all(master)
    assert process.returncode == 0, output
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output[output.rindex("stage  ") :]).splitlines()
    table = [text.rstrip() for text in last[: last.index(next(text for text in last if text.startswith("join"))) + 1]]
    assert [text.split()[0] for text in table] == (
        ["stage", "extract", "exact", "keys", "bands", "clusters", "select", "tokenize", "write", "join"]
    )
    assert max(map(len, table)) <= width
    assert all(text.endswith("done") for text in table[1:])
    assert f"\x1b[{len(table) - 1}A" in output or output.count("stage  ") > 1


def read_all(descriptor: int) -> str:
    """What a program writes to its terminal until it ends."""
    chunks = []
    while select.select([descriptor], [], [], 60)[0]:
        try:
            chunk = os.read(descriptor, 1 << 16)
        except OSError:  # EIO: nobody has the other end open any more
            break
        if not chunk:
            break
        chunks.append(chunk)
    os.close(descriptor)
    return b"".join(chunks).decode()
