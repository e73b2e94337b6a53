"""A run whose every second is known: what it would write, and when, without training anything."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from megagpt.config import RunConfig, save_config
from megagpt.training.metrics import Record
from tests.unit.inference.runs import CONFIG, write_run
from tests.unit.training.fake_runs import write_records

BEGIN = 1_760_000_000.0
STEPS, EVERY, EVALUATE_EVERY = 1000, 10, 100
EVALUATION_SECONDS = 30.0
TOKENS_A_STEP = 48


@dataclass
class SimulatedRun:
    """1,000 steps, a record every 10, an evaluation every 100; `now` and `step` are where it has come to."""

    folder: Path
    step_seconds: float = 2.0
    now: float = BEGIN
    step: int = 0
    records: list[Record] = field(default_factory=list)

    def start(self, ranks: int = 2, job: str | None = None, restart: int = 0, nodes: str = "node1") -> None:
        """Begin an attempt, of a Slurm job or by hand; what lies behind the step that it begins from is dropped."""
        if job:
            self.write_job(job, event="start", restart=restart, step=self.step, nodes=nodes)
        self.records = [record for record in self.records if record["step"] <= self.step]
        self.wait(20)
        self._add("start", world_size=ranks, continues_from=None)

    def train(self, to: int) -> None:
        """Steps, with their evaluations, which count into the record of the steps before them."""
        while self.step < to:
            self.step += EVERY
            pause = EVALUATION_SECONDS if self.step % EVALUATE_EVERY == 0 else 0.0
            self.now += self.step_seconds * EVERY + pause
            rate = TOKENS_A_STEP / self.step_seconds
            steps = {"step_seconds": self.step_seconds, "evaluation_seconds": pause / EVERY, "checkpoint_seconds": 0.0}
            parts = dict.fromkeys(("data_seconds", "forward_backward_seconds", "optimizer_seconds"), 0.0)
            tokens = {"tokens": self.step * TOKENS_A_STEP, "tokens_per_second": rate}
            self._add("train", **steps, **parts, **tokens, loss=5.0 - self.step / 1000, mfu=None, goodput=0.5)
            if pause:
                self._add("validation", dataset="wiki", loss=5.5 - self.step / 1000, seconds=pause)

    def stop(self, reason: str) -> None:
        """End the attempt as the process itself writes it."""
        self._add("stop", reason=reason)

    def end_job(self, job: str, code: int, decision: str, reason: str, restart: int = 0) -> None:
        """End the attempt as the job's script writes it."""
        self.write_job(job, event="end", restart=restart, code=code, decision=decision, reason=reason)

    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds

    def write_job(self, job: str, **values: object) -> None:
        """Append a line to the job's restarts.jsonl."""
        file = self.folder / "logs" / job / "restarts.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as lines:
            lines.write(json.dumps({"job": job, "time": self.now, **values}) + "\n")

    def write(self, *checkpoints: int) -> Path:
        """Write the folder, with checkpoints at these steps, and return it."""
        if not (self.folder / "config.yaml").exists():
            beside = self.folder.with_name(f"{self.folder.name}_checkpoints")
            write_run(beside, *checkpoints)
            self.folder.mkdir(parents=True, exist_ok=True)
            if checkpoints:
                (beside / "checkpoints").rename(self.folder / "checkpoints")
            data = {"train": [{"path": "data"}], "validation": [{"path": "data"}]}
            train = {"steps": STEPS, "global_batch_size": 1}
            save_config(RunConfig(model=CONFIG, data=data, train=train), self.folder / "config.yaml")
        return write_records(self.folder, self.records)

    def _add(self, kind: str, **values: object) -> None:
        self.records.append({"kind": kind, "step": self.step, "time": self.now, **values})
