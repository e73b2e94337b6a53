"""Training by the shipped scripts lives through all that Slurm does to jobs, and stops at what users must mend."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megagpt.config import load_config
from megagpt.training.checkpoint import complete_checkpoints
from megagpt.training.metrics import read_metrics
from tests.distributed.jobs import train_and_report
from tests.distributed.ranks import Ranks
from tests.slurm.cluster import Cluster, ClusterError
from tests.slurm.conftest import ROOT, SCRIPTS
from tests.slurm.runs import Run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def newest(run: Run) -> int:
    """The step of the newest checkpoint."""
    return int(complete_checkpoints(run.run_dir / "checkpoints")[-1].name.removeprefix("step_"))


@pytest.fixture(scope="module")
def timed(cluster: Cluster, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, int]:
    """A job whose time limit is much shorter than its run; on node1, while the other tests go on elsewhere."""
    run = Run(cluster, dataset, tmp_path_factory.mktemp("timed") / "run")
    # Slurm looks at limits twice a minute, a minute ahead: the signal comes 45 to 75 s after the start.
    limits = ("--nodes=1", "--nodelist=node1", "--time=2", "--signal=USR1@15")
    return run, run.submit(*limits, train__steps=1_000_000, checkpoint__every=1_000_000, logging__every=50)


@pytest.fixture(scope="module")
def lived(timed: object, cluster: Cluster, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run after a signal, a requeue, a pre-emption, a power cut, a cancellation and changed numbers of nodes."""
    tmp = tmp_path_factory.mktemp("lived")
    run = Run(cluster, dataset, tmp / "run")
    job = run.submit("--nodes=1-3", "--exclude=node1", train__steps=1_000_000, cwd=ROOT / "docs")
    run.train_on(job, 15)
    assert len(run.job(job).nodes) == 3

    cluster.scancel("--signal=USR1", job)
    run.restarted(job, 1)
    run.train_on(job, 15)

    cluster.scontrol("requeue", job)
    run.restarted(job, 2)
    run.train_on(job, 15)

    urgent = run.run_dir.parent / "urgent.sh"
    urgent.write_text("#!/bin/bash\nsleep 1\n")
    cluster.sbatch(urgent, options=["--partition=urgent", "--nodes=3", "--exclude=node1", "--exclusive"], cwd=tmp)
    run.restarted(job, 3)
    run.train_on(job, 15)

    cluster.kill_node("node3", silently=True)
    assert run.restarted(job, 4).nodes == ["node2", "node4"]  # fewer than before: --nodes=1-3
    run.train_on(job, 15)
    cluster.start_node("node3")

    cluster.scancel(job)
    assert cluster.wait(job, "CANCELLED").restarts == 4
    saved = newest(run)

    for nodes, steps in ((1, saved + 10), (4, saved + 20)):
        # The timed job has node1 some of the time: this one waits for it then.
        last = run.submit(f"--nodes={nodes}", train__steps=steps)
        assert cluster.wait(last, "COMPLETED", timeout=150).exit_code == 0
        assert newest(run) == steps
    return run


def test_a_run_goes_on_through_signals_requeues_preemption_power_cuts_and_changing_nodes(lived: Run):
    starts = lived.records("start")
    assert [start["world_size"] for start in starts] == [3, 3, 3, 3, 2, 1, 4]
    assert lived.steps == list(range(1, newest(lived) + 1))  # one file, every step once


def test_what_a_disturbed_run_has_learnt_is_what_an_undisturbed_process_learns(lived: Run, tmp_path: Path):
    steps = newest(lived)
    overrides = [f"{name}={value}" for name, value in lived.settings.items()]
    alone = [f"train.run_dir={tmp_path / 'alone'}", f"train.steps={steps}"]
    ranks = Ranks(1)
    try:
        config = load_config(str(ROOT / "configs/small.yaml"), [*overrides, *alone])
        reference = ranks.run(train_and_report, config)[0]
    finally:
        ranks.stop()
    losses = [record["loss"] for record in reference if record["kind"] == "train"]
    assert [record["loss"] for record in lived.records("train")] == pytest.approx(losses, abs=2e-4)


