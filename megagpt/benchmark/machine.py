"""What stands at the head of every result: which benchmark, by which command, when, of which code, on which machine.

It names no host and no path of it, so that a result can be shown to anyone. Two measured rates tell what the machine
could do in that hour, whatever else it did: a product of bf16 matrices, and reading memory. They take a few seconds.
"""

import datetime
import functools
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from megagpt.benchmark.turns import read_bandwidth, take_turns

PROGRAM = "python -m tools.benchmark"
HEAD = ("benchmark", "command", "date", "revision", "machine")
"""The keys of the head; those of a result are others."""
PACKAGES = ("torch", "deepspeed", "transformers", "tiktoken", "gigatoken", "datasketch", "numpy")
MATRIX_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16", "i8mm", "sve")
"""Of a processor, that say how it multiplies matrices; the last three are ARM's."""
_CODE = ("megagpt", "launch", "tools", "configs")
_SIDE, _PRODUCTS = 2048, 8
_FILES_WRITTEN = ("--output", "--plot")


def head(benchmark: str, words: Sequence[str]) -> dict[str, Any]:
    """The head of a result. words: those after `python -m tools.benchmark`. JSON types.

    revision: {commit, changed} if the code is a checkout of git, else None; changed: whether a file of the code differs
    from the commit.
    """
    values = (benchmark, command_of(words), _now(), revision(), describe_machine())
    return dict(zip(HEAD, values, strict=True))


def command_of(words: Sequence[str]) -> str:
    """The command as anyone may type it: without the files that it writes, with PATH for folders of this machine."""
    return shlex.join([*PROGRAM.split(), *_portable(words)])


def describe_machine() -> dict[str, Any]:
    """Processor, memory, GPUs, versions, and what it reaches now; JSON types. Rates are of the GPU too if there is one.

    memory in GiB, bf16_gflops: GFLOP/s of a product of two square matrices, read_gb_per_second: 10^9 bytes/s.
    """
    devices = [torch.device("cpu"), *[torch.device("cuda")] * torch.cuda.is_available()]
    return {
        "processor": _processor(),
        "matrix_flags": _matrix_flags(),
        "cpus": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "gpus": _gpus(),
        "driver": _driver(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "versions": {"python": platform.python_version(), **_versions()},
        "rates": {
            device.type: {
                "bf16_gflops": round(_product_rate(device) / 1e9, 1),
                "read_gb_per_second": round(read_bandwidth(device) / 1e9, 1),
            }
            for device in devices
        },
    }


def portable(text: str) -> str:
    """Text without the folders of absolute paths in it: PATH stands for them."""
    return re.sub(r"(?<![\w./:])(?:/[\w.+-]+)*/([\w.+-]+)", r"PATH/\1", text)


def _portable(words: Sequence[str]) -> Iterator[str]:
    rest = iter(words)
    for word in rest:
        option, equals, _ = word.partition("=") if word.startswith("--") else ("", "", "")
        if option in _FILES_WRITTEN:
            if not equals:
                next(rest, None)
        elif option == "--nanogpt":
            if not equals:
                next(rest, None)
            yield from (option, "PATH/model.py")
        else:
            yield portable(word)


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


@functools.cache
def revision() -> dict[str, Any] | None:
    """That of the checkout when it is first asked for, which is before anything is measured; None: there is none."""
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():
        return None
    commit = _said_by("git", "-C", str(checkout), "rev-parse", "--short", "HEAD")
    changes = _said_by("git", "-C", str(checkout), "status", "--porcelain", "--", *_CODE)
    return None if commit is None or changes is None else {"commit": commit, "changed": bool(changes)}


def _said_by(*command: str) -> str | None:
    """Standard output of a program; None: it is not there, or it failed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if done.returncode else done.stdout.strip()


def _processor() -> str:
    return next(_cpuinfo("model name"), platform.machine())


def _matrix_flags() -> list[str]:
    found = set(next(_cpuinfo("flags", "Features"), "").split())
    return [flag for flag in MATRIX_FLAGS if flag in found]


def _cpuinfo(*keys: str) -> Iterator[str]:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in keys:
            yield value.strip()


def _gpus() -> list[dict[str, Any]]:
    devices = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return [{"name": device.name, "memory_gib": round(device.total_memory / 2**30)} for device in devices]


def _driver() -> str | None:
    """Of NVIDIA's GPUs."""
    if not torch.cuda.is_available():
        return None
    said = _said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return said.splitlines()[0] if said else None


def _versions() -> dict[str, str]:
    """Of the packages that are installed."""
    installed = {distribution.name.lower() for distribution in importlib.metadata.distributions()}
    return {name: importlib.metadata.version(name) for name in PACKAGES if name in installed}


def _product_rate(device: torch.device) -> float:
    """FLOP/s of the fastest of some products."""
    left, right = (torch.full((_SIDE, _SIDE), 0.5, dtype=torch.bfloat16, device=device) for _ in range(2))

    def multiply() -> None:
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return 2 * _SIDE**3 / min(take_turns({"product": multiply}, _PRODUCTS)["product"][1:])
