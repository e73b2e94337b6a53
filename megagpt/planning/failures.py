"""Failures to expect, how often to save against them, and the share of time that remains for training.

Nodes fail independently at a constant rate, so a job of n nodes runs MTBF / n between failures on average. The interval
between checkpoints is Young's (1974, CACM 17) optimum with Daly's (2006, FGCS 22) correction; the goodput is Daly's
complete model, which counts failures during checkpoints and restarts. A checkpoint that is written while training goes
on costs its stall only, but what is trained while it is written is lost with it.
"""

import math
from dataclasses import dataclass

NODE_MTBF_HOURS = 6300.0
"""Llama 3 405B: 419 unexpected interruptions in 54 days on 2,048 nodes of 8 GPUs (Grattafiori et al. 2024, section
3.3.4): 2048 x 54 x 24 / 419 hours a node."""
MAX_OVERHEAD = 700.0
"""Of (interval + checkpoint) / MTBF, beyond which no run comes to an end (e to that power is no number)."""


@dataclass(frozen=True)
class Reliability:
    """What failures do to a run."""

    mtbf_seconds: float
    """Between failures of the whole job."""
    interval_seconds: float
    """Best time of training between two checkpoints."""
    goodput: float
    """Share of the time that trains: 1 without failures and checkpoints."""

    def failures(self, training_seconds: float) -> float:
        """To expect until `training_seconds` of training are done."""
        return training_seconds / self.goodput / self.mtbf_seconds if self.goodput else math.inf


def reliability(
    nodes: int, node_mtbf_seconds: float, stall_seconds: float, write_seconds: float, restart_seconds: float
) -> Reliability:
    """Of a job on `nodes`. stall, write: of a checkpoint; restart: from a failure until training goes on."""
    mtbf = node_mtbf_seconds / nodes
    # A new checkpoint cannot begin before the last one is written.
    interval = max(best_interval(stall_seconds, mtbf), write_seconds)
    lost = max(0.0, write_seconds - stall_seconds)
    return Reliability(mtbf, interval, goodput(interval, stall_seconds, restart_seconds + lost, mtbf))


def best_interval(cost: float, mtbf: float) -> float:
    """Seconds of training between checkpoints that cost `cost` seconds each (Daly 2006, equation 37)."""
    if cost >= 2 * mtbf:
        return mtbf
    ratio = cost / (2 * mtbf)
    return math.sqrt(2 * cost * mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost


def goodput(interval: float, cost: float, restart: float, mtbf: float) -> float:
    """Share of time that trains, with a checkpoint of `cost` seconds after each `interval` (Daly 2006, equation 20)."""
    segment = (interval + cost) / mtbf
    if segment + restart / mtbf > MAX_OVERHEAD:
        return 0.0
    return interval / (mtbf * math.exp(restart / mtbf) * math.expm1(segment))
