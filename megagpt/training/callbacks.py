"""What hangs on the training loop beside its measuring: evaluation, samples, checkpoints, profiles."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from megagpt.data.loader import ValidationData
from megagpt.errors import UserError
from megagpt.training.checkpoint import CheckpointManifest
from megagpt.training.recording import Metrics
from megagpt.training.saving import CheckpointWriter
from megagpt.training.step import EvaluationResult, StepNumbers
from megagpt.training.trainer import Callback, Progress, StepInfo, Trainer


class Evaluation(Callback):
    """Mean loss over each validation dataset, every `evaluation.every` steps and after the last.

    A signal cuts it off between two batches; a run that goes on after that does it first of all.
    """

    def __init__(
        self, datasets: dict[str, ValidationData], metrics: Metrics, write_samples: Callable[[Trainer], None]
    ) -> None:
        """write_samples: called after each evaluation, on all ranks."""
        self._datasets, self._metrics, self._write_samples = datasets, metrics, write_samples

    def on_start(self, trainer: Trainer) -> None:
        if trainer.progress.evaluation_due:
            self._evaluate(trainer)

    def on_step(self, trainer: Trainer, info: StepInfo) -> None:
        if trainer.due(trainer.config.evaluation.every):
            trainer.settle()
            self._evaluate(trainer)

    def _evaluate(self, trainer: Trainer) -> None:
        for name, data in self._datasets.items():
            started = time.perf_counter()
            found = trainer.engine.evaluate(data, partial(self._interrupted, trainer, name))
            seconds = time.perf_counter() - started
            self._metrics.exclude("evaluation", seconds)
            trainer.progress.evaluation_due = found is None
            if found is None:
                return
            self._metrics.write(_validation_record(trainer.step, name, found, seconds))
        started = time.perf_counter()
        self._write_samples(trainer)
        self._metrics.exclude("evaluation", time.perf_counter() - started)

    @staticmethod
    def _interrupted(trainer: Trainer, name: str) -> bool:
        trainer.supervisor.beat(f"step {trainer.step}: evaluation on {name}")
        return trainer.check_stop()


def _validation_record(step: int, name: str, found: EvaluationResult, seconds: float) -> dict[str, object]:
    return {
        "kind": "validation",
        "step": step,
        "dataset": name,
        "loss": found.loss,
        "perplexity": math.exp(min(found.loss, 700.0)),
        "bits_per_byte": found.loss * found.targets / math.log(2) / found.bytes if found.bytes else None,
        "targets": found.targets,
        "seconds": seconds,
    }


class Checkpointing(Callback):
    """Saves every `checkpoint.every` steps, after the last, and when the run is asked to stop."""

    def __init__(self, folder: Path, template: CheckpointManifest, metrics: Metrics, resaves: bool = False) -> None:
        """resaves: whether what happens before the first step changes what the newest checkpoint says."""
        self._folder, self._template, self._metrics, self._resaves = folder, template, metrics, resaves
        self._writer: CheckpointWriter | None = None
        self._last_skipped = self._postponed = False

    def on_start(self, trainer: Trainer) -> None:
        self._writer = CheckpointWriter(self._folder, trainer.config.checkpoint.keep)
        trainer.busy = lambda: self._writer is not None and self._writer.busy
        if self._resaves and trainer.finished and not trainer.progress.evaluation_due:
            self.save(trainer)

    def on_step(self, trainer: Trainer, info: StepInfo) -> None:
        assert self._writer is not None
        if self._writer.pending and not trainer.any_busy:
            self.finish(trainer, optional=True)
        if not (trainer.stopping or self._postponed or trainer.due(trainer.config.checkpoint.every)):
            return
        trainer.settle()  # a checkpoint promises that everything up to its step has been logged
        # Among steps that are not finite none is worth keeping: if they do not end, the one before them is saved.
        # Nor is one after a loss spike from which the run will go back.
        useless = self._last_skipped or trainer.rollback_waits
        self._postponed = useless and not (trainer.stopping or trainer.finished)
        if not self._postponed:
            self.save(trainer)
            if trainer.check_stop():  # a signal in the middle of the save: it is the run's last one
                self.finish(trainer)

    def on_numbers(self, trainer: Trainer, info: StepInfo, numbers: StepNumbers) -> None:
        self._last_skipped = numbers.skipped

    def on_end(self, trainer: Trainer) -> None:
        if self._writer:
            self._writer.close()
        self._writer = None  # a save that is under way is of no use without the other ranks; a thread ends with us

    def save(self, trainer: Trainer, progress: Progress | None = None) -> None:
        """Save the weights as they are, as those of `progress` (default: the trainer's); waits if the run ends here."""
        assert self._writer is not None
        if self._writer.pending:
            self.finish(trainer, optional=True)
        started = time.perf_counter()
        trainer.supervisor.beat(f"step {trainer.step}: checkpoint")
        engine, asynchronous = trainer.engine, trainer.config.checkpoint.asynchronous
        last = trainer.finished or trainer.stopping or progress is not None
        manifest = self._template.model_copy(update=asdict(progress or trainer.progress))
        try:
            self._writer.begin(manifest, lambda folder: engine.save(folder, snapshot=asynchronous and not last))
        except UserError as error:
            self._failed(trainer, error)
        finally:
            self._metrics.exclude("checkpoint", time.perf_counter() - started)
        if last or not asynchronous:
            self.finish(trainer)

    def finish(self, trainer: Trainer, optional: bool = False) -> None:
        """Wait for a save that is under way, and log it. optional: another one follows, also if the run ends here."""
        assert self._writer is not None
        if not self._writer.pending:
            return
        started = time.perf_counter()

        def beat() -> None:
            trainer.supervisor.beat(f"step {trainer.step}: end of a checkpoint", patient=True)

        try:
            beat()
            saved = self._writer.finish(beat)
        except UserError as error:
            self._failed(trainer, error, optional)
            return
        finally:
            self._metrics.exclude("checkpoint", time.perf_counter() - started)
        self._metrics.write(
            {
                "kind": "checkpoint",
                "step": saved.step,
                "path": str(saved.path),
                "seconds": saved.seconds,
                "stall_seconds": saved.stall_seconds,
                "bytes": saved.size,
            }
        )

    def _failed(self, trainer: Trainer, error: UserError, optional: bool = False) -> None:
        """A save failed on all ranks: an error, or with checkpoint.on_error=continue a record."""
        last = (trainer.finished or trainer.stopping) and not optional
        if last or trainer.config.checkpoint.on_error == "stop":
            raise error
        self._metrics.write(
            {"kind": "event", "step": trainer.step, "event": "checkpoint_failed", "message": str(error)}
        )


class Profiling(Callback):
    """torch's profiler around the steps that train.profile names; rank 0 writes run_dir/profile/steps_A-B.json.gz."""

    def __init__(self, steps: str, folder: Path) -> None:
        """steps: "10" or "steps 10-12", counted from 1."""
        first, _, last = steps.removeprefix("steps ").partition("-")
        self._first, self._last, self._folder = int(first), int(last or first), folder
        self._profiler: torch.profiler.profile | None = None

    def on_start(self, trainer: Trainer) -> None:
        self._start_before(trainer.step + 1)

    def on_step(self, trainer: Trainer, info: StepInfo) -> None:
        if self._profiler and (info.step >= self._last or trainer.finished):
            self._stop(info.step)
        self._start_before(info.step + 1)

    def on_end(self, trainer: Trainer) -> None:
        if self._profiler:
            self._stop(trainer.step)

    def _start_before(self, step: int) -> None:
        if step == self._first and dist.get_rank() == 0:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(activities=activities, record_shapes=True)
            self._profiler.start()

    def _stop(self, last: int) -> None:
        assert self._profiler is not None
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self._folder / f"steps_{self._first}-{last}.json.gz"))
