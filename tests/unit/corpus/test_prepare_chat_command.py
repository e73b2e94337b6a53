"""python -m tools.prepare_chat as its user runs it: what it prints, its errors, and that it is all or nothing."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.forked import run_module
from tests.unit.corpus.test_chat import chats, contents, make, write_lines

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.slow


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "tools.prepare_chat", *map(str, arguments)]


def run(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return run_module("tools.prepare_chat", *arguments)


def test_it_tells_what_it_made_and_says_so_when_it_was_made_before(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [*chats(99), {"prompt": "x" * 5000, "response": "y"}, b"garbage"])
    options = ("--input", path, "--output", tmp_path / "out", "--tokenizer", "bytes", "--max-tokens", 4000)
    done = run(*options)
    assert (done.returncode, done.stderr) == (0, "")
    counts = json.loads((tmp_path / "out/manifest.json").read_text())["counts"]
    progress, *lines = done.stdout.splitlines()
    assert progress.startswith("chat        1/1, 100 documents")
    assert lines[0].split() == ["conversations", "100"]
    assert lines[1].startswith("too long                     1 left out")
    for line, name in zip(lines[2:4], ("train", "validation"), strict=True):
        assert line.split()[0] == name
        assert f"{counts[f'learned_tokens_{name}']:,} learned (" in line
    assert lines[4] == f"left out: 1 bad lines, 0 empty or no text: see quarantine.jsonl in {tmp_path / 'out'}"
    again = run(*options)
    assert again.stdout.splitlines()[0].endswith(
        "already finished by an earlier run with the same input and options; nothing to do"
    )


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--template", "no.jinja"], 2, "error: template no.jinja: No such file or directory; give chatml or plain"),
        (["--validation-fraction", "1"], 2, "validation_fraction: expected"),
        (["--max-bad", "0"], 1, "error: 1 of 4 documents cannot be read (25.0%, more than --max-bad 0.0)"),
    ],
)
def test_each_error_is_one_line_and_makes_nothing(arguments, code, message, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [*chats(3), b"garbage"])
    done = run("--input", path, "--output", tmp_path / "out", "--tokenizer", "bytes", *arguments)
    assert done.returncode == code
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_dataset_and_the_next_is_as_if_it_had_not_been(number, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", chats(4000))
    options = ("--input", path, "--tokenizer", "bytes")
    process = subprocess.Popen(
        command(*options, "--output", tmp_path / "out"),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.*/quarantine.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, message = process.communicate(timeout=60)
    expected = {
        signal.SIGINT: (130, "error: interrupted\n"),
        signal.SIGTERM: (143, "error: terminated; nothing was made\n"),
        signal.SIGKILL: (-9, ""),
    }
    assert (process.returncode, message) == expected[number]
    visible = {p.name for p in tmp_path.iterdir() if not p.name.startswith(".")}
    assert visible == {"a.jsonl"}
    if number != signal.SIGKILL:
        assert {p.name for p in tmp_path.iterdir()} == visible
    else:
        make(tmp_path / "out", path, validation_fraction=0.01)
        assert {p.name for p in tmp_path.iterdir()} == {"a.jsonl", "out"}
        make(tmp_path / "whole", path, validation_fraction=0.01)
        assert contents(tmp_path / "out") == contents(tmp_path / "whole")
