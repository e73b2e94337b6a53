"""The launch command as real processes that a test may signal, stop and kill, started in a fraction of a second.

Each rank is a fork of a process that has imported all it needs (tests/forked.py). It runs `python -m launch.train` from
its first line on, with its own environment and output file.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megagpt.training.metrics import read_metrics
from tests.distributed.ports import master_port
from tests.forked import ForkedProcess, run_as_main


class Job:
    """`world_size` ranks of one training run."""

    def __init__(
        self,
        config_file: Path,
        overrides: Sequence[str],
        world_size: int,
        folder: Path,
        prepare: Callable[[], object] | None = None,
    ) -> None:
        """Start them; folder: for their output. prepare: called in each rank before the command."""
        folder.mkdir(parents=True, exist_ok=True)
        self.world_size, self._folder = world_size, folder
        port = master_port()
        self.ranks = [
            ForkedProcess(
                target=_rank,
                args=(rank, world_size, port, [str(config_file), *overrides], folder / f"out_{rank}", prepare),
            )
            for rank in range(world_size)
        ]
        for process in self.ranks:
            process.start()

    def send(self, number: int, ranks: Sequence[int] | None = None) -> None:
        """Send a signal to some ranks, or to all."""
        for rank in range(self.world_size) if ranks is None else ranks:
            pid = self.ranks[rank].pid
            assert pid is not None
            if self.ranks[rank].exitcode is None:
                os.kill(pid, number)

    def wait(self, timeout: float = 60) -> list[int | None]:
        """Exit codes of all ranks; those that still run after `timeout` seconds are killed and have none."""
        deadline = time.monotonic() + timeout
        for process in self.ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.ranks]
        self.kill()
        return codes

    def kill(self) -> None:
        """SIGKILL for what is left."""
        for process in self.ranks:
            process.kill()
            process.join()

    @property
    def running(self) -> bool:
        """Whether any rank still runs."""
        return any(process.exitcode is None for process in self.ranks)

    def output(self, rank: int = 0) -> str:
        """What a rank has printed so far, on stdout and stderr."""
        path = self._folder / f"out_{rank}"
        return path.read_text() if path.exists() else ""

    def wait_until(self, condition: Callable[[], bool], timeout: float = 60) -> None:
        """Poll until `condition` holds; fails if no rank runs any more or it takes longer than `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.running, self.output()
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.005)


def start(
    config_file: Path,
    run_dir: Path,
    *overrides: str,
    world_size: int = 2,
    prepare: Callable[[], object] | None = None,
) -> Job:
    """Start a run in `run_dir`."""
    outputs = run_dir.parent / f"{run_dir.name}_output_{time.monotonic_ns()}"
    return Job(config_file, [f"train.run_dir={run_dir}", *overrides], world_size, outputs, prepare)


def records(run_dir: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The records of a run so far."""
    path = run_dir / "metrics.jsonl"
    found = list(read_metrics(path)) if path.exists() else []
    return [record for record in found if kind in (None, record["kind"])]


def manifest(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's manifest."""
    return json.loads((checkpoint / "manifest.json").read_text())


def _rank(
    rank: int,
    world_size: int,
    port: int,
    arguments: list[str],
    output: Path,
    prepare: Callable[[], object] | None,
) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    if prepare:
        prepare()
    run_as_main("launch.train", arguments, [Path(os.devnull), output, output])
