"""The batch triple: global batch = micro-batch x gradient accumulation steps x ranks, all in sequences.

The global batch belongs to the experiment and never changes with the machine; the ranks only divide it.
"""

from collections.abc import Iterable

from megagpt.errors import ConfigError


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


def nearest_divisors(number: int, wanted: int, count: int = 8) -> list[int]:
    """At most `count` divisors of `number`, those nearest to `wanted`, in ascending order."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    divisors = {*small, *(number // d for d in small)}
    return sorted(sorted(divisors, key=lambda d: (abs(d - wanted), d))[:count])


def join_choices(choices: Iterable[object]) -> str:
    """The choices as English: "1, 2 or 4"."""
    *others, last = [str(choice) for choice in choices]
    return f"{', '.join(others)} or {last}" if others else last
