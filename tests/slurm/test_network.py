"""Ranks find each other on networks as they are: without names, over IPv6, past wrong interfaces and taken ports."""

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.environment import expand_hosts
from tests.distributed.jobs import write_dataset
from tests.slurm.cluster import Cluster, missing
from tests.slurm.conftest import ROOT
from tests.slurm.runs import Run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PYTHON = sys.executable


@pytest.fixture(scope="module")
def poor_cluster() -> Iterator[Cluster]:
    """Two nodes whose names resolve nowhere, and whose first interface leads nowhere; the second has IPv4 and IPv6."""
    if reason := missing():
        pytest.skip(reason)
    folder = Path(tempfile.gettempdir()) / f"mgnet-{os.getpid()}"
    with Cluster(folder, nodes=2, names=False, decoy=True, ipv6=True, gpus=0) as cluster:
        yield cluster


def five_steps(cluster: Cluster, folder: Path) -> Run:
    """A run of five steps on a dataset without tokenizer."""
    for split in ("train", "validation"):
        write_dataset(folder / split, 5000, seed=0)
    run = Run(cluster, folder, folder / "run")
    run.settings |= {"train.steps": 5, "schedule.warmup_steps": 1}
    return run


@pytest.fixture
def run(cluster: Cluster, tmp_path: Path) -> Run:
    """On the cluster of all tests."""
    return five_steps(cluster, tmp_path)


@pytest.fixture
def poor_run(poor_cluster: Cluster, tmp_path: Path) -> Run:
    """On the poor one."""
    return five_steps(poor_cluster, tmp_path)


def finished(run: Run, body: str, nodes: int = 2) -> str:
    """The output of a job on two nodes that runs `body`, a script for bash in which TRAIN is the training command."""
    overrides = " ".join(f"{name}={value}" for name, value in run.settings.items())
    script = run.run_dir.parent / "job.sh"
    train = f'TRAIN="{PYTHON} -m launch.train configs/small.yaml {overrides}"'
    script.write_text(f"#!/bin/bash\n{train}\n{body}\n")
    options = [f"--nodes={nodes}", "--ntasks-per-node=1", f"--output={run.run_dir}.out"]
    job = run.cluster.sbatch(script, options=options, cwd=ROOT)
    run.cluster.wait(job, "COMPLETED", timeout=120)
    assert run.steps == [1, 2, 3, 4, 5]
    return run.cluster.output(job)


def test_ranks_meet_by_the_address_that_slurm_uses_where_names_do_not_resolve_and_a_port_is_taken(poor_run: Run):
    taken = "import os,socket,time; from launch.environment import ports_of_step as p; "
    taken += 's=socket.create_server(("", p(int(os.environ["SLURM_JOB_ID"]), 0)[0])); time.sleep(60)'
    output = finished(
        poor_run,
        f"! getent hosts node1 || exit 3\n{PYTHON} -c '{taken}' &\nsleep 2; srun $TRAIN; code=$?; kill %1; exit $code",
    )
    assert "ranks    2, started by Slurm; rank 0 is at node1" in output


def test_ranks_meet_over_ipv6(poor_run: Run):
    address = next(
        entry
        for entry in poor_run.cluster.run("ip", "-n", f"{poor_run.cluster.hosts.tag}-node1", "-o", "addr").split()
        if "fd00:" in entry
    ).partition("/")[0]
    output = finished(poor_run, f"MASTER_ADDR={address} srun $TRAIN")
    assert f"rank 0 is at {address}" in output


def test_one_torchrun_a_node_makes_one_world_of_all_nodes(run: Run):
    torchrun = "-m torch.distributed.run --nnodes=2 --nproc-per-node=2 --rdzv-backend=c10d"
    finished(run, f"srun {PYTHON} {torchrun} --rdzv-endpoint=node1:29411 --rdzv-id=1 ${{TRAIN#{PYTHON}}}")
    assert run.records("start")[0]["world_size"] == 4


def test_torchruns_that_do_not_know_of_each_other_stop_with_one_line(run: Run):
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node=1"
    script = run.run_dir.parent / "job.sh"
    script.write_text(f"#!/bin/bash\nsrun {PYTHON} {torchrun} -m launch.train configs/small.yaml\n")
    job = run.cluster.sbatch(script, options=["--nodes=2", f"--output={run.run_dir}.out"], cwd=ROOT)
    run.cluster.wait(job, "FAILED", timeout=90)
    assert "error: Slurm started 2 tasks, but WORLD_SIZE=1 (torchrun was told of 1 node)" in run.cluster.output(job)


def test_host_lists_expand_as_slurm_expands_them(poor_cluster: Cluster):
    for text in ("node[1-3,7]", "a[01-03],b", "r[1-2]n[09-11]", "x-3.c"):
        assert expand_hosts(text) == poor_cluster.run("scontrol", "show", "hostnames", text).split()
