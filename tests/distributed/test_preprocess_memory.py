"""The memory of preprocessing does not grow with the input."""

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.unit.corpus.texts import WORDS

ROOT = Path(__file__).parents[2]
PART = 5_000
MOST_GROWTH = 16 << 20
"""Bytes: 100 for each document that the larger corpus has more."""

pytestmark = pytest.mark.slow


def write_short_documents(path: Path, count: int) -> Path:
    """About 100 bytes each, of which one in ten is a copy of an earlier one, and one in ten nearly."""
    rng = random.Random(count)
    texts: list[str] = []
    with open(path, "w") as file:
        for number in range(count):
            text = " ".join(rng.choices(WORDS, k=18))
            if number % 10 < 2 and texts:
                text = rng.choice(texts) + ("" if number % 10 else " " + rng.choice(WORDS))
            elif len(texts) < 1000:
                texts.append(text)
            file.write(json.dumps({"text": text}) + "\n")
    return path


def peak_memory(source: Path, output: Path) -> dict[str, int]:
    """The most memory that the command's own process had, and that any worker had, in bytes, without mapped files."""
    config = output.with_suffix(".yaml")
    config.write_text(
        "{execution: {chunk_mb: 2, workers: 2}, clean: {repair_encoding: false}, "
        "dedup: {bands: 4, rows: 8, num_perm: 32}}"
    )
    arguments = ("--config", config, "--input", source, "--output", output, "--tokenizer", "bytes")
    command = psutil.Popen(
        [sys.executable, "-m", "tests.distributed.small_parts", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DOCUMENTS_A_PART": str(PART)},
        stdout=subprocess.DEVNULL,
    )
    peak = {"command": 0, "workers": 0}
    while command.poll() is None:
        for process in [command, *command.children(recursive=True)]:
            name = "command" if process.pid == command.pid else "workers"
            peak[name] = max(peak[name], anonymous_bytes(process.pid))
        time.sleep(0.05)
    assert command.wait() == 0
    return peak


def anonymous_bytes(pid: int) -> int:
    """Resident memory of a process that is not of files; 0: it has ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) << 10
    return 0


def test_five_times_the_documents_take_no_more_memory(tmp_path: Path) -> None:
    small, large = (
        peak_memory(write_short_documents(tmp_path / f"{name}.jsonl", count), tmp_path / name)
        for name, count in (("small", 40_000), ("large", 200_000))
    )
    for name in ("command", "workers"):
        assert 20 << 20 < small[name] < 1 << 30
        assert large[name] - small[name] < MOST_GROWTH, (name, small, large)
