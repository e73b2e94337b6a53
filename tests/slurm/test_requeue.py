"""What the scripts do with the decisions of launch.job, with programs in its and training's place that take no time."""

from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import ROOT

pytestmark = pytest.mark.slow

# Training is asked to stop in a job's first start and is done in its second.
STAND_INS = """#!/bin/bash
#SBATCH --nodes=1 --cpus-per-task=1 --requeue --open-mode=append
source slurm/common.sh
echo "start ${SLURM_RESTART_COUNT:-0} of $job"
on_all() { return $((SLURM_RESTART_COUNT > 0 ? 0 : 85)); }
"""
BOOKS = """on_one() { case $4 in begin) echo "$LOGS 1" ;; end) [ "$6" = 0 ] && echo done || echo requeue ;; esac; }
"""


def submit(cluster: Cluster, folder: Path, body: str, *options: str) -> int:
    script = folder / "job.sh"
    script.write_text(STAND_INS + body)
    return cluster.sbatch(
        script, options=[f"--output={folder}/%A_%a.out", *options], cwd=ROOT, env={"LOGS": str(folder)}
    )


def test_every_task_of_an_array_is_requeued_by_itself(cluster: Cluster, tmp_path: Path):
    job = submit(cluster, tmp_path, BOOKS + "train a.yaml\n", "--array=1-2%1")

    def finished() -> bool:
        states = cluster.run("squeue", "--noheader", "--array", "--states=all", f"--jobs={job}", "--format=%T").split()
        return states == ["COMPLETED"] * 2

    cluster.until(finished, 60, "the tasks have not come to their end")
    for task in (1, 2):
        starts = [line for line in (tmp_path / f"{job}_{task}.out").read_text().splitlines() if "start" in line]
        assert starts == [f"start 0 of {job}_{task}", f"start 1 of {job}_{task}"]


def test_a_job_is_requeued_by_its_exit_code_if_the_books_say_nothing(cluster: Cluster, tmp_path: Path):
    silent = """on_one() { case $4 in begin) echo "$LOGS 1" ;; end) return 1 ;; esac; }\n"""
    job = submit(cluster, tmp_path, silent + "train a.yaml\n")
    assert cluster.wait(job, "COMPLETED", timeout=60).restarts == 1


def test_a_job_that_is_asked_to_stop_before_it_has_begun_is_requeued(cluster: Cluster, tmp_path: Path):
    early = """on_one() { [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || return 138; [ $4 = end ] || echo "$LOGS 1"; }\n"""
    job = submit(cluster, tmp_path, early + "train a.yaml\n")
    assert cluster.wait(job, "COMPLETED", timeout=60).restarts == 1


def test_a_cancelled_job_is_not_brought_back_even_by_a_script_that_outlives_the_signal(
    cluster: Cluster, tmp_path: Path
):
    body = "trap '' TERM\necho ready\nwhile [[ $(job_field JobState) = RUNNING* ]]; do :; done\nrequeue requeue\n"
    job = submit(cluster, tmp_path, body)
    cluster.until(lambda: "ready" in cluster.output(job), 30, "the job has not started")
    cluster.scancel(job)
    cluster.until(lambda: "was not requeued" in cluster.output(job), 30, "the script has not asked")
    assert cluster.wait(job, "CANCELLED", timeout=30).restarts == 0
