"""What is done between two interruptions: steps, checkpoints, and what the next failure destroys.

A checkpoint begins after every `every_steps` steps and stalls training; it counts `write_seconds` after its beginning,
and training goes on meanwhile if the stall is shorter. A failure takes the run back to where the newest one that counts
began. Only the checkpoints near the end decide that, so a long stint is not played step by step: its first checkpoints,
those that are surely written in time, are one draw of the sum of their steps.
"""

import math
from dataclasses import dataclass

import numpy as np

from megagpt.planning.simulation.stragglers import EXACT_STEPS, SlowestNode

_SURELY = 6.0  # standard deviations


@dataclass(frozen=True)
class Saving:
    """How a run is saved."""

    every_steps: int
    stall_seconds: float
    """How long training stands still for a checkpoint."""
    write_seconds: float
    """From its beginning until it counts."""


@dataclass(frozen=True)
class Stint:
    """Where the time of a stint went; all of it together is its length."""

    steps: float
    """That are kept; a last, unfinished one counts by its part."""
    step_seconds: float
    """That these took."""
    stall_seconds: float
    """Of checkpoints among them."""
    lost_seconds: float
    """Since the checkpoint that the run goes back to."""


def play_stint(
    seconds: float,
    fails: bool,
    step_seconds: float,
    slowest: SlowestNode,
    saving: Saving,
    generator: np.random.Generator,
) -> Stint:
    """Train for `seconds`, then fail, or go on beyond what is looked at. step_seconds: of a step without stragglers."""
    every, stall, write = saving.every_steps, saving.stall_seconds, saving.write_seconds
    jumped = _sure_checkpoints(seconds, step_seconds, slowest, saving)
    skipped = min(step_seconds * float(slowest.sums(generator, jumped * every, 1)[0]), seconds - write) if jumped else 0
    begins = (
        skipped + jumped * stall + _begins(seconds - skipped - jumped * stall, step_seconds, slowest, saving, generator)
    )
    counted = int(np.searchsorted(begins + (write if fails else stall), seconds, side="right"))
    kept = jumped + counted
    trained = (begins[counted - 1] - (kept - 1) * stall) if counted else skipped
    if fails:
        return Stint(kept * every, float(trained), kept * stall, float(seconds - trained - kept * stall))
    # what was done since is no loss: whole and parts of steps, and parts of a stall
    since = seconds - trained - kept * stall
    cycle = float(begins[counted]) - trained - kept * stall
    stepping = min(since, cycle)
    return Stint(
        (kept + stepping / cycle) * every, float(trained + stepping), float(kept * stall + since - stepping), 0.0
    )


def _sure_checkpoints(seconds: float, step_seconds: float, slowest: SlowestNode, saving: Saving) -> int:
    """How many are written before the end for all that can be expected; 0 where playing every step costs little."""
    cycle = saving.every_steps * step_seconds * slowest.mean + saving.stall_seconds
    if seconds / cycle * saving.every_steps <= EXACT_STEPS:
        return 0
    # the largest n with n cycle + 6 deviations sqrt(n) + write <= seconds
    room = seconds - saving.write_seconds
    spread = _SURELY * step_seconds * slowest.deviation * math.sqrt(saving.every_steps)
    root = (math.sqrt(spread**2 + 4 * cycle * max(room, 0.0)) - spread) / (2 * cycle)
    return int(root**2)


def _begins(
    seconds: float, step_seconds: float, slowest: SlowestNode, saving: Saving, generator: np.random.Generator
) -> np.ndarray:
    """Beginnings of the checkpoints until `seconds` and at least one beyond, from 0 on."""
    cycle = saving.every_steps * step_seconds * slowest.mean + saving.stall_seconds
    stepped = np.zeros(0)
    while True:
        behind = seconds - (stepped[-1] + len(stepped) * saving.stall_seconds if len(stepped) else 0.0)
        count = max(1, math.ceil(behind / cycle) + 1)
        more = step_seconds * slowest.sums(generator, saving.every_steps, count)
        stepped = np.append(stepped, (stepped[-1] if len(stepped) else 0.0) + np.cumsum(more))
        begins = stepped + saving.stall_seconds * np.arange(len(stepped))
        if begins[-1] > seconds:
            return begins