def test_every_job_leaves_its_books_and_logs_by_rank_in_the_run_folder(lived: Run):
    folders = sorted((lived.run_dir / "logs").iterdir(), key=lambda folder: int(folder.name))
    assert len(folders) == 3
    first = [json.loads(line) for line in (folders[0] / "restarts.jsonl").read_text().splitlines()]
    assert [line["restart"] for line in first if line["event"] == "start"] == [0, 1, 2, 3, 4]
    assert next(line["decision"] for line in first if line["event"] == "end") == "requeue"
    assert {path.name for path in folders[0].glob("rank_*.log")} == {"rank_0.log", "rank_1.log", "rank_2.log"}
    assert "step" in (folders[0] / "slurm.out").read_text()
    assert all((folder / "preflight.json").is_file() for folder in folders)


def test_status_tells_the_story_of_the_run(lived: Run, cluster: Cluster):
    text = cluster.run(sys.executable, "-m", "launch.status", lived.run_dir, cwd=ROOT)
    assert "finished" in text
    assert "node failed" in text or "lost" in text


def test_a_time_limit_requeues_the_job_by_itself_and_the_run_goes_on(timed: tuple[Run, int], cluster: Cluster):
    run, job = timed

    def resumed() -> bool:
        return any(start["step"] for start in run.records("start"))

    run.until(job, resumed, "a restart after the time limit that goes on from a checkpoint", timeout=200)
    assert run.job(job).restarts >= 1
    cluster.scancel(job)
    cluster.wait(job, "CANCELLED")
    assert run.steps == sorted(set(run.steps))


def test_a_job_that_gets_nowhere_is_held_with_the_reason(cluster: Cluster, dataset: Path, tmp_path: Path):
    run = Run(cluster, dataset, tmp_path / "run")
    job = run.submit("--nodes=1", "--hold")
    logs = run.run_dir / "logs" / str(job)
    logs.mkdir(parents=True)
    start = {"event": "start", "job": str(job), "time": 0, "step": 0, "nodes": "node1"}
    (logs / "restarts.jsonl").write_text("".join(json.dumps(start | {"restart": n}) + "\n" for n in range(4)))
    cluster.scontrol("release", job)
    run.until(job, lambda: "held" in run.job(job).comment, "being held", timeout=60)
    run.until(job, lambda: run.job(job).state == "PENDING", "being held", timeout=60)
    assert "held" in run.job(job).reason.lower()
    assert "error: 3 restarts without progress" in cluster.output(job)
    cluster.scancel(job)


def first_error(cluster: Cluster, job: int) -> str:
    """The first line of a job's log that speaks of an error."""
    return next((line for line in cluster.output(job).splitlines() if "error" in line.lower()), "no error")


def test_what_a_user_must_mend_ends_the_job_within_seconds_with_the_reason_first(
    cluster: Cluster, dataset: Path, tmp_path: Path
):
    run = Run(cluster, dataset, tmp_path / "run")
    with pytest.raises(ClusterError, match=r"[Ii]nvalid partition"):
        run.submit("--partition=no-such")
    typo = run.submit("--nodes=2", train__stepz=5)
    no_data = run.submit("--nodes=1", data__train__0__path="/no/such/train")
    no_cuda = run.submit("--nodes=2", "--gpus-per-node=2", train__device="auto")
    reasons = {
        typo: (2, r"override train\.stepz=5: .*did you mean train\.steps\?"),
        no_data: (1, r"/no/such/train\.(bin|idx): no such file"),
        no_cuda: (2, r"sees no GPU .*but Slurm gave this job 2"),
    }
    for job, (code, reason) in reasons.items():
        assert cluster.wait(job, "FAILED", timeout=90).exit_code == code, cluster.report(job)
        assert re.match(rf"error: .*{reason}", first_error(cluster, job)), cluster.output(job)
        assert "Traceback" not in cluster.output(job)
        assert cluster.job(job).restarts == 0


@pytest.mark.parametrize("script", sorted(path.name for path in SCRIPTS.glob("*.sh")))
def test_scripts_are_short_and_shell_checked(script: str):
    text = (SCRIPTS / script).read_text()
    assert len(text.splitlines()) <= (140 if script == "common.sh" else 60)
    assert subprocess.run(["bash", "-n", str(SCRIPTS / script)], check=False).returncode == 0


def test_the_metrics_of_a_run_are_read_back_whole(lived: Run):
    tokens = [record["tokens"] for record in read_metrics(lived.run_dir / "metrics.jsonl") if record["kind"] == "train"]
    assert tokens == [12 * 32 * step for step in lived.steps]
