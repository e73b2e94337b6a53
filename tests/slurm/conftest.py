"""The cluster that the tests of a session share."""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, ClusterError, missing

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Four nodes with 2 fake GPUs each; jobs in the partition `urgent` preempt those in `main`, the default one."""
    if reason := missing():
        pytest.skip(reason)
    prefix = f"megagpt-{hashlib.sha256(os.fsencode(ROOT)).hexdigest()[:8]}-"
    for left_behind in Path(tempfile.gettempdir()).glob(prefix + "*"):
        with contextlib.suppress(ClusterError):  # it belongs to a session that still runs
            Cluster(left_behind).down()
    partitions = ["main PriorityTier=1 GraceTime=20", "urgent PriorityTier=2 PreemptMode=OFF"]
    with Cluster(Path(tempfile.gettempdir(), f"{prefix}{os.getpid()}"), partitions=partitions) as cluster:
        yield cluster
