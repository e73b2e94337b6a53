"""The exact Jaccard similarity of documents' shingle sets, from their texts.

Shingles are compared by their 32-bit hashes, of which two different ones are equal with a probability of 2^-32. Costs
a second pass over the texts of all candidates; a bounded cache keeps the sets of documents that come again.
"""

from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from megagpt.corpus.config import DedupConfig
from megagpt.corpus.documents import Documents, Numbers
from megagpt.corpus.hashing import collapse_whitespace, shingle_hashes

_CACHE_BYTES = 1 << 27

Similarity = Callable[[npt.NDArray[np.int64], npt.NDArray[np.int64]], npt.NDArray[np.float64]]


def exact_similarity(documents: Documents, numbers: Numbers, dedup: DedupConfig) -> Similarity:
    """A function that gives the similarity, 0 to 1, of pairs of places in `numbers`: (pairs), (pairs) -> (pairs)."""
    sets = _ShingleSets(documents, numbers, dedup)

    def similarity(left: npt.NDArray[np.int64], right: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        pairs = zip(left.tolist(), right.tolist(), strict=True)
        return np.array([jaccard(sets.of(a), sets.of(b)) for a, b in pairs], np.float64)

    return similarity


def jaccard(left: npt.NDArray[np.uint32], right: npt.NDArray[np.uint32]) -> float:
    """The similarity of two sets given by their sorted elements, not both empty."""
    both = np.intersect1d(left, right, assume_unique=True).size
    return both / (left.size + right.size - both)


class _ShingleSets:
    """The sorted shingle hashes of documents, read when needed, the last used ones kept."""

    def __init__(self, documents: Documents, numbers: Numbers, dedup: DedupConfig) -> None:
        self._documents, self._numbers, self._dedup = documents, numbers, dedup
        self._sets: OrderedDict[int, npt.NDArray[np.uint32]] = OrderedDict()
        self._bytes = 0

    def of(self, place: int) -> npt.NDArray[np.uint32]:
        """Of the document at a place in the numbers."""
        if place in self._sets:
            self._sets.move_to_end(place)
            return self._sets[place]
        words = collapse_whitespace(self._documents.text(int(self._numbers[place])))
        hashes = np.unique(shingle_hashes(words, self._dedup.shingle_size, self._dedup.shingle_unit))
        self._sets[place] = hashes
        self._bytes += hashes.nbytes
        while self._bytes > _CACHE_BYTES and len(self._sets) > 1:
            self._bytes -= self._sets.popitem(last=False)[1].nbytes
        return hashes
