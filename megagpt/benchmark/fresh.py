"""Functions called in new processes, alone or as the ranks of a gloo job: what a start costs, and memory, seen apart.

A function takes its arguments as one mapping of JSON types and returns another; of a job, rank 0's is given back.
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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megagpt.errors import UserError

_RUN = "from megagpt.benchmark.fresh import serve; serve({!r}, {!r}, {!r})"
_SECONDS_BETWEEN_LOOKS = 0.05


def call(module: str, function: str, arguments: Mapping[str, Any], ranks: int = 0, cpus: int = 0) -> dict[str, Any]:
    """What `function` of `module` returns in a new process.

    ranks: number of processes that are joined to a job; 0: one process that is none. cpus: of those that this process
    may use, each new one is bound to so many; 0: to none. UserError: a process failed; its last line is given.
    """
    with tempfile.TemporaryDirectory(prefix="megagpt_benchmark_") as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-c", _RUN.format(module, function, str(result))]
        allowed = sorted(os.sched_getaffinity(0))
        bound = set(allowed[-cpus:]) if cpus else set(allowed)
        places: list[dict[str, str]] = _places(ranks, len(bound)) if ranks else [{}]
        processes = []
        try:
            for number, place in enumerate(places):
                with open(Path(folder) / f"output_{number}", "wb") as output:
                    process = subprocess.Popen(
                        command, stdin=subprocess.PIPE, stdout=output, stderr=output, env={**os.environ, **place}
                    )
                processes.append(process)
                os.sched_setaffinity(process.pid, bound)
                assert process.stdin is not None
                with process.stdin as pipe, contextlib.suppress(BrokenPipeError):  # it says itself why it ended
                    pipe.write(json.dumps(arguments).encode())
            failed = _first_failure(processes)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if failed is not None:
            raise UserError(f"{function} failed: {_reason(Path(folder) / f'output_{failed}', processes[failed])}")
        return json.loads(result.read_bytes())


def serve(module: str, function: str, result: str) -> None:
    """In the new process: call the function with the arguments on standard input; rank 0 writes what it returns."""
    value = getattr(importlib.import_module(module), function)(json.load(sys.stdin))
    if os.environ.get("RANK", "0") == "0":
        Path(result).write_text(json.dumps(value), encoding="utf-8")


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


def _places(ranks: int, cpus: int) -> list[dict[str, str]]:
    """The environment of each rank of a job on this machine, which shares the cpus."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(max(1, cpus // ranks)),
        "DS_ACCELERATOR": "cpu",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _first_failure(processes: Sequence["subprocess.Popen[bytes]"]) -> int | None:
    """Wait for all, or for the first that fails: its number; None: none did."""
    while True:
        codes = [process.poll() for process in processes]
        for number, code in enumerate(codes):
            if code:
                return number
        if None not in codes:
            return None
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _reason(output: Path, process: "subprocess.Popen[bytes]") -> str:
    lines = output.read_bytes().decode(errors="replace").strip().splitlines()
    if process.returncode < 0:
        return f"ended by {signal.Signals(-process.returncode).name}; it may need more memory than there is"
    return lines[-1] if lines else f"exit code {process.returncode}"
