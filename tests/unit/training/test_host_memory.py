"""What a CPU's training step frees stays the process's, unless the user has said otherwise."""

import os
import subprocess
import sys

import pytest

from megagpt.training.host_memory import keep_freed_memory

FAULTS = """
import resource, torch
from megagpt.training.host_memory import keep_freed_memory
print(keep_freed_memory())
def take():
    torch.empty(100 << 20, dtype=torch.uint8).fill_(1)
for _ in range(10):  # of the same size the allocator leaves a few apart
    take()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    take()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def kept_and_faults(**environment: str) -> tuple[bool, int]:
    """In a new process: what keep_freed_memory says, and page faults of five times 100 MiB."""
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


@pytest.mark.skipif(not hasattr(__import__("ctypes").CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_memory_is_taken_from_the_system_once():
    kept, faults = kept_and_faults()
    assert kept
    assert faults < 1000
    kept, faults = kept_and_faults(MALLOC_TRIM_THRESHOLD_="131072")
    assert not kept
    assert faults > 5 * 10_000


@pytest.mark.parametrize("name", ["MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_"])
def test_what_the_user_has_set_stays(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(name, "1000000")
    assert not keep_freed_memory()
    monkeypatch.delenv(name)
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0:glibc.malloc.mmap_max=7")
    assert not keep_freed_memory()
