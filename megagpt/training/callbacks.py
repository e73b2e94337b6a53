"""What hangs on the training loop: evaluation, metrics, checkpoints."""

import math
import resource
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megagpt.data.loader import ValidationData
from megagpt.model.counts import flops_per_token
from megagpt.training.checkpoint import CheckpointManifest, save_checkpoint
from megagpt.training.metrics import Record, Sink
from megagpt.training.trainer import Callback, StepInfo, Trainer


class Metrics(Callback):
    """Collects a record every `logging.every` steps and hands records to the sinks (rank 0 has them).

    A step's loss is read from the device after the next step was given to it, so that the device does not idle. Step
    times are wall time from record to record less what evaluation and checkpoints took, divided by the steps.
    """

    def __init__(self, sinks: Sequence[Sink], peak_flops: float | None, skipped_steps: int) -> None:
        """peak_flops: of one rank's device, FLOP/s. skipped_steps: by the steps before this process's first."""
        self.skipped_steps = skipped_steps
        self._sinks = sinks
        self._peak_flops = peak_flops
        self._mark = 0.0
        self._pending: tuple[Record, torch.Tensor, torch.Tensor | float] | None = None
        self._interval: list[StepInfo] = []

    def on_start(self, trainer: Trainer) -> None:
        self._mark = time.perf_counter()

    def on_step(self, trainer: Trainer, info: StepInfo) -> None:
        self.flush()
        self._interval.append(info)
        self.skipped_steps += not info.result.applied
        if trainer.step % trainer.config.logging.every == 0 or trainer.finished:
            loss = info.result.loss.clone()
            dist.all_reduce(loss)
            self._pending = (self._record(trainer, info), loss, info.result.grad_norm)
            self._interval = []
        if trainer.finished:
            self.flush()

    def on_end(self, trainer: Trainer) -> None:
        self.flush()
        for sink in self._sinks:
            sink.close(completed=trainer.finished)

    def write(self, record: Record) -> None:
        """Hand a record to all sinks, after the step's own that may still be pending."""
        self.flush()
        for sink in self._sinks:
            sink.write(record)

    def exclude(self, seconds: float) -> None:
        """Leave out of the step times what was no training."""
        self._mark += seconds

    def flush(self) -> None:
        """Read the pending step's numbers from the device and hand them on."""
        if self._pending is None:
            return
        record, loss, grad_norm = self._pending
        self._pending = None
        record["loss"], record["grad_norm"] = float(loss), float(grad_norm)
        for sink in self._sinks:
            sink.write(record)

    def _record(self, trainer: Trainer, info: StepInfo) -> Record:
        config = trainer.config
        tokens_per_step = config.train.global_batch_size * config.seq_len
        now = time.perf_counter()
        step_seconds = (now - self._mark) / len(self._interval)
        self._mark = now
        tokens_per_second = tokens_per_step / step_seconds
        flops_per_second = tokens_per_second * flops_per_token(config.model, config.seq_len)
        return {
            "kind": "train",
            "step": info.step,
            "tokens": info.step * tokens_per_step,
            "loss": math.nan,
            "lr": info.lr,
            "grad_norm": math.nan,
            "step_seconds": step_seconds,
            "data_seconds": sum(step.data_seconds for step in self._interval) / len(self._interval),
            "tokens_per_second": tokens_per_second,
            "mfu": flops_per_second / (dist.get_world_size() * self._peak_flops) if self._peak_flops else None,
            "skipped_steps": self.skipped_steps,
            "peak_memory_bytes": peak_memory_bytes(trainer.engine.device),
            "eta_seconds": (config.train.steps - info.step) * step_seconds,
        }


class Evaluation(Callback):
    """Mean loss over each validation dataset, every `evaluation.every` steps and after the last."""

    def __init__(self, datasets: dict[str, ValidationData], metrics: Metrics) -> None:
        self._datasets = datasets
        self._metrics = metrics

    def on_step(self, trainer: Trainer, info: StepInfo) -> None:
        if not trainer.due(trainer.config.evaluation.every):
            return
        for name, data in self._datasets.items():
            started = time.perf_counter()
            loss, targets = trainer.engine.evaluate(data)
            seconds = time.perf_counter() - started
            self._metrics.exclude(seconds)
            self._metrics.write(
                {
                    "kind": "validation",
                    "step": trainer.step,
                    "dataset": name,
                    "loss": loss,
                    "perplexity": math.exp(min(loss, 700.0)),
                    "targets": targets,
                    "seconds": seconds,
                }
            )


class Checkpointing(Callback):
    """Saves every `checkpoint.every` steps and after the last."""

    def __init__(self, folder: Path, template: CheckpointManifest, metrics: Metrics) -> None:
        self._folder = folder
        self._template = template
        self._metrics = metrics

    def on_step(self, trainer: Trainer, info: StepInfo) -> None:
        if not trainer.due(trainer.config.checkpoint.every):
            return
        self._metrics.flush()  # a checkpoint promises that everything up to its step has been logged
        started = time.perf_counter()
        progress = {
            "step": trainer.step,
            "consumed_samples": trainer.consumed_samples,
            "skipped_steps": self._metrics.skipped_steps,
        }
        manifest = self._template.model_copy(update=progress)
        path = save_checkpoint(self._folder, manifest, trainer.engine.save, trainer.config.checkpoint.keep)
        seconds = time.perf_counter() - started
        self._metrics.exclude(seconds)
        self._metrics.write({"kind": "checkpoint", "step": trainer.step, "path": str(path), "seconds": seconds})


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory that this rank has held so far: torch's allocations on a GPU, else the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
