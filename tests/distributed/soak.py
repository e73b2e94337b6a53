"""python -m tests.distributed.soak: trains while processes are killed, signalled, stopped and joined by others.

Every attempt has a random number of ranks (1 to 4) and ZeRO stage (0 to 3) and ends by a random disturbance, until the
run is done. Then its losses must be those of an undisturbed run on two ranks, and every sample of the dataset must have
been trained on exactly once: each rank writes down hashes of the rows that its engine was given, and what the last
attempt at each step was given must be the dataset's samples, all of them, once. Writes a log and a plot.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import xxhash

from megagpt.config import save_config
from megagpt.config.schema import RunConfig
from megagpt.data.loader import TrainingData
from megagpt.training.checkpoint import newest_checkpoint
from megagpt.training.supervision import HANG, LOST, REQUEUE
from tests.distributed.jobs import tiny_config, write_dataset
from tests.distributed.launched import Job, manifest, records, start

BATCH, SEQ_LEN = 12, 32  # divisible by one to four ranks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=32_000, help="length of the run")
    parser.add_argument(
        "--minutes", type=float, default=30, help="how long it is disturbed; then it may come to its end"
    )
    parser.add_argument("--between", type=float, default=60, help="seconds of training between two disturbances")
    parser.add_argument("--output", type=Path, default=Path("build/soak"), help="folder for runs, log and plot")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    shutil.rmtree(options.output, ignore_errors=True)
    options.output.mkdir(parents=True)
    return Soak(options.output, options.steps, options.minutes, options.between, options.seed).run()


class Soak:
    """One disturbed run, its undisturbed reference, and the comparison of both."""

    def __init__(self, folder: Path, steps: int, minutes: float, between: float, seed: int) -> None:
        self.folder, self.steps, self.minutes, self.between = folder, steps, minutes, between
        self.random = random.Random(seed)
        # One epoch of training samples is the whole run: see TokenSamples.
        write_dataset(folder / "train", steps * BATCH * SEQ_LEN + SEQ_LEN, seed=seed)
        write_dataset(folder / "validation", 3_001, seed=seed + 1)
        self.config = _config(folder, steps)
        save_config(self.config, folder / "config.yaml")
        self.log_file = (folder / "log.txt").open("w", encoding="utf-8")
        self.begun = time.monotonic()

    def run(self) -> int:
        self.log(f"{self.steps:,} steps of {BATCH} x {SEQ_LEN} tokens; undisturbed run on 2 ranks first")
        job = self.attempt(self.folder / "undisturbed", 0, 2, "parallel.zero_stage=1")
        codes = job.wait(7200)
        assert codes == [0, 0], job.output()
        self.begun = time.monotonic()
        self.log("undisturbed run done; disturbed run begins")
        attempts = self.disturb()
        return self.judge(attempts)

    def disturb(self) -> int:
        """Attempt after attempt until the run is done; their number."""
        run_dir, number = self.folder / "disturbed", 0
        while True:
            number += 1
            quiet = time.monotonic() - self.begun > 60 * self.minutes
            ranks, stage = self.random.choice((1, 2, 3, 4)), self.random.choice((0, 1, 2, 3))
            if quiet:
                ranks, stage = 2, 1
            before = _step(run_dir)
            job = self.attempt(run_dir, number, ranks, f"parallel.zero_stage={stage}")
            until = time.monotonic() + self.random.uniform(0.5, 1.5) * self.between
            while (quiet or time.monotonic() < until) and job.running:
                time.sleep(0.05)
            what = "nothing: the run ended" if not job.running else self.disturbance(job)
            codes = job.wait(90)
            resumed = newest_checkpoint(run_dir / "checkpoints")
            kept = manifest(resumed)["step"] if resumed else 0
            self.log(
                f"attempt {number}: {ranks} ranks, ZeRO {stage}, from step {before}: {what}; exit codes {codes}; "
                f"newest checkpoint {kept}"
            )
            allowed = {0, LOST, REQUEUE, HANG, -signal.SIGKILL}
            if not set(codes) <= allowed:
                self.log(job.output())
                raise SystemExit(f"unexpected exit codes {codes}")
            if codes == [0] * ranks:
                return number

    def disturbance(self, job: Job) -> str:
        """Do something bad to a running job; what it was."""
        victim = self.random.randrange(job.world_size)
        what = self.random.choice(("SIGTERM", "SIGUSR1", "SIGKILL", "SIGKILL all", "hang"))
        if what == "SIGKILL all":
            job.send(signal.SIGKILL)
        elif what == "hang":
            job.send(signal.SIGSTOP, [victim])
            deadline = time.monotonic() + 40
            if job.world_size == 1:  # nobody else is there to notice: it notices itself when it goes on
                time.sleep(self.config.faults.step_timeout + 5)
            while (
                any(p.exitcode is None for r, p in enumerate(job.ranks) if r != victim) and time.monotonic() < deadline
            ):
                time.sleep(0.1)
            job.send(signal.SIGCONT, [victim])
        else:
            job.send(signal.Signals[what], [victim])
        return f"{what} of rank {victim}" if what != "SIGKILL all" else what

    def attempt(self, run_dir: Path, number: int, ranks: int, *settings: str) -> Job:
        seen = self.folder / f"seen_{run_dir.name}" / f"attempt_{number:04d}"
        prepare = partial(write_down_what_is_trained_on, seen)
        return start(self.folder / "config.yaml", run_dir, *settings, world_size=ranks, prepare=prepare)

    def judge(self, attempts: int) -> int:
        """Compare; the exit code."""
        losses = {name: _losses(self.folder / name) for name in ("undisturbed", "disturbed")}
        complete = all(sorted(found) == list(range(1, self.steps + 1)) for found in losses.values())
        difference = max(abs(losses["undisturbed"][step] - losses["disturbed"][step]) for step in losses["undisturbed"])
        final = {name: records(self.folder / name, "validation")[-1]["loss"] for name in losses}
        seen_once = self.every_sample_once()
        wrong = sum(record["event"] == "spike" for record in records(self.folder / "disturbed", "event"))
        good = complete and difference < 1e-3 and seen_once
        minutes = (time.monotonic() - self.begun) / 60
        self.log(f"{attempts} attempts in {minutes:.1f} minutes; every step logged once: {complete}; spikes: {wrong}")
        self.log(f"largest difference of a step's loss: {difference:.2e}; final validation losses: {final}")
        self.log(f"every sample of the dataset trained on exactly once: {seen_once}")
        goodput = records(self.folder / "disturbed", "train")[-1]["goodput"]
        self.log(f"goodput {goodput:.1%}; {'passed' if good else 'FAILED'}")
        self.plot(losses)
        return 0 if good else 1

    def every_sample_once(self) -> bool:
        """Whether what the last attempt at each step was given are the samples of one epoch."""
        given: dict[int, tuple[int, list[str]]] = {}
        for file in sorted((self.folder / "seen_disturbed").glob("attempt_*")):
            attempt = int(file.name.split("_")[1].split(".")[0])
            for line in file.read_text().splitlines():
                step, rows = json.loads(line)
                newest, known = given.get(step, (attempt, []))
                given[step] = (attempt, known + rows) if attempt == newest else (attempt, list(rows))
        found = Counter(row for _, rows in given.values() for row in rows)
        data = TrainingData(self.config.data.train, SEQ_LEN, self.config.train.seed, document_mask=False)
        expected: Counter[str] = Counter()
        for first in range(0, self.steps * BATCH, 10_000):
            expected.update(_hashes(data.read(first, min(10_000, self.steps * BATCH - first)).input_ids.numpy()))
        return found == expected

    def plot(self, losses: dict[str, dict[int, float]]) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 5.5), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
        for (name, found), style in zip(losses.items(), ("-", "--"), strict=True):
            upper.plot(list(found), list(found.values()), style, linewidth=0.8, label=name)
        for record in records(self.folder / "disturbed", "start")[1:]:
            upper.axvline(record["step"], color="0.8", linewidth=0.5, zorder=0)
        upper.set(
            ylabel="training loss, nats a token", title="A run under kills, signals, hangs and world-size changes"
        )
        upper.legend(frameon=False)
        steps = np.array(sorted(losses["undisturbed"]))
        difference = np.array([abs(losses["undisturbed"][s] - losses["disturbed"][s]) for s in steps.tolist()])
        lower.semilogy(steps, np.maximum(difference, 1e-9), linewidth=0.6, color="C3")
        lower.axhline(1e-3, color="0.4", linestyle=":", linewidth=1)
        lower.set(xlabel="optimizer step (grey lines: restarts)", ylabel="difference")
        figure.savefig(self.folder / "soak.png", dpi=110)

    def log(self, text: str) -> None:
        line = f"{time.monotonic() - self.begun:7.1f} s  {text}"
        print(line, flush=True)
        print(line, file=self.log_file, flush=True)


def _config(folder: Path, steps: int) -> RunConfig:
    return tiny_config(
        folder,
        folder / "run",
        train={"steps": steps, "global_batch_size": BATCH},
        optimizer={"lr": 3e-4},
        schedule={"warmup_steps": 200},
        checkpoint={"every": 200},
        evaluation={"every": 2000},
        faults={"step_timeout": 20.0},
    )


def _step(run_dir: Path) -> int:
    newest = newest_checkpoint(run_dir / "checkpoints") if run_dir.exists() else None
    return manifest(newest)["step"] if newest else 0


def _losses(run_dir: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in records(run_dir, "train")}


def _hashes(rows: np.ndarray) -> list[str]:
    return [xxhash.xxh3_64_hexdigest(np.ascontiguousarray(row)) for row in rows]


def write_down_what_is_trained_on(seen: Path) -> None:
    """In a rank: log the rows of every step beside the training, before the step is made."""
    from megagpt.training.trainer import Trainer

    train_on = Trainer._train_on
    path = seen.with_suffix(f".rank_{os.environ['RANK']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a", encoding="utf-8")

    def logged(self, batches, data_seconds):  # type: ignore[no-untyped-def]
        rows = [row for batch in batches.micro_batches for row in _hashes(batch.input_ids.numpy())]
        file.write(json.dumps([self.step + 1, rows]) + "\n")
        file.flush()
        return train_on(self, batches, data_seconds)

    Trainer._train_on = logged  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.exit(main())
