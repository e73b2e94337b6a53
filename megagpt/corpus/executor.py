"""What runs the tasks of a stage: processes of this machine, or the ranks of an MPI program. Both do the same.

The first task that fails ends the run: its error names the stage, and the input it was at. A worker that is killed
ends it, too, and says what it was at. Workers end when the process that started them does.
"""

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import wait as wait_for_sentinels
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

from megagpt.corpus.workspace import (
    Receipt,
    disk_error,
    is_being_written,
    last_position,
    read_receipt,
    task_folder,
    write_folder,
)
from megagpt.errors import UserError

_SECONDS_BETWEEN_CHECKS = 1.0


class Task(Protocol):
    """A part of a stage that needs nothing from the other parts; its text says which input it is about."""

    def run(self, folder: Path) -> Receipt:
        """Write the result into `folder` and return counts."""


@dataclass(frozen=True)
class Progress:
    """How far a stage is."""

    stage: str
    tasks: int
    """Tasks of the stage."""
    done: int
    """Tasks finished, by this run or before."""
    reused: int
    """Tasks finished by an earlier run."""
    counts: Receipt
    """Sums of the receipts of the finished tasks."""
    new: Receipt
    """The same of the tasks that this run finished."""


Observer = Callable[[Progress], None]


class Pool(Protocol):
    """Several workers."""

    workers: int

    def submit(self, function: Callable[..., Receipt], *arguments: Any) -> "Future[Receipt]":
        """Let a worker call `function`; what cannot be pickled cannot be sent."""

    def check(self) -> None:
        """BrokenExecutor if a worker has died."""

    def dead_workers(self) -> dict[int, int]:
        """After that: process id and exit code of the workers that ended by themselves; all others are ended."""


@dataclass(frozen=True)
class StageResult:
    """What the tasks of a stage left behind, in their order."""

    folders: list[Path]
    receipts: list[Receipt]
    reused: int
    """Tasks finished by an earlier run."""
    new: Receipt
    """Sums of the receipts of the tasks that this run finished."""

    def total(self, name: str) -> int:
        """The sum of one count of the receipts, of which some may lack it."""
        return int(sum(receipt.get(name, 0) for receipt in self.receipts))


def run_stage(pool: Pool, folder: Path, tasks: Sequence[Task], observe: Observer) -> StageResult:
    """Run all tasks whose result is not yet in its folder, `folder`/000000 and so on.

    UserError: a task failed for a reason outside the program, or a worker was killed; RuntimeError: any other failure.
    """
    targets = [task_folder(folder, number) for number in range(len(tasks))]
    receipts = {number: receipt for number, target in enumerate(targets) if (receipt := read_receipt(target))}
    missing = iter([number for number in range(len(tasks)) if number not in receipts])
    reused = len(receipts)
    counts: Counter[str] = Counter()
    new: Counter[str] = Counter()
    for receipt in receipts.values():
        counts.update(receipt)
    observe(Progress(folder.name, len(tasks), reused, reused, dict(counts), {}))
    running: dict[Future[Receipt], int] = {}
    try:
        while len(receipts) < len(tasks):
            for number in itertools.islice(missing, 2 * pool.workers - len(running)):
                running[pool.submit(_run_task, targets[number], tasks[number])] = number
            finished, _ = wait(running, _SECONDS_BETWEEN_CHECKS, FIRST_COMPLETED)
            pool.check()
            for future in finished:
                receipt = future.result()
                receipts[running.pop(future)] = receipt
                counts.update(receipt)
                new.update(receipt)
            observe(Progress(folder.name, len(tasks), len(receipts), reused, dict(counts), dict(new)))
    except BrokenExecutor:
        at_work = [(targets[number], tasks[number]) for number in running.values()]
        raise UserError(f"stage {folder.name}{_death_notice(pool, at_work)}") from None
    return StageResult(targets, [receipts[number] for number in range(len(tasks))], reused, dict(new))


def _run_task(target: Path, task: Task) -> Receipt:
    """What a worker does; every error says first where it happened."""
    where = f"stage {target.parent.name}, {task}"
    try:
        return write_folder(target, task.run)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except OSError as error:
        raise UserError(f"{where}: {disk_error(error, target.parent.parent)}") from error
    except MemoryError as error:
        raise UserError(f"{where}: out of memory; run the same command again with fewer --workers") from error
    except Exception as error:
        raise RuntimeError(f"{where}: {type(error).__name__}: {error}") from error


# Local processes


def start_fork_server() -> multiprocessing.context.ForkServerContext:
    """Start the process that the workers are copies of, which takes a second to import what they need, unless it runs
    already; does not wait for it."""
    context = multiprocessing.get_context("forkserver")  # fork is unsafe once the parent has threads
    context.set_forkserver_preload(["__main__", "megagpt.corpus.pipeline"])
    with _hidden_from_children(signal.SIGHUP):  # which a terminal sends to all its processes, as SIGINT
        resource_tracker.ensure_running()  # before SIGINT is blocked, which it would undo
    with _hidden_from_children(signal.SIGINT, signal.SIGHUP):
        forkserver.ensure_running()
    return context


