"""How long a run takes from its command to the end of its first step, with an empty compile cache and with a full one.

The command is the one that a user gives, in a process of its own, on a generated dataset; what torch and DeepSpeed
compile goes into a folder of ours. Moments are read from what a run leaves behind: the log of rank 0 (when it begins to
open the data and to build the model) and metrics.jsonl (when the steps begin, and how long each took). Files that the
kernel holds in memory, Python's own among them, stay there: cold is the compile cache alone.
"""

import contextlib
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from megagpt.benchmark.machine import portable
from megagpt.benchmark.targets import Target
from megagpt.config import load_config
from megagpt.data.indexed import IndexedDatasetWriter, token_dtype
from megagpt.errors import UserError

Result = dict[str, Any]
"""JSON types."""

TARGETS = {"cold": Target(40.0, "s"), "warm": Target(15.0, "s")}
PARTS = ("imports and process group", "data", "model and engine", "first step")
"""What comes until the end of the first step; "second step" is told beside it."""
_PHASES = ("opening the data", "building the model")
_STEPS = 2
_DOCUMENT_TOKENS = 1000
_CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "TORCH_EXTENSIONS_DIR": "extensions"}
"""Variables that say where torch, Triton and DeepSpeed keep what they compile, and our folders for it."""
_SECONDS_BETWEEN_LOOKS = 0.05


@dataclass(frozen=True)
class StartBenchmark:
    """What all measurements are given."""

    folder: Path
    """Scratch space: the dataset, a run folder, a compile cache."""
    config: str
    """File of the run's configuration."""
    overrides: Sequence[str]
    ranks: int
    """Processes of the run; more than one are started by torchrun."""
    tokens: int
    """Of the dataset."""
    repeats: int
    """Times that an empty cache is filled and used."""
    report: Callable[[str], None]
    """Is given a line about each start."""

    def run(self) -> Result:
        """All results; JSON types. UserError: the disk refuses, or the run failed."""
        vocab_size = load_config(self.config, self._overrides()).model.vocab_size
        try:
            write_dataset(self.folder / "train", self.tokens, vocab_size)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written: {error.strerror}; choose another --folder") from error
        starts: dict[str, list[dict[str, float]]] = {name: [] for name in TARGETS}
        for _ in range(self.repeats):
            shutil.rmtree(self.folder / "cache", ignore_errors=True)
            for name, found in starts.items():
                found.append(self._start())
                parts = ", ".join(f"{part} {seconds:.2f}" for part, seconds in found[-1].items())
                self.report(f"{name}: {_first_step(found[-1]):.2f} s ({parts})")
        return {
            "config": portable(self.config),
            "overrides": [portable(override) for override in self.overrides],
            "ranks": self.ranks,
            "repeats": self.repeats,
            **{name: self._judged(name, found) for name, found in starts.items()},
        }

    def _judged(self, name: str, starts: list[dict[str, float]]) -> Result:
        seconds = [_first_step(start) for start in starts]
        more = f"{min(seconds):.1f} to {max(seconds):.1f}"
        judged = TARGETS[name].judge(
            f"{name} start, to the first step", statistics.median(seconds), self.report, more, values=seconds
        )
        parts = {part: statistics.median(start[part] for start in starts) for part in starts[0]}
        return {"seconds": judged, "all_seconds": seconds, "parts": parts}

    def _overrides(self) -> list[str]:
        """The user's, then ours: two steps, each written down, and nothing beside them."""
        return [
            *self.overrides,
            f"train.steps={_STEPS}",
            "schedule.warmup_steps=0",
            "logging.every=1",
            f"train.run_dir={self.folder / 'run'}",
            f"data.train=[{{path: {self.folder / 'train'}}}]",
            "data.validation=[]",
        ]

    def _start(self) -> dict[str, float]:
        """Start a run, end it after its second step; seconds of each part."""
        run_dir = self.folder / "run"
        shutil.rmtree(run_dir, ignore_errors=True)
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(self.ranks)] if self.ranks > 1 else []
        command = [sys.executable, *launcher, "-m", "launch.train", self.config, *self._overrides()]
        caches = {name: str(self.folder / "cache" / folder) for name, folder in _CACHES.items()}
        with open(self.folder / "output", "wb") as output:
            started = time.time()
            process = subprocess.Popen(
                command, stdout=output, stderr=output, env=os.environ | caches, start_new_session=True
            )
        try:
            seconds = _watch(process, run_dir / "metrics.jsonl")
        finally:  # what follows the steps, the final checkpoint, is not of interest
            _kill_all(process)
        if not seconds:
            raise UserError(f"the run failed: {_reason(self.folder / 'output')}")
        began, first, second = seconds
        marks = [started, *_phases(run_dir), began, began + first]
        lengths = (after - before for before, after in pairwise(marks))
        return {**dict(zip(PARTS, lengths, strict=True)), "second step": second}


def _kill_all(process: "subprocess.Popen[bytes]") -> None:
    """With the ranks, which torchrun starts in sessions of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        for one in (*parent.children(recursive=True), parent):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()


def write_dataset(prefix: Path, tokens: int, vocab_size: int) -> None:
    """Random tokens in documents of a thousand, the last one shorter."""
    random, dtype = np.random.default_rng(0), token_dtype(vocab_size)
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for start in range(0, tokens, _DOCUMENT_TOKENS):
            writer.add_document(random.integers(0, vocab_size, min(_DOCUMENT_TOKENS, tokens - start)).astype(dtype))


def _first_step(parts: dict[str, float]) -> float:
    return sum(parts[part] for part in PARTS)


def _watch(process: "subprocess.Popen[bytes]", metrics: Path) -> tuple[float, float, float] | None:
    """When the run's steps began, in seconds since 1970, and how long its first two took; None: it ended before."""
    from megagpt.training.metrics import read_metrics

    while True:
        ended = process.poll() is not None
        records = list(read_metrics(metrics)) if metrics.exists() else []
        steps = [record["step_seconds"] for record in records if record["kind"] == "train"]
        if len(steps) == _STEPS:
            return records[0]["time"], steps[0], steps[1]
        if ended:
            return None
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _reason(output: Path) -> str:
    """The run's own word, which torchrun may have followed by many of its own; else the last line."""
    lines = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (said or lines[-1:] or ["it said nothing"])[0]


def _phases(run_dir: Path) -> list[float]:
    """When rank 0 began each of _PHASES, in seconds since 1970."""
    text = next(run_dir.glob("logs/**/rank_0.log")).read_text(encoding="utf-8")
    found = [re.search(rf"^(\S+ [\d:]+,\d+) INFO megagpt\.launch: {phase}$", text, re.MULTILINE) for phase in _PHASES]
    return [datetime.strptime(match[1], "%Y-%m-%d %H:%M:%S,%f").timestamp() for match in found if match]
