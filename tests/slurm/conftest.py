"""The cluster that the tests of a session share, and a corpus that it has preprocessed."""

import contextlib
import hashlib
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, ClusterError, missing
from tests.unit.corpus.texts import document, edited, write_jsonl

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "slurm"


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
    with Cluster(Path(tempfile.gettempdir(), f"{prefix}{os.getpid()}"), cpus=8, partitions=partitions) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus of 300 documents and 60 near-duplicates of them."""
    folder = tmp_path_factory.mktemp("texts")
    rng = random.Random(5)
    documents = [document(rng, 200) for _ in range(300)]
    write_jsonl(folder / "a.jsonl", [*documents, *(edited(text, rng, 1) for text in documents[:60])])
    (folder / "config.yaml").write_text("execution: {chunk_mb: 0.05}\n")
    return folder


@pytest.fixture(scope="session")
def dataset(cluster: Cluster, texts: Path) -> Path:
    """The token dataset that preprocess.sh makes of `texts` on three nodes."""
    output = texts.parent / "dataset"
    arguments = ["--config", texts / "config.yaml", "--input", texts / "*.jsonl", "--output", output]
    options = ["--nodes=3", "--ntasks-per-node=1", f"--output={texts}/job.out"]
    job = cluster.sbatch(SCRIPTS / "preprocess.sh", *arguments, "--tokenizer", "bytes", options=options, cwd=ROOT)
    cluster.wait(job, "COMPLETED", timeout=90)
    return output
