"""Numbers that go wrong: steps that are not finite, losses that jump.

Every rank sees the same reduced numbers, so all come to the same decision without asking each other.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import replace

from megagpt.errors import AgreedError
from megagpt.training.recording import Metrics
from megagpt.training.step import StepNumbers
from megagpt.training.trainer import Callback, Progress, RollBackError, StepInfo, Trainer

_LEAST_SPREAD = 1e-4  # of the median: losses that hardly differ make no spike of a small difference


class NonFiniteSteps(Callback):
    """Logs skipped steps; `faults.max_skipped_steps` in a row stop the run with a checkpoint of before them."""

    def __init__(self, metrics: Metrics, save: Callable[[Trainer, Progress], None]) -> None:
        """save: writes a checkpoint of the weights as they are, as those of a given progress."""
        self._metrics, self._save = metrics, save
        self._before: Progress | None = None

    def on_numbers(self, trainer: Trainer, info: StepInfo, numbers: StepNumbers) -> None:
        if not numbers.skipped:
            self._before = None
        elif self._before is None:
            skipped = trainer.progress.skipped_steps - 1  # the metrics, which come first, have counted this one
            self._before = replace(
                trainer.progress,
                step=info.step - 1,
                consumed_samples=info.window.start,
                consumed_tokens=info.tokens - info.window.size * trainer.config.seq_len,
                skipped_steps=skipped,
            )
            self._metrics.write(
                {
                    "kind": "event",
                    "step": info.step,
                    "event": "skipped",
                    "message": f"loss {numbers.loss:.4g}, gradient norm {numbers.grad_norm:.4g}: nothing was changed",
                    "samples": [info.window.start, info.window.stop],
                }
            )

    def on_step(self, trainer: Trainer, info: StepInfo) -> None:
        if self._skipped_in_a_row(trainer) < trainer.config.faults.max_skipped_steps:
            return
        trainer.settle()  # the step that is under way may be a good one
        if self._before is None:
            return
        before, steps = self._before, self._skipped_in_a_row(trainer)
        self._save(trainer, before)
        raise AgreedError(
            f"steps {before.step + 1} to {before.step + steps} had a loss or gradient that is not finite; stopped with "
            f"a checkpoint of step {before.step}: lower optimizer.lr, or look at samples {before.consumed_samples} on",
            exit_code=1,
        )

    def _skipped_in_a_row(self, trainer: Trainer) -> int:
        return trainer.progress.skipped_steps - self._before.skipped_steps if self._before else 0


class LossSpikes(Callback):
    """Logs a loss far above the recent ones, with the samples of its batch; may send the run back to a checkpoint.

    The distance is robust: from the median of the last `faults.spike_window` losses, in units of 1.4826 x the median
    distance from it (the standard deviation of normal numbers).
    """

    def __init__(self, metrics: Metrics, has_checkpoint: Callable[[Trainer], bool]) -> None:
        """has_checkpoint: whether there is one to go back to; asked on all ranks."""
        self._metrics, self._has_checkpoint = metrics, has_checkpoint
        self._spike: RollBackError | None = None

    def on_numbers(self, trainer: Trainer, info: StepInfo, numbers: StepNumbers) -> None:
        faults = trainer.config.faults
        if numbers.skipped or not math.isfinite(numbers.loss) or not faults.spike_threshold:
            return
        recent = trainer.progress.recent_losses
        if len(recent) >= faults.spike_window:
            score = robust_score(numbers.loss, recent[-faults.spike_window :])
            if score > faults.spike_threshold:
                self._report(info, numbers.loss, score)
                self._spike = self._spike or RollBackError(info.step, info.window, numbers.loss, score)
                trainer.rollback_waits = faults.spike_action == "rollback"
        # A new list, since a checkpoint may hold the old one.
        trainer.progress.recent_losses = [*recent, numbers.loss][-faults.spike_window :]

    def on_step(self, trainer: Trainer, info: StepInfo) -> None:
        if self._spike is None:
            return
        spike, self._spike, trainer.rollback_waits = self._spike, None, False
        if trainer.config.faults.spike_action == "log":
            return
        trainer.settle()
        has_checkpoint = self._has_checkpoint(trainer)  # in any case: it ends a save that is under way
        if trainer.progress.rollbacks >= trainer.config.faults.max_rollbacks:
            raise AgreedError(
                f"{spike}, again after {trainer.progress.rollbacks} rollbacks (faults.max_rollbacks); "
                "lower optimizer.lr or look at the data",
                exit_code=1,
            )
        if has_checkpoint:
            raise spike

    def _report(self, info: StepInfo, loss: float, score: float) -> None:
        window = info.window
        self._metrics.write(
            {
                "kind": "event",
                "step": info.step,
                "event": "spike",
                "message": f"loss {loss:.4f} is {score:.1f} robust standard deviations above the last ones; "
                f"its batch is samples {window.start} to {window.stop - 1}",
                "loss": loss,
                "score": score,
                "samples": [window.start, window.stop],
            }
        )


def robust_score(value: float, others: list[float]) -> float:
    """How far `value` lies above the median of `others`, in robust standard deviations of theirs."""
    median = statistics.median(others)
    spread = 1.4826 * statistics.median(abs(other - median) for other in others)
    return (value - median) / max(spread, _LEAST_SPREAD * abs(median), 1e-12)
