"""The training loop: read a global batch, step, let the callbacks see it.

All that is optional (metrics, evaluation, checkpoints, spikes) is a callback, called in the order given; every rank has
the same callbacks, so that their collectives match. A step's numbers are read one step late, while the device computes
the next one. What the ranks must agree on (a signal to stop, files written) travels between the hosts meanwhile.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch

from megagpt.config.schema import RunConfig
from megagpt.data.loader import BatchLoader, StepBatches, Window
from megagpt.training.control import HostGroup
from megagpt.training.engine import Engine
from megagpt.training.horizon import horizon
from megagpt.training.schedule import Schedule
from megagpt.training.step import StepNumbers, StepResult
from megagpt.training.supervision import Supervisor


@dataclass
class Progress:
    """Where a run is: what a checkpoint keeps of it, under the same names as in its manifest."""

    step: int = 0
    """Optimizer steps done."""
    consumed_samples: int = 0
    """Position in the global order of samples after them."""
    consumed_tokens: int = 0
    """Tokens that they were trained on."""
    skipped_steps: int = 0
    """How many of them had a non-finite loss or gradient and changed nothing."""
    skipped_samples: list[tuple[int, int]] = field(default_factory=list)
    """Ranges (start, stop) of samples that are never read."""
    rollbacks: int = 0
    """How often the run went back because of a loss spike."""
    evaluation_due: bool = False
    """Whether an evaluation was cut off after the last step."""
    started: float = 0.0
    """When the run was first started, seconds since 1970."""
    productive_seconds: float = 0.0
    """Time that the steps took."""
    recent_losses: list[float] = field(default_factory=list)
    """Losses of the last steps, with which the next one is compared."""


@dataclass(frozen=True)
class StepInfo:
    """One step that was given to the device: its number (the first is 1) and what the host knows of it."""

    step: int
    window: Window
    tokens: int
    """Of the whole run so far, this step's included."""
    lr: float
    result: StepResult
    data_seconds: float


class RollBackError(Exception):
    """The run shall go back to its newest checkpoint and leave out a window of samples."""

    def __init__(self, step: int, window: Window, loss: float, score: float) -> None:
        super().__init__(f"the loss of step {step} was {loss:.4f}, {score:.1f} robust standard deviations too high")
        self.window, self.loss, self.score = window, loss, score


class Callback:
    """Something that hangs on the loop; override what is needed. Every method runs on every rank."""

    def on_start(self, trainer: "Trainer") -> None:
        """Before the first step."""

    def on_step(self, trainer: "Trainer", info: StepInfo) -> None:
        """After each optimizer step was given to the device. `trainer.settle()` waits for its numbers."""

    def on_numbers(self, trainer: "Trainer", info: StepInfo, numbers: StepNumbers) -> None:
        """When a step's numbers are known: after the next step was given to the device, or in `settle`."""

    def on_end(self, trainer: "Trainer") -> None:
        """After the last step, or when the loop is left by an exception."""


class Trainer:
    """Trains `engine` on what `loader` brings, from `progress` to the end of the loader or a request to stop.

    Raises whatever a callback or the engine raises, after closing the callbacks.
    """

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        loader: BatchLoader,
        callbacks: Sequence[Callback],
        progress: Progress,
        hosts: HostGroup,
        supervisor: Supervisor,
        rank: int,
    ) -> None:
        self.config, self.engine, self.loader, self.callbacks = config, engine, loader, callbacks
        self.progress, self.hosts, self.supervisor, self.rank = progress, hosts, supervisor, rank
        length = horizon(config, progress)
        self.schedule, self.total_steps = Schedule.of(config, length), length.steps
        self.stop_signal = 0
        """The signal for which the ranks agreed to stop although steps are left; 0: none."""
        self.rollback_waits = False
        """Whether the run will go back, so that what it holds now is not worth keeping."""
        self.error: BaseException | None = None
        """What the loop was left by, if not by its end."""
        self.any_busy = False
        """Whether `busy` was true on any rank when the last step began."""
        self.busy: Callable[[], bool] = lambda: False
        """Whether this rank still has something under way that others wait for."""
        self._unsettled: list[StepInfo] = []

    @property
    def step(self) -> int:
        """Optimizer steps done, or given to the device."""
        return self.progress.step

    @property
    def stopping(self) -> bool:
        """Whether the ranks agreed to stop although steps are left."""
        return self.stop_signal > 0

    @property
    def finished(self) -> bool:
        """Whether the run's last step is done."""
        return self.step >= self.total_steps

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
            try:
                self.check_stop()
                while not (self.stopping or self.finished):
                    self._one_step()
                self.settle()
            except BaseException as error:
                self.error = error
                raise

    def check_stop(self) -> bool:
        """Agree with all ranks, now, whether to stop; called on every rank."""
        self._learn(self.hosts.agree(self._flags()))
        return self.stopping

    def settle(self) -> None:
        """Wait for all steps that were given to the device and hand out their numbers."""
        self._hand_out(keep=0)

    def _one_step(self) -> None:
        self.supervisor.beat(f"step {self.step + 1}: data")
        started = time.perf_counter()
        batches = next(self.loader)
        data_seconds = time.perf_counter() - started
        self.hosts.begin(self._flags())
        self.supervisor.beat(f"step {self.step + 1}: forward, backward and update")
        info = self._train_on(batches, data_seconds)
        self._learn(self.hosts.end())
        for callback in self.callbacks:
            callback.on_step(self, info)

    def _train_on(self, batches: StepBatches, data_seconds: float) -> StepInfo:
        window, progress = batches.window, self.progress
        seed_dropout(self.config.train.seed, self.step, self.rank)
        tokens = progress.consumed_tokens + window.size * self.config.seq_len
        lr = self._learning_rate(tokens)
        result = self.engine.step(batches.micro_batches, lr)
        progress.step, progress.consumed_samples, progress.consumed_tokens = self.step + 1, window.stop, tokens
        info = StepInfo(self.step, window, tokens, lr, result, data_seconds)
        self._unsettled.append(info)
        self._hand_out(keep=1)
        return info

    def _learning_rate(self, tokens: int) -> float:
        """Of the step after which the run has been trained on so many tokens."""
        if self.schedule.unit == "steps":
            return self.schedule.rate(self.step, self.step + 1)
        return self.schedule.rate(self.progress.consumed_tokens, tokens)

    def _hand_out(self, keep: int) -> None:
        while len(self._unsettled) > keep:
            info = self._unsettled.pop(0)
            numbers = info.result.read()
            for callback in self.callbacks:
                callback.on_numbers(self, info, numbers)

    def _flags(self) -> list[int]:
        return [self.supervisor.stop_requested(), self.busy()]

    def _learn(self, flags: list[int]) -> None:
        self.stop_signal, self.any_busy = self.stop_signal or flags[0], bool(flags[1])


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Make dropout a function of (seed, step, rank): a resumed run draws what an uninterrupted one would have drawn."""
    digest = hashlib.blake2b(f"dropout {seed} {step} {rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little"))
