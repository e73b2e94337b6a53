"""Which split a document belongs to: a draw from the hash of its text, against the shares of the splits.

A document stays in its split when the corpus grows, and copies are never on both sides.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from megagpt.corpus.hashing import UInt64, mix64


def draws(hashes: UInt64, seed: int) -> UInt64:
    """A number for each document, by its hash, that looks random: (documents)."""
    return mix64(hashes ^ mix64([seed]))


def nominal_bounds(shares: Mapping[str, float]) -> list[int]:
    """The end of each split's draws, given its share, 0 to 1; what is beyond all of them is for training."""
    totals = itertools.accumulate(map(Fraction, shares.values()))
    return [min(int(total * 2**64), 2**64 - 1) for total in totals]


def split_of(drawn: UInt64, bounds: Sequence[int]) -> npt.NDArray[np.uint8]:
    """The number of each document's split: 0 for training, then 1 for the first of `bounds`, and so on."""
    place = np.searchsorted(np.array(bounds, np.uint64), drawn, side="right")
    return ((place + 1) % (len(bounds) + 1)).astype(np.uint8)


def settled_bounds(bounds: Sequence[int], counts: Sequence[int], drawn: Callable[[], Iterable[UInt64]]) -> list[int]:
    """The bounds, moved so that no split is empty, as far as there are documents enough; training comes first.

    `counts` are the documents by number of split for `bounds` as they are; `drawn` gives all draws, block by block.
    """
    settled = list(bounds)
    if all(counts) or not bounds:
        return settled
    for index in range(len(settled)):
        low = settled[index - 1] if index else 0
        smallest = _extreme(min, (block[block >= np.uint64(low)] for block in drawn()))
        if smallest is not None and smallest >= settled[index]:
            settled[index:] = [max(bound, smallest + 1) for bound in settled[index:]]
    largest = _extreme(max, drawn())
    if largest is not None and largest < settled[-1]:
        settled = [min(bound, largest) for bound in settled]
    return settled


def _extreme(choose: Callable[[Iterable[int]], int], blocks: Iterable[UInt64]) -> int | None:
    chosen = [choose((int(block.min()), int(block.max()))) for block in blocks if block.size]
    return choose(chosen) if chosen else None
