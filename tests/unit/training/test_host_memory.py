"""What a CPU's training step frees stays the process's, unless the user has said otherwise."""

import ctypes
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")

FAULTS = """
import ctypes, resource, torch
from megagpt.training.host_memory import keep_freed_memory

PR_SET_THP_DISABLE = 41  # a page is 4 kB
ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
keep_freed_memory()
def take():
    torch.empty(100 << 20, dtype=torch.uint8).fill_(1)
for _ in range(10):  # of the same size the allocator leaves a few apart
    take()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    take()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(environment: dict[str, str]) -> int:
    """Page faults of five times 100 MiB in a new process, after ten that do not count."""
    command = [sys.executable, "-c", FAULTS]
    return int(subprocess.run(command, env={**os.environ, **environment}, capture_output=True, check=True).stdout)


def test_memory_is_taken_from_the_system_once():
    assert faults({}) < 1000


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MALLOC_MMAP_THRESHOLD_", "1000000"),
        ("MALLOC_TRIM_THRESHOLD_", "1000000"),
        ("GLIBC_TUNABLES", "glibc.malloc.tcache_count=7:glibc.malloc.arena_max=8"),
    ],
)
def test_what_the_user_has_set_stays(name: str, value: str):
    assert faults({name: value}) > 5 * 25_000
