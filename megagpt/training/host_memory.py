"""glibc's allocator, told to keep what a training step on a CPU frees for the next one."""

import ctypes
import os

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_KEPT_UP_TO = 256 << 20  # a few times what is freed stays beside what is used, so the largest blocks go back
_ALWAYS_ACCEPTED = 32 << 20  # by a glibc before 2.35, on 64-bit machines
_PAD = 64 << 20
_USERS_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")


def keep_freed_memory() -> None:
    """Let blocks of up to 256 MiB that this process frees serve it again, without going to the system and back.

    By default glibc maps each larger block anew: the system clears its pages, one fault each, and to take an activation
    of 50 MB costs a fifth of the matrix product that fills it. What has been freed stays this process's from now on.
    Nothing is changed under another C library, or where the user's environment sets these thresholds.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    tuned = "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "") or any(map(os.environ.get, _USERS_SETTINGS))
    if mallopt is None or tuned:
        return
    if not mallopt(_M_MMAP_THRESHOLD, _KEPT_UP_TO):
        mallopt(_M_MMAP_THRESHOLD, _ALWAYS_ACCEPTED)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_TOP_PAD, _PAD)
