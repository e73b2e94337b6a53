"""Records of training runs that never ran, as lifelike as a reader of metrics.jsonl needs them."""

import json
import math
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megagpt.training.metrics import Record


@dataclass
class FakeRun:
    """A run that is killed and pre-empted, and goes on from its checkpoints, maybe on other ranks.

    `records` is what metrics.jsonl would hold: of a killed part what lies beyond the checkpoint is dropped, unless
    `keep_repeated`, when the steps are there twice.
    """

    steps: int = 2000
    every: int = 10
    ranks: tuple[int, ...] = (16, 16, 8, 16)
    stops_at: tuple[int, ...] = (730, 1100, 1504)
    """Where each start but the last one ends: by a kill, a pre-emption (with a checkpoint), a kill, and so on."""
    checkpoint_every: int = 100
    evaluate_every: int = 100
    batch_size: int = 256
    seq_len: int = 1024
    peak_lr: float = 6e-4
    floor: float = 2.9
    seed: int = 0
    spikes: tuple[int, ...] = (612, 1390)
    skipped: tuple[int, ...] = (20, 900, 910)
    datasets: tuple[str, ...] = ("wiki/validation", "code/validation")
    keep_repeated: bool = False
    records: list[Record] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._now = 1_760_000_000.0
        self._first = self._now
        self._useful = 0.0
        step, checkpoint = 0, None
        for number, ranks in enumerate(self.ranks):
            if not self.keep_repeated:
                self.records = [record for record in self.records if record["step"] <= step]
            self._add("start", step, world_size=ranks, zero_stage=1, precision="bf16",
                      micro_batch_size=self.batch_size // ranks, continues_from=checkpoint)  # fmt: skip
            if number and ranks != self.ranks[number - 1]:
                message = f"world size {self.ranks[number - 1]} -> {ranks}"
                self._add("event", step, event="changed", message=message)
            self._now += 45
            is_last = number == len(self.ranks) - 1
            end = self.steps if is_last else self.stops_at[number]
            reached = self._train(step, end, ranks)
            if is_last:
                self._add("stop", reached, reason="finished")
            elif number % 2:
                self._save(reached)
                self._add("stop", reached, reason="SIGUSR1")
            lost = 0 if is_last or number % 2 else reached % self.checkpoint_every
            step = reached - lost
            checkpoint = f"step_{step:08d}"
            self._useful -= lost * 1.2
            self._now += 400 + 300 * self._random.random()

    def write(self, folder: Path) -> Path:
        """Write metrics.jsonl into the run folder `folder`, and return that."""
        return write_records(folder, self.records)

    def _train(self, step: int, end: int, ranks: int) -> int:
        while step < end:
            before, step = step, min(step + self.every, end)
            seconds = 1.1 * 16 / ranks * self._random.gauss(1, 0.01) + (2.5 if before == 0 else 0)
            saves, evaluates = step % self.checkpoint_every == 0, step % self.evaluate_every == 0
            checkpoint, evaluation = (1.4 if saves else 0.0), (9.0 if evaluates else 0.0)
            span = step - before
            self._now += seconds * span + checkpoint + evaluation
            self._useful += seconds * span
            self._add("train", step, **self._numbers(step, seconds, ranks, checkpoint / span, evaluation / span))
            for spike in self.spikes:
                if before < spike <= step:
                    message = f"loss 6.21 is 14.2 robust deviations above the median {self._loss(step):.2f}"
                    self._add("event", spike, event="spike", message=message, samples=[3, 1, 4])
            if evaluates:
                self._evaluate(step)
            if saves:
                self._save(step)
        return step

    def _loss(self, step: int) -> float:
        return self.floor + 8 * math.exp(-step / 60) + 6 / (step + 30) ** 0.35

    def _numbers(self, step: int, seconds: float, ranks: int, checkpoint: float, evaluation: float) -> Record:
        tokens = self.batch_size * self.seq_len
        is_skipped = step in self.skipped
        is_spike = any(0 <= step - spike < self.every for spike in self.spikes)
        warm = min(1, step / 150)
        lr = self.peak_lr * warm * (0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi * max(0, step - 150) / self.steps)))
        norm = self._random.lognormvariate(-0.9, 0.2) + 8 * math.exp(-step / 40) + 6 * is_spike
        data = seconds * (0.03 + 0.2 * (0.45 < step / self.steps < 0.5))
        rate = tokens / seconds
        return {
            "tokens": step * tokens,
            "batch_size": self.batch_size,
            "loss": None if is_skipped else self._loss(step) + self._random.gauss(0, 0.04) + 2.4 * is_spike,
            "lr": lr,
            "grad_norm": None if is_skipped else norm,
            "step_seconds": seconds,
            "data_seconds": data,
            "forward_backward_seconds": 0.92 * (seconds - data),
            "optimizer_seconds": 0.07 * (seconds - data),
            "checkpoint_seconds": checkpoint,
            "evaluation_seconds": evaluation,
            "tokens_per_second": rate,
            "tokens_per_second_per_rank": rate / ranks,
            "mfu": 0.43 * 1.1 * 16 / ranks / seconds,
            "skipped_steps": sum(skipped <= step for skipped in self.skipped),
            "peak_memory_bytes": 31 << 30,
            "goodput": self._useful / (self._now - self._first),
            "straggler_ratio": 1.03,
            "slowest_rank": 5,
            "epochs": {"wiki/train": 0.1},
            "eta_seconds": (self.steps - step) * seconds,
        }

    def _evaluate(self, step: int) -> None:
        for number, dataset in enumerate(self.datasets):
            loss = self._loss(step) + 0.05 - 0.9 * number + self._random.gauss(0, 0.01)
            bits = loss / math.log(2) / 4.3 if number == 0 else None
            self._add("validation", step, dataset=dataset, loss=loss, perplexity=math.exp(loss), bits_per_byte=bits,
                      targets=1_000_000, seconds=9.0 / len(self.datasets))  # fmt: skip
        self._add("sample", step, prompt="Once", text="upon a time")

    def _save(self, step: int) -> None:
        self._add("checkpoint", step, path=f"checkpoints/step_{step:08d}", seconds=6 + self._random.random(),
                  stall_seconds=1.2 + 0.3 * self._random.random(), bytes=1_493_000_000)  # fmt: skip

    def _add(self, kind: str, step: int, **values: Any) -> None:
        self.records.append({"kind": kind, "step": step, "time": self._now, **values})


def write_records(folder: Path, records: list[Record]) -> Path:
    """Write these records as the run folder `folder`, and return that."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    return folder
