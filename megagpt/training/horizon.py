"""How far a run goes, seen from where it is: batch size and sequence length may have changed on the way."""

from typing import NamedTuple, Protocol

from megagpt.config.schema import RunConfig


class Position(Protocol):
    """Where a run is; `Progress` and `CheckpointManifest` say it."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""

    @property
    def consumed_samples(self) -> int:
        """Position in the global order of samples."""

    @property
    def consumed_tokens(self) -> int:
        """Tokens that the steps were trained on."""


class Horizon(NamedTuple):
    """The length of the whole run."""

    steps: int
    tokens: int
    """As train.tokens says, or those of the steps."""


class _Beginning:
    step = consumed_samples = consumed_tokens = 0


def horizon(config: RunConfig, position: Position = _Beginning()) -> Horizon:  # noqa: B008 - it holds nothing
    """The run's steps and tokens if it goes on from `position` as `config` says."""
    batches, consumed = config.train.batches, position.consumed_samples
    if config.train.tokens is None:
        steps_left = max(0, config.train.steps - position.step)
    else:
        tokens_left = max(0, config.train.tokens - position.consumed_tokens)
        steps_left = batches.steps_for(-(-tokens_left // config.seq_len), consumed)
    samples_left = batches.after_steps(steps_left, consumed) - consumed
    tokens = config.train.tokens or position.consumed_tokens + samples_left * config.seq_len
    return Horizon(position.step + steps_left, tokens)
