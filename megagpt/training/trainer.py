"""The training loop: read a global batch, step, let the callbacks see it.

All that is optional (metrics, evaluation, checkpoints) is a callback, called in the order given; every rank has the
same callbacks, so that their collectives match.
"""

import hashlib
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from megagpt.config.schema import RunConfig
from megagpt.data.loader import BatchLoader
from megagpt.training.engine import Engine, StepResult
from megagpt.training.schedule import learning_rate


@dataclass(frozen=True)
class StepInfo:
    """One finished step: its number (the first is 1), its results, and the seconds it waited for data."""

    step: int
    lr: float
    result: StepResult
    data_seconds: float


class Callback:
    """Something that hangs on the loop; override what is needed. Every method runs on every rank."""

    def on_start(self, trainer: "Trainer") -> None:
        """Before the first step."""

    def on_step(self, trainer: "Trainer", info: StepInfo) -> None:
        """After each optimizer step."""

    def on_end(self, trainer: "Trainer") -> None:
        """After the last step, or when the loop is left by an exception."""


class Trainer:
    """Trains `engine` on what `loader` brings, from step `first_step` to the end of the loader.

    Raises whatever a callback or the engine raises, after closing the callbacks.
    """

    def __init__(
        self, config: RunConfig, engine: Engine, loader: BatchLoader, callbacks: Sequence[Callback], rank: int
    ) -> None:
        self.config = config
        self.engine = engine
        self.loader = loader
        self.callbacks = callbacks
        self.rank = rank
        self.step = loader.consumed // config.train.global_batch_size
        self.first_step = self.step

    @property
    def consumed_samples(self) -> int:
        """Sequences of the global order that the finished steps have read."""
        return self.step * self.config.train.global_batch_size

    @property
    def finished(self) -> bool:
        """Whether the run's last step is done."""
        return self.step >= self.config.train.steps

    def due(self, every: int) -> bool:
        """Whether something that happens every `every` steps (0: never) and after the last step happens now."""
        return self.finished or (every > 0 and self.step % every == 0)

    def fit(self) -> None:
        """Run the remaining steps."""
        with ExitStack() as stack:
            for callback in reversed(self.callbacks):
                stack.callback(callback.on_end, self)
            for callback in self.callbacks:
                callback.on_start(self)
            started = time.perf_counter()
            for micro_batches in self.loader:
                data_seconds = time.perf_counter() - started
                seed_dropout(self.config.train.seed, self.step, self.rank)
                lr = learning_rate(self.step, self.config.optimizer.lr, self.config.schedule, self.config.train.steps)
                result = self.engine.step(micro_batches, lr)
                self.step += 1
                info = StepInfo(self.step, lr, result, data_seconds)
                for callback in self.callbacks:
                    callback.on_step(self, info)
                started = time.perf_counter()


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Make dropout a function of (seed, step, rank): a resumed run draws what an uninterrupted one would have drawn."""
    digest = hashlib.blake2b(f"dropout {seed} {step} {rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little"))
