"""What the tests of training under Slurm share: a small run, and how to wait for what it does."""

import time
from collections.abc import Callable
from pathlib import Path

from megagpt.training.metrics import read_metrics
from tests.slurm.cluster import Cluster, Job
from tests.slurm.conftest import ROOT, SCRIPTS

MODEL = {
    "model.vocab_size": 257,
    "model.num_layers": 2,
    "model.hidden_size": 32,
    "model.num_attention_heads": 2,
    "model.max_seq_len": 32,
    "train.precision": "fp32",
    "train.device": "cpu",
    "train.compile": "false",
    "train.global_batch_size": 12,
    "schedule.warmup_steps": 5,
    "schedule.decay_steps": 1000,
    "checkpoint.every": 10,
    "evaluation.every": 100000,
    "logging.every": 1,
}
CPUS = ("--gpus-per-node=0", "--cpus-per-task=1")


class Run:
    """A run of train_small.sh, with a model of a few thousand parameters, and the jobs that work on it."""

    def __init__(self, cluster: Cluster, dataset: Path, run_dir: Path) -> None:
        self.cluster, self.run_dir = cluster, run_dir
        self.settings = MODEL | {
            "data.train.0.path": dataset / "train",
            "data.validation.0.path": dataset / "validation",
            "train.run_dir": run_dir,
        }

    def submit(self, *options: str, script: str = "train_small.sh", cwd: Path = ROOT, **settings: object) -> int:
        """Submit it; options: sbatch's; settings: more overrides, `train__steps=5`."""
        changed = self.settings | {name.replace("__", "."): value for name, value in settings.items()}
        overrides = [f"{name}={value}" for name, value in changed.items()]
        return self.cluster.sbatch(
            SCRIPTS / script,
            *overrides,
            options=[*CPUS, f"--output={self.run_dir.parent}/{self.run_dir.name}-%j.out", *options],
            cwd=cwd,
        )

    @property
    def steps(self) -> list[int]:
        """The steps whose loss is in the metrics, in the file's order."""
        return [record["step"] for record in self.records("train")]

    def records(self, kind: str) -> list[dict[str, object]]:
        """The records of a kind so far."""
        path = self.run_dir / "metrics.jsonl"
        return [record for record in (read_metrics(path) if path.exists() else ()) if record["kind"] == kind]

    def train_on(self, job: int, steps: int, timeout: float = 90) -> int:
        """Wait until the run is `steps` further than now; the step it has come to."""
        goal = max(self.steps, default=0) + steps
        self.until(job, lambda: max(self.steps, default=0) >= goal, f"step {goal}", timeout)
        return max(self.steps)

    def until(self, job: int, is_true: Callable[[], bool], what: str, timeout: float = 90) -> None:
        """Wait for something; raises AssertionError with what the cluster says if it does not come."""
        deadline = time.monotonic() + timeout
        while not is_true():
            assert time.monotonic() < deadline, f"{what} not reached: {self.job(job)}{self.cluster.report(job)}"
            time.sleep(0.2)

    def restarted(self, job: int, restarts: int) -> Job:
        """Wait until Slurm has started a job anew for the n-th time."""
        self.until(job, lambda: self.job(job).restarts >= restarts and self.job(job).state == "RUNNING", "a restart")
        return self.job(job)

    def job(self, job: int) -> Job:
        """What Slurm says of it."""
        return self.cluster.job(job)
