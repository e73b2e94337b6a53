"""The batch triple: global batch = micro-batch x gradient accumulation steps x ranks, all in sequences.

The global batch belongs to the experiment and never changes with the machine; the ranks only divide it. With a ramp-up
it grows in equal stages, as a function of the sequences consumed so far (as Megatron-LM's --rampup-batch-size).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from megagpt.errors import ConfigError


@dataclass(frozen=True)
class BatchSizes:
    """Sequences of every step of a run: `start`, `start + increment`, ... `final`, by the sequences consumed so far.

    The stages below `final` are equally long and end after `samples` sequences; without any, `final` is the only size.
    """

    final: int
    start: int = 0
    increment: int = 0
    samples: int = 0

    def sizes(self) -> list[int]:
        """All sizes, ascending."""
        return [*range(self.start, self.final, self.increment), self.final] if self.samples else [self.final]

    def at(self, consumed: int) -> int:
        """Sequences of the step that begins after `consumed` sequences."""
        if consumed >= self.samples:
            return self.final
        sizes = self.sizes()
        return sizes[consumed * (len(sizes) - 1) // self.samples]

    def after_steps(self, steps: int, consumed: int = 0) -> int:
        """Sequences consumed when `steps` more steps have followed the first `consumed` sequences."""
        return self._walk(consumed, steps, math.inf)[1]

    def steps_for(self, sequences: int, consumed: int = 0) -> int:
        """The fewest steps that consume at least this many sequences after the first `consumed` ones."""
        return self._walk(consumed, math.inf, consumed + sequences)[0]

    def _walk(self, consumed: int, max_steps: float, max_sequences: float) -> tuple[int, int]:
        """Steps and sequences until one of the limits is reached, a stage at a time."""
        steps = 0
        while steps < max_steps and consumed < max_sequences:
            size, count = self.at(consumed), max_steps - steps
            if consumed < self.samples:
                stages = len(self.sizes()) - 1
                stage = consumed * stages // self.samples
                end = -(-(stage + 1) * self.samples // stages)  # where `at` goes on to the next size
                count = min(count, -(-(end - consumed) // size))
            if max_sequences < math.inf:
                count = min(count, -(-(max_sequences - consumed) // size))
            steps, consumed = steps + int(count), consumed + int(count) * size
        return steps, consumed


def check_batch(global_batch_size: int, micro_batch_size: int | None, world_size: int) -> tuple[int, int]:
    """Divide a step's sequences among the ranks.

    `world_size` counts the ranks that see different data. Returns (micro_batch_size, gradient_accumulation_steps);
    without a micro-batch size each rank takes its whole share at once. Raises ConfigError, with the sizes that would
    do, if the division leaves a rest.
    """
    if global_batch_size % world_size:
        raise ConfigError(
            f"train.global_batch_size: {global_batch_size} sequences cannot be divided among {world_size} ranks; "
            f"start {join_choices(nearest_divisors(global_batch_size, world_size))} ranks, "
            f"or choose a multiple of {world_size} as global batch size"
        )
    share = global_batch_size // world_size
    micro_batch_size = micro_batch_size or share
    if share % micro_batch_size:
        raise ConfigError(
            f"train.micro_batch_size: {micro_batch_size} does not divide a rank's share of {share} sequences "
            f"({global_batch_size} among {world_size} ranks); "
            f"choose {join_choices(nearest_divisors(share, micro_batch_size))}"
        )
    return micro_batch_size, share // micro_batch_size


def check_batches(batches: BatchSizes, micro_batch_size: int | None, world_size: int) -> tuple[int, int]:
    """As `check_batch` for every size of a ramp-up; without a micro-batch size it is the largest that fits all."""
    for size in batches.sizes()[:-1]:
        unit = world_size * (micro_batch_size or 1)
        if size % unit:
            raise ConfigError(
                f"train.rampup_start, train.rampup_increment: a step of the ramp-up has {size} sequences, which "
                f"{world_size} ranks x {micro_batch_size or 1} a micro-batch cannot divide; choose multiples of {unit}"
            )
    if micro_batch_size is None and len(batches.sizes()) > 1 and batches.final % world_size == 0:
        micro_batch_size = math.gcd(*batches.sizes()) // world_size
    return check_batch(batches.final, micro_batch_size, world_size)


def nearest_divisors(number: int, wanted: int, count: int = 8) -> list[int]:
    """At most `count` divisors of `number`, those nearest to `wanted`, in ascending order."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    divisors = {*small, *(number // d for d in small)}
    return sorted(sorted(divisors, key=lambda d: (abs(d - wanted), d))[:count])


def join_choices(choices: Iterable[object]) -> str:
    """The choices as English: "1, 2 or 4"."""
    *others, last = [str(choice) for choice in choices]
    return f"{', '.join(others)} or {last}" if others else last
