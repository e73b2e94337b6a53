"""How much of a document its repeated runs of words cover, in numpy.

`runs` has one value for each run of `words` words, equal for equal runs; `word_lengths` has the characters of each
word. Shares are of the characters of all words; a word that several runs cover counts once.
"""

import numpy as np
import numpy.typing as npt

from megagpt.corpus.hashing import UInt64

Int64 = npt.NDArray[np.int64]


def most_frequent(runs: UInt64) -> tuple[UInt64, int]:
    """The runs that occur most often, and how often; none, and 0, if no run occurs twice."""
    ordered = np.sort(runs)
    changes = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
    counts = np.diff(changes, prepend=0, append=ordered.size)
    count = int(counts.max())
    if count < 2:
        return np.empty(0, np.uint64), 0
    return ordered[np.concatenate(([0], changes))[counts == count]], count


def top_share(runs: UInt64, frequent: UInt64, word_lengths: Int64, words: int) -> float:
    """The share that one of the `frequent` runs covers: that with most characters, of these the first in the text."""
    places = np.flatnonzero(np.isin(runs, frequent))
    ends = np.cumsum(word_lengths)
    run_lengths = ends[places + words - 1] - ends[places] + word_lengths[places]
    return covered_share(runs == runs[places[np.argmax(run_lengths)]], word_lengths, words)


def repeated_share(runs: UInt64, word_lengths: Int64, words: int) -> float:
    """The share that those runs cover which occurred earlier."""
    order = np.argsort(runs, kind="stable")
    ordered = runs[order]
    again = order[1:][ordered[1:] == ordered[:-1]]
    if not again.size:
        return 0.0
    is_repeated = np.zeros(runs.size, bool)
    is_repeated[again] = True
    return covered_share(is_repeated, word_lengths, words)


def covered_share(is_chosen: npt.NDArray[np.bool_], word_lengths: Int64, words: int) -> float:
    """The share that the chosen runs cover."""
    is_covered = np.zeros(word_lengths.size, bool)
    for place in range(words):
        is_covered[place : place + is_chosen.size] |= is_chosen
    return int(word_lengths[is_covered].sum()) / int(word_lengths.sum())