class LocalPool:
    """Processes of this machine; leaving the context ends them at once, whatever they are doing."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._not_ours = set(multiprocessing.active_children())
        self._processes: set[BaseProcess] = set()

    def __enter__(self) -> "LocalPool":
        context = start_fork_server()
        self._executor = ProcessPoolExecutor(self.workers, context, _prepare_worker)
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            process.kill()
        self._executor.shutdown(cancel_futures=True)

    def submit(self, function: Callable[..., Receipt], *arguments: Any) -> "Future[Receipt]":
        """Let a worker call `function`."""
        with _deferred(signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a half started worker could not be ended
            future = self._executor.submit(function, *arguments)
            self._processes.update(set(multiprocessing.active_children()) - self._not_ours)
        return future

    def check(self) -> None:
        """BrokenExecutor if a worker has died: the executor itself overlooks some deaths until it is used again."""
        if wait_for_sentinels([process.sentinel for process in self._processes], 0):
            raise BrokenExecutor

    def dead_workers(self) -> dict[int, int]:
        """Process id and exit code of the workers that ended by themselves; all others are ended."""
        for process in self._processes:
            process.terminate()
            assert process.pid is not None
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGCONT)  # one that was stopped would not notice
        self._executor.shutdown(cancel_futures=True)
        codes = {process.pid: process.exitcode for process in self._processes}
        return {pid: code for pid, code in codes.items() if pid and code not in (None, 0, -signal.SIGTERM)}


@contextlib.contextmanager
def _deferred(*signals: signal.Signals) -> Iterator[None]:
    """Let these signals arrive after this context only. (A signal mask would not do: other threads may take them.)"""
    if threading.current_thread() is not threading.main_thread():  # which alone is interrupted, and may set handlers
        yield
        return
    arrived: list[int] = []
    before = {number: signal.signal(number, lambda number, _: arrived.append(number)) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for late in arrived:
            signal.raise_signal(late)


@contextlib.contextmanager
def _hidden_from_children(*signals: signal.Signals) -> Iterator[None]:
    """Let programs that are started in this context, and their children, never see the signals."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _prepare_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where another had started the server; the parent ends the pool
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for_sentinels([parent.sentinel])
    os._exit(1)


def _death_notice(pool: Pool, at_work: Sequence[tuple[Path, Task]]) -> str:
    """Which worker died, of what, and what it was working on."""
    advice = "run the same command again to go on, with fewer --workers if memory ran out"
    for pid, code in pool.dead_workers().items():
        reason = f"killed by {_signal_name(-code)}" if code < 0 else f"gone with exit code {code}"
        places = [last_position(target, pid) or str(task) for target, task in at_work if is_being_written(target, pid)]
        where = "".join(f", {place}" for place in places)
        return f"{where}: a worker was {reason}; {advice}"
    return f": a worker ended without a word; {advice}"


def _signal_name(number: int) -> str:
    return {known.value: known.name for known in signal.Signals}.get(number, f"signal {number}")


# MPI


class MPIPool:
    """The ranks of an MPI program; rank 0 gives out the work."""

    def __init__(self, executor: Any, workers: int) -> None:
        self._executor = executor
        self.workers = workers

    def submit(self, function: Callable[..., Receipt], *arguments: Any) -> "Future[Receipt]":
        """Let another rank call `function`."""
        return self._executor.submit(function, *arguments)

    def check(self) -> None:
        """Nothing to check: MPI ends all ranks when one dies."""

    def dead_workers(self) -> dict[int, int]:
        """None: see `check`."""
        return {}


@contextlib.contextmanager
def mpi_pool(launched: int) -> Iterator[MPIPool | None]:
    """At rank 0 of an MPI program the pool of its other ranks; they work inside this context, and get None after that.

    `launched`: processes that the launcher says it started (0: nothing known); more than MPI sees is an error, as each
    would do all the work. With a single rank, it works by itself. UserError: MPI is not installed, or does not work.
    """
    try:
        from mpi4py import MPI
        from mpi4py.futures import MPICommExecutor
    except (ImportError, RuntimeError) as error:
        raise UserError(f"--executor mpi: {error}; install it with pip install 'megagpt[mpi]'") from error
    world = MPI.COMM_WORLD
    if launched > world.size == 1:
        raise UserError(
            f"--executor mpi: the launcher started {launched} processes, but MPI sees only one; start it with the MPI "
            "that mpi4py uses: mpiexec -n N of the same installation, or srun --mpi=pmi2"
        )
    with MPICommExecutor(world, root=0) as executor:
        yield None if executor is None else MPIPool(executor, max(1, world.size - 1))
