"""Which dataset each sample of a weighted blend comes from.

A block of B samples holds a whole number of samples of each dataset and is repeated for ever. Within it the samples are
placed by the earliest deadline (the "chairman assignment" of Tijdeman 1980; P-fair scheduling, Baruah et al. 1996):
after any n samples, dataset d has been drawn n x share(d) times with an error below 1. A lookup is O(1); the block
costs O(B log datasets) once.
"""

import heapq
from collections.abc import Sequence
from fractions import Fraction
from math import lcm

import numpy as np
import numpy.typing as npt

MAX_BLOCK = 1 << 18
"""Longest block; weights that need a longer one to be exact are rounded to whole samples of it."""

Int64Array = npt.NDArray[np.int64]


class Blend:
    """The sequence of datasets of a weighted blend.

    quotas: samples of each dataset a block, (datasets); their shares of `block` are the weights' shares, exactly where
    a block of at most MAX_BLOCK samples allows it (0.7 and 0.3: 7 and 3 of 10), else rounded, but never to 0.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """A blend of datasets with these positive weights, of any sum."""
        self.quotas = _quotas(weights)
        self.block = int(self.quotas.sum())
        self._schedule = _schedule(self.quotas)
        by_dataset = np.argsort(self._schedule, kind="stable")
        before = np.cumsum(self.quotas) - self.quotas
        self._number_in_block = np.empty(self.block, np.int64)
        self._number_in_block[by_dataset] = np.arange(self.block) - np.repeat(before, self.quotas)

    def lookup(self, samples: npt.ArrayLike) -> tuple[Int64Array, Int64Array]:
        """Dataset of each sample of the blend, and the sample's number within that dataset: both (count)."""
        blocks, positions = np.divmod(np.asarray(samples, np.int64), self.block)
        datasets = self._schedule[positions]
        return datasets, blocks * self.quotas[datasets] + self._number_in_block[positions]

    def counts(self, samples: int) -> Int64Array:
        """How many of the first `samples` samples come from each dataset: (datasets)."""
        blocks, rest = divmod(samples, self.block)
        return blocks * self.quotas + np.bincount(self._schedule[:rest], minlength=self.quotas.size)


def _quotas(weights: Sequence[float]) -> Int64Array:
    """Samples of each dataset in the shortest block that fits the weights, or in one of about MAX_BLOCK samples."""
    exact = [Fraction(str(weight)) for weight in weights]  # 0.1 means a tenth, not the binary fraction beside it
    total = sum(exact)
    shares = [weight / total for weight in exact]
    block = lcm(*(share.denominator for share in shares))
    if block <= MAX_BLOCK:
        return np.array([int(share * block) for share in shares], np.int64)
    ideal = np.array([float(share) * MAX_BLOCK for share in shares])
    quotas = np.floor(ideal).astype(np.int64)
    by_remainder = np.argsort(quotas - ideal, kind="stable")
    quotas[by_remainder[: MAX_BLOCK - quotas.sum()]] += 1
    return np.maximum(quotas, 1)


def _schedule(quotas: Int64Array) -> Int64Array:
    """Dataset of each sample of a block: (block).

    Draw j of a dataset with quota q may come no earlier than floor(j x block / q) and no later than
    ceil((j + 1) x block / q) - 1: within these bounds its count is off by less than 1 after every sample. The earliest
    deadline first meets all bounds.
    """
    block = int(quotas.sum())
    datasets = np.repeat(np.arange(quotas.size), quotas)
    draws = np.arange(block) - np.repeat(np.cumsum(quotas) - quotas, quotas)
    releases = draws * block // quotas[datasets]
    deadlines = -(-(draws + 1) * block // quotas[datasets])
    by_release = np.argsort(releases, kind="stable")
    waiting = list(zip(deadlines[by_release].tolist(), datasets[by_release].tolist(), strict=True))
    released = np.searchsorted(releases[by_release], np.arange(block), side="right").tolist()
    ready: list[tuple[int, int]] = []
    schedule, pushed = np.empty(block, np.int64), 0
    for position, count in enumerate(released):
        for draw in waiting[pushed:count]:
            heapq.heappush(ready, draw)
        pushed = count
        schedule[position] = heapq.heappop(ready)[1]
    return schedule
