"""The callback that measures a run and hands records to the sinks."""

import resource
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megagpt.model.counts import flops_per_token
from megagpt.training.metrics import Record, Sink
from megagpt.training.step import StepNumbers
from megagpt.training.trainer import Callback, RollBackError, StepInfo, Trainer


@dataclass
class _Interval:
    """Sums over the steps since the last record, seconds."""

    steps: int = 0
    tokens: int = 0
    wall: float = 0.0
    data: float = 0.0
    own: float = 0.0
    forward_backward: float = 0.0
    optimizer: float = 0.0
    evaluation: float = 0.0
    checkpoint: float = 0.0


class Metrics(Callback):
    """Collects a record every `logging.every` steps; rank 0 has the sinks.

    A step's wall time is what passes until the next one, less evaluation and checkpoints. Numbers of the device are
    read one step late, so that it does not idle.
    """

    def __init__(
        self,
        sinks: Sequence[Sink],
        peak_flops: float | None,
        epochs: Callable[[int], dict[str, float]],
        first: Sequence[Record],
    ) -> None:
        """peak_flops: of one rank's device, FLOP/s. epochs: of each dataset after so many samples.

        first: records that come before those of the steps.
        """
        self._sinks = sinks
        self._peak_flops = peak_flops
        self._epochs = epochs
        self._first = first
        self._mark = 0.0
        self._now, self._due = _Interval(), dict[int, _Interval]()

    def on_start(self, trainer: Trainer) -> None:
        for record in self._first:
            self.write(record)
        self._mark = time.perf_counter()

    def on_step(self, trainer: Trainer, info: StepInfo) -> None:
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        trainer.progress.productive_seconds += seconds
        self._now.steps += 1
        self._now.tokens += info.window.size * trainer.config.seq_len
        self._now.wall += seconds
        self._now.data += info.data_seconds
        self._now.own += info.data_seconds
        if info.step % trainer.config.logging.every == 0 or trainer.finished:
            self._due[info.step], self._now = self._now, _Interval()

    def on_numbers(self, trainer: Trainer, info: StepInfo, numbers: StepNumbers) -> None:
        trainer.progress.skipped_steps += numbers.skipped
        interval = self._due[info.step] if self._due else self._now
        interval.own += numbers.own_seconds
        interval.forward_backward += numbers.forward_backward_seconds
        interval.optimizer += numbers.optimizer_seconds
        if self._due.pop(info.step, None):
            record = self._record(trainer, info, numbers, interval)
            for sink in self._sinks:
                sink.write(record)

    def on_end(self, trainer: Trainer) -> None:
        if (reason := _end_of(trainer)) is not None:
            self.write({"kind": "stop", "step": trainer.step, "reason": reason})
        for sink in self._sinks:
            sink.close(completed=reason == "finished")

    def write(self, record: Record) -> None:
        """Hand a record to all sinks. Settle the trainer before, if the record belongs behind the steps' own."""
        for sink in self._sinks:
            sink.write(record | {"time": time.time()})

    def exclude(self, kind: str, seconds: float) -> None:
        """Count what was no training as time of "evaluation" or "checkpoint"."""
        self._mark += seconds
        setattr(self._now, kind, getattr(self._now, kind) + seconds)

    def _record(self, trainer: Trainer, info: StepInfo, numbers: StepNumbers, interval: _Interval) -> Record:
        config, steps, progress = trainer.config, interval.steps, trainer.progress
        step_seconds = interval.wall / steps
        own_seconds = trainer.hosts.gather(interval.own / steps)
        tokens_per_second = interval.tokens / interval.wall
        flops_per_second = tokens_per_second * flops_per_token(config.model, config.seq_len)
        ranks, now = dist.get_world_size(), time.time()
        slowest = max(range(ranks), key=own_seconds.__getitem__)
        return {
            "kind": "train",
            "step": info.step,
            "time": now,
            "tokens": info.tokens,
            "batch_size": info.window.size,
            "loss": numbers.loss,
            "lr": info.lr,
            "grad_norm": numbers.grad_norm,
            "step_seconds": step_seconds,
            "data_seconds": interval.data / steps,
            "forward_backward_seconds": interval.forward_backward / steps,
            "optimizer_seconds": interval.optimizer / steps,
            "checkpoint_seconds": interval.checkpoint / steps,
            "evaluation_seconds": interval.evaluation / steps,
            "tokens_per_second": tokens_per_second,
            "tokens_per_second_per_rank": tokens_per_second / ranks,
            "mfu": flops_per_second / (ranks * self._peak_flops) if self._peak_flops else None,
            "skipped_steps": progress.skipped_steps,
            "peak_memory_bytes": peak_memory_bytes(trainer.engine.device),
            "goodput": min(1.0, progress.productive_seconds / max(now - progress.started, 1e-9)),
            "straggler_ratio": own_seconds[slowest] / max(sorted(own_seconds)[(ranks - 1) // 2], 1e-9),
            "slowest_rank": slowest,
            "epochs": self._epochs(info.window.stop),
            "eta_seconds": (trainer.total_steps - info.step) * step_seconds,
        }


def _end_of(trainer: Trainer) -> str | None:
    """Why the loop is left; None: only to go back to a checkpoint."""
    if isinstance(trainer.error, RollBackError):
        return None
    if trainer.error:
        return f"failed: {' '.join(str(trainer.error).split())[:200] or type(trainer.error).__name__}"
    if trainer.finished and not trainer.progress.evaluation_due:
        return "finished"
    return signal.Signals(trainer.stop_signal).name


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory that this rank has held so far: torch's allocations on a GPU, else the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
