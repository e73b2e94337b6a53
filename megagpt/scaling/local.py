"""Runs of a scaling study on this machine, one after the other, each under torchrun.

On a CPU a run with `cores_per_rank` may use as many cores as its ranks have together, so that more ranks have more
cores as they would have on a cluster. Whatever ends this process ends the run under way, with all of its processes.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from megagpt.config import check_precision
from megagpt.errors import ConfigError, UserError
from megagpt.scaling.experiments import Attempt, EntryFolder, StudyFolder, failed_rank_code
from megagpt.scaling.laws.study import LawsConfig
from megagpt.scaling.study import Entry, StudyConfig

_GRACE_SECONDS = 5.0  # for the ranks to end by themselves, before they are killed


def check_machine(study: StudyConfig | LawsConfig, entries: Sequence[Entry]) -> None:
    """Raises ConfigError with all that this machine cannot do of these runs."""
    import torch

    gpus, cores = torch.cuda.device_count() if torch.cuda.is_available() else 0, len(os.sched_getaffinity(0))
    problems: dict[str, None] = {}
    for entry in entries:
        uses_gpus = entry.config.train.device == "cuda" or (entry.config.train.device == "auto" and gpus > 0)
        if entry.nodes > 1:
            problem = f"{entry.ranks} ranks on {entry.nodes} nodes: this is one machine; start the study with --slurm"
        elif uses_gpus and entry.ranks > gpus:
            problem = f"{entry.ranks} ranks need as many GPUs; this machine has {gpus}"
        elif not uses_gpus and study.cores_per_rank and entry.ranks * study.cores_per_rank > cores:
            problem = (
                f"{entry.ranks} ranks with cores_per_rank {study.cores_per_rank} need "
                f"{entry.ranks * study.cores_per_rank} CPU cores; this machine gives {cores}"
            )
        else:
            try:
                check_precision(entry.config.train.precision, "cuda" if uses_gpus else "cpu")
            except ConfigError as error:
                problems[str(error)] = None
            continue
        problems[problem] = None
    if len(problems) == 1:
        raise ConfigError(next(iter(problems)))
    if problems:
        raise ConfigError("\n  ".join([f"{len(problems)} things that this machine cannot do", *problems]))


def settle(folder: StudyFolder) -> None:
    """Write down the end of runs whose command was killed; those that go on without it stay as they are."""
    for entry in folder.entries:
        if entry.state == "running" and (attempt := entry.last) and not _processes_of(entry.run_dir(attempt)):
            killed = "the command that ran the study was killed"
            entry.end(attempt, None, folder.stored.study.keep_checkpoints, otherwise=killed)


def run_all(folder: StudyFolder, report: Callable[[str], None]) -> None:
    """Run what is missing or failed; `report` is given a line about each. A run that fails does not stop the others.

    Raises UserError if a run goes on whose command was killed: it would disturb the others.
    """
    for entry in folder.entries:
        if entry.state == "running" and (attempt := entry.last):
            pids = ", ".join(map(str, _processes_of(entry.run_dir(attempt))))
            raise UserError(f"{entry.path}: still runs, though its study was killed; wait, or end processes {pids}")
    # Repeats come last, so that a machine that is busy for a while slows one run of every point and not all of one.
    todo = sorted(folder.to_run(), key=lambda entry: entry.stored.repeat)
    done = len(folder.entries) - len(todo)
    report(f"{len(folder.entries)} runs, of which {done} are finished")
    for entry in todo:
        done += 1
        report(f"{done}/{len(folder.entries)}  {entry.title}: {entry.name}")
        attempt = _run(folder, entry)
        took = f"after {attempt.ended - attempt.started:.0f} s" if attempt.ended else ""
        report(f"  finished {took}" if attempt.state == "finished" else
               f"  failed {took} with exit code {attempt.exit_code}: {attempt.error}")  # fmt: skip


def _run(folder: StudyFolder, entry: EntryFolder) -> Attempt:
    """One attempt at one run, to its end."""
    study, ranks = folder.stored.study, entry.stored.ranks
    cores = sorted(os.sched_getaffinity(0))
    granted = cores[: ranks * study.cores_per_rank] if study.cores_per_rank else cores
    on_cpu = not _has_gpus() or entry.stored.run_config().train.device == "cpu"
    attempt = entry.begin(shared_cores=len(granted) if on_cpu and len(granted) < ranks else None)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "launch.train", *entry.arguments(attempt)]
    code: int | None = None
    error: str | None = "interrupted"
    try:
        with entry.log(attempt).open("wb") as log:
            process = _start(command, granted, log)
            code = process.wait()
        code, error = (failed_rank_code(entry.log(attempt)) or code) if code else 0, None
    finally:
        _end_processes(entry.run_dir(attempt))
        entry.end(attempt, code, study.keep_checkpoints, error)
    return attempt


def _start(command: Sequence[str], cores: Sequence[int], log: IO[bytes]) -> subprocess.Popen[bytes]:
    """A process that may use these CPU cores only, in a session of its own: an interrupt of this one is not for it."""
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)  # a child inherits it
    try:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    finally:
        os.sched_setaffinity(0, own)


def _has_gpus() -> bool:
    import torch

    return torch.cuda.is_available()


def _end_processes(run_dir: Path) -> None:
    """End what is left of the processes of a run: torchrun and ranks, which have sessions of their own."""
    deadline = time.monotonic() + _GRACE_SECONDS
    _send(signal.SIGTERM, _processes_of(run_dir))
    try:
        while _processes_of(run_dir) and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:  # also when an impatient user interrupts again
        while pids := _processes_of(run_dir):
            _send(signal.SIGKILL, pids)
            time.sleep(0.1)


def _send(number: signal.Signals, pids: Sequence[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _processes_of(run_dir: Path) -> list[int]:
    """The processes whose command line names this run folder."""
    wanted = f"train.run_dir={run_dir}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:  # gone meanwhile, or another user's
                continue
            if wanted in words:
                found.append(int(folder.name))
    return found
