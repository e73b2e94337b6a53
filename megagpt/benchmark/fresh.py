"""Functions called in new processes, alone or as the ranks of a gloo job: costs of a start, memory, seen apart.

A function takes its arguments as one mapping of JSON types and returns another; of a job, rank 0's is given back.
Inside `joined` it is a rank of a process group.
"""

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, TextIO

from megagpt.errors import UserError

_RUN = "from megagpt.benchmark.fresh import serve; serve({!r}, {!r}, {!r})"
_RUN_TURNS = "from megagpt.benchmark.fresh import serve_turns; serve_turns({!r}, {!r})"
_SECONDS_BETWEEN_LOOKS = 0.05


def call(
    module: str,
    function: str,
    arguments: Mapping[str, Any],
    ranks: int = 0,
    cpus: int = 0,
    threads: int = 0,
    report: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """What `function` of `module` returns in a new process.

    ranks: number of processes that are joined to a job; 0: one process that is none. cpus: of those that this process
    may use, each new one is bound to so many; 0: to none. threads: of each rank; 0: its share of the cpus. report: is
    given the lines that the first process prints, as they come. UserError: a process failed; its last line is given.
    """
    with tempfile.TemporaryDirectory(prefix="megagpt_benchmark_") as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-c", _RUN.format(module, function, str(result))]
        allowed = sorted(os.sched_getaffinity(0))
        bound = set(allowed[-cpus:]) if cpus else set(allowed)
        places: list[dict[str, str]] = _places(ranks, threads or max(1, len(bound) // ranks)) if ranks else [{}]
        processes = []
        try:
            for number, place in enumerate(places):
                files = [Path(folder) / f"{name}_{number}" for name in ("printed", "output")]
                with open(files[0], "wb") as printed, open(files[1], "wb") as output:
                    process = subprocess.Popen(
                        command, stdin=subprocess.PIPE, stdout=printed, stderr=output, env={**os.environ, **place}
                    )
                processes.append(process)
                os.sched_setaffinity(process.pid, bound)
                assert process.stdin is not None
                with process.stdin as pipe, contextlib.suppress(BrokenPipeError):  # it says itself why it ended
                    pipe.write(json.dumps(arguments).encode())
            with open(Path(folder) / "printed_0", encoding="utf-8") as lines:
                failed = _first_failure(processes, lambda: _pass_on(lines, report))
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if failed is not None:
            said = (Path(folder) / f"output_{failed}").read_bytes()
            raise UserError(f"{function} failed: {_reason(said, processes[failed])}")
        return json.loads(result.read_bytes())


def serve(module: str, function: str, result: str) -> None:
    """In the new process: call the function with the arguments on standard input; rank 0 writes what it returns."""
    value = getattr(importlib.import_module(module), function)(json.load(sys.stdin))
    if os.environ.get("RANK", "0") == "0":
        Path(result).write_text(json.dumps(value), encoding="utf-8")


@contextlib.contextmanager
def turns(
    module: str, function: str, arguments: Mapping[str, Any], threads: int, name: str
) -> Iterator[Callable[[], None]]:
    """A function that lives in a new process: `function` of `module` returns it, and each call here is one call there.

    The process ends with the block, or with this one. UserError: it failed, and its last line is given, of the
    contender `name`.
    """
    place = {"OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", _RUN_TURNS.format(module, function)]
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, env={**os.environ, **place}
        )

        def ask(line: str) -> None:
            assert process.stdin is not None
            assert process.stdout is not None
            with contextlib.suppress(BrokenPipeError):  # it says itself why it ended
                process.stdin.write(f"{line}\n".encode())
                process.stdin.flush()
            if not process.stdout.readline():
                process.wait()
                output.seek(0)
                raise UserError(f"{name} failed: {_reason(output.read(), process)}")

        try:
            ask(json.dumps(arguments))
            yield lambda: ask("")
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def serve_turns(module: str, function: str) -> None:
    """In the new process: answer each line on standard input with one when it is done; the first one has arguments.

    At the end of the input the process ends at once, whatever it is at: who asked is gone.
    """
    lines: SimpleQueue[str] = SimpleQueue()
    Thread(target=_read_lines, args=(lines,), daemon=True).start()
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what anybody prints is no answer
        run = getattr(importlib.import_module(module), function)(json.loads(lines.get()))
        print(file=answers, flush=True)
        while True:
            lines.get()
            run()
            print(file=answers, flush=True)


def _read_lines(lines: "SimpleQueue[str]") -> None:
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)


@contextlib.contextmanager
def joined() -> Iterator[int]:
    """This process, which `call` started, as a rank of its job: a process group of gloo; its rank."""
    import torch
    import torch.distributed as dist

    from megagpt.training.engine import init_process_group

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, world_size, is_master=rank == 0)
    init_process_group("cpu", store, rank, world_size)
    try:
        yield rank
    finally:
        dist.destroy_process_group()


def resident_bytes() -> int:
    """Memory of this process now: its resident set."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """The largest resident set of this process since it started, or since `forget_peak`."""
    return _status("VmHWM")


def forget_peak() -> None:
    """Let `peak_bytes` begin anew."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    kilobytes = next(line.split()[1] for line in lines if line.startswith(f"{key}:"))
    return int(kilobytes) * 1024


def _places(ranks: int, threads: int) -> list[dict[str, str]]:
    """The environment of each rank of a job on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(threads),
        "DS_ACCELERATOR": "cpu",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _first_failure(processes: Sequence["subprocess.Popen[bytes]"], meanwhile: Callable[[], None]) -> int | None:
    """Wait for all, or for the first that fails: its number; None: none did. `meanwhile` is called until the end."""
    while True:
        codes = [process.poll() for process in processes]
        meanwhile()
        for number, code in enumerate(codes):
            if code:
                return number
        if None not in codes:
            return None
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _pass_on(lines: TextIO, report: Callable[[str], None] | None) -> None:
    """Report the whole lines that were printed since the last time."""
    while report:
        start = lines.tell()
        line = lines.readline()
        if not line.endswith("\n"):
            lines.seek(start)
            return
        report(line.rstrip("\n"))


def _reason(output: bytes, process: "subprocess.Popen[bytes]") -> str:
    lines = output.decode(errors="replace").strip().splitlines()
    if process.returncode < 0:
        return f"ended by {signal.Signals(-process.returncode).name}; it may need more memory than there is"
    return lines[-1] if lines else f"exit code {process.returncode}"
