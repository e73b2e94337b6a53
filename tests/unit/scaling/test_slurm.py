"""Jobs of a study, with programs in Slurm's place that write down how they were called."""

import json
import os
from pathlib import Path

import pytest

from megagpt.errors import UsageError
from megagpt.scaling.experiments import StudyFolder
from megagpt.scaling.slurm import Slurm
from megagpt.scaling.study import load_study
from tests.unit.scaling.fake_studies import create, finish, write_study
from tests.unit.training.fake_runs import write_records
from tools.scaling import _environment

# Job ids count the calls; a job named in `refused` is not accepted; `states` and `codes` are files of the test.
SBATCH = """#!/bin/sh
echo "$(env | grep -c '^SLURM_')|$*" >> calls
case "$*" in *"$(cat refused)"*) echo "sbatch: error: Batch job submission failed: no such partition" >&2; exit 1;; esac
wc -l < calls
"""
SQUEUE = """#!/bin/sh
cat states
"""
SCONTROL = """#!/bin/sh
grep "^JobId=$4 " codes
"""


class Cluster:
    """The stand-ins and their files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE), ("scontrol", SCONTROL)):
            (folder / name).write_text(text, encoding="utf-8")
            (folder / name).chmod(0o755)
        for name, text in (("refused", "nothing"), ("states", ""), ("codes", ""), ("calls", "")):
            (folder / name).write_text(text, encoding="utf-8")
        (folder / "slurm").mkdir()
        for script in ("train.sh", "scaling.sh"):
            (folder / "slurm" / script).touch()

    def slurm(self, *options: str) -> Slurm:
        return Slurm({"PATH": f"{self.folder}:{os.environ['PATH']}"}, options)

    def calls(self) -> list[list[str]]:
        """Arguments of every sbatch."""
        return [line.partition("|")[2].split() for line in (self.folder / "calls").read_text().splitlines()]

    def say(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text, encoding="utf-8")


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Cluster(tmp_path)


def submitted(cluster, *options, **keys):
    folder = create(cluster.folder / "out", "strong", load_study(write_study(cluster.folder, **keys)))
    cluster.slurm(*options).submit_all(folder, lambda line: None)
    return folder


def test_each_run_is_a_job_and_the_last_one_reports(cluster):
    folder = submitted(cluster, "--time=10", ranks=[8, 16], ranks_per_node=8, cores_per_rank=3)
    *runs, report = cluster.calls()
    for call, entry, nodes in zip(runs, folder.entries, (1, 2), strict=True):
        assert {f"--nodes={nodes}", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=3"} < set(call)
        run_dir = entry.path / "attempt_1"
        assert f"--output={run_dir}/output.log" in call
        assert run_dir.is_dir()
        script = call.index("slurm/train.sh")
        assert call[script - 1] == "--time=10", "the user's options come last"
        assert call[script + 1 :] == [str(entry.path / "config.yaml"), f"train.run_dir={run_dir}"]
    assert "--dependency=afterany:1:2" in report
    assert report[-3:] == ["slurm/scaling.sh", "report", str(cluster.folder / "out")]
    assert [entry.last.job_id for entry in StudyFolder.open(cluster.folder / "out").entries] == ["1", "2"]


def test_a_run_on_cpus_asks_for_no_gpu(cluster):
    submitted(cluster, ranks=[2], overrides={"train.device": "cpu"})
    assert "--gpus-per-node=0" in cluster.calls()[0]


def test_a_job_that_is_not_accepted_does_not_stop_the_others(cluster):
    cluster.say("refused", "scaling-4ranks")
    folder = submitted(cluster)
    assert [entry.state for entry in folder.entries] == ["running", "running", "failed", "running"]
    assert "no such partition" in folder.entries[2].last.error
    assert "--dependency=afterany:1:2:4" in cluster.calls()[-1]


def test_a_study_goes_on_with_jobs_that_ended_badly_only(cluster):
    folder = submitted(cluster)
    states = ["1 COMPLETED", "2 RUNNING", "3 FAILED", "4 CANCELLED"]
    cluster.say("states", "\n".join(states))
    cluster.say("codes", "JobId=1 x ExitCode=0:0\nJobId=3 x ExitCode=86:0 y\nJobId=4 x ExitCode=0:15\n")
    one, two, three, four = folder.entries
    write_records(one.run_dir(one.last), [{"kind": "stop", "step": 30, "reason": "finished"}])
    three.log(three.last).write_text("error: a hang\n", encoding="utf-8")
    cluster.slurm().settle(folder)
    assert [entry.state for entry in folder.entries] == ["finished", "running", "failed", "failed"]
    assert (three.last.exit_code, three.last.error) == (86, "a hang")
    assert (four.last.exit_code, four.last.error) == (-15, "killed by SIGTERM")

    before = len(cluster.calls())
    cluster.slurm().submit_all(folder, lambda line: None)
    *runs, report = cluster.calls()[before:]
    assert [call[-1].rpartition("=")[2] for call in runs] == [
        str(entry.path / "attempt_2") for entry in (three, four)
    ]  # fmt: skip
    assert two.last.job_id == "2"
    assert f"--dependency=afterany:2:{before + 1}:{before + 2}" in report


def test_where_slurm_cannot_be_asked_only_finished_runs_are_settled(cluster):
    folder = submitted(cluster)
    (cluster.folder / "squeue").unlink()
    one = folder.entries[0]
    write_records(one.run_dir(one.last), [{"kind": "stop", "step": 30, "reason": "finished"}])
    Slurm({"PATH": str(cluster.folder)}).settle(folder)
    assert [entry.state for entry in folder.entries] == ["finished", "running", "running", "running"]


def test_a_job_that_slurm_has_forgotten_has_failed(cluster):
    folder = submitted(cluster, ranks=[1])
    cluster.slurm().settle(folder)
    assert folder.entries[0].last.error == "the job is gone, and Slurm remembers nothing"


@pytest.mark.parametrize("missing", ["slurm/train.sh", "slurm/scaling.sh", "sbatch"])
def test_the_place_to_submit_from_is_checked_first(cluster, missing):
    (cluster.folder / missing).unlink()
    with pytest.raises(UsageError, match=f"no {missing} here"):
        Slurm({"PATH": str(cluster.folder)}).check()


def test_finished_runs_are_not_submitted(cluster):
    folder = create(cluster.folder / "out", "strong", load_study(write_study(cluster.folder, ranks=[1, 2])))
    finish(folder.entries[0], [1.0] * 30)
    cluster.slurm().submit_all(folder, lambda line: None)
    runs = [call for call in cluster.calls() if "slurm/train.sh" in call]
    assert len(runs) == 1
    assert json.loads((folder.entries[0].path / "entry.json").read_text())["attempts"][0]["job_id"] is None


def test_jobs_of_a_study_get_the_sites_account_but_nothing_of_the_job_that_submits_them(monkeypatch):
    monkeypatch.setattr(os, "environ", {"SBATCH_ACCOUNT": "mine", "OMP_NUM_THREADS": "4", "SLURM_CONF": "/c"})
    on_login_node = _environment()
    assert on_login_node == os.environ
    os.environ.update({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SRUN_CPUS_PER_TASK": "1", "OMP_NUM_THREADS": "1"})
    assert _environment() == {"SBATCH_ACCOUNT": "mine", "SLURM_CONF": "/c"}
