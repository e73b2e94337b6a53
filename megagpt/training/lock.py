"""Who holds a run folder, asked without taking its lock: the answer of `fcntl(F_GETLK)`.

A lock that is seen proves that a run is alive, on whichever node. One that is not seen proves the contrary only on the
node where the run was, since some file systems keep locks to a node.
"""

import fcntl
import os
import socket
import struct
import sys
from pathlib import Path
from typing import NamedTuple

_FLOCK = "hhqqi0q"
"""struct flock of 64-bit Linux: type, whence, start, length, process."""


class Lock(NamedTuple):
    """What is known of a run folder's lock."""

    is_held: bool
    is_near: bool
    """Whether the last holder was a process of this node."""
    since: float
    """When the last holder took it, seconds since 1970."""


def read_lock(run_dir: Path) -> Lock | None:
    """The lock of a run folder; None where there is none, or no way to ask."""
    if sys.platform != "linux" or sys.maxsize < 2**32:
        return None
    try:
        with (run_dir / ".lock").open("rb") as file:
            question = struct.pack(_FLOCK, fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
            kind, *_ = struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, question))
            holder = file.read().decode(errors="replace")
            since = os.fstat(file.fileno()).st_mtime
    except OSError:
        return None
    return Lock(kind != fcntl.F_UNLCK, holder.strip().endswith(f" on {socket.gethostname()}"), since)
