"""Stage `exact`: which documents repeat an earlier one, by the 128-bit hash of their text.

Writes first.bin: for each document, in the order of ids, the number of the first with the same text (int64), its own
where it is the first, and -1 for documents that cleaning removed. Holds 16 bytes a document in memory, and sorts them.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megagpt.corpus.extract import document_field
from megagpt.corpus.hashing import UInt64
from megagpt.corpus.workspace import Receipt, write_array

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ExactTask:
    """All documents of the corpus."""

    chunks: list[Path]
    """Results of the stage `extract`."""

    def __str__(self) -> str:
        return "all documents"

    def run(self, folder: Path) -> Receipt:
        """See the module; counts duplicates."""
        first = first_occurrences(document_field(self.chunks, "hash_low"), document_field(self.chunks, "hash_high"))
        first[document_field(self.chunks, "removed")] = -1
        write_array(folder / "first.bin", first)
        return {"duplicates": int(np.count_nonzero((first >= 0) & (first != np.arange(first.size))))}


def first_occurrences(low: UInt64, high: UInt64) -> Int64:
    """For each 128-bit hash, given in halves (documents), the index of the first equal one."""
    order = np.lexsort((low, high))  # stable: equal hashes stay in the order of their indices
    low, high = low[order], high[order]
    differs = np.ones(order.size, bool)
    differs[1:] = (low[1:] != low[:-1]) | (high[1:] != high[:-1])
    first = np.empty(order.size, np.int64)
    first[order] = order[differs][np.cumsum(differs) - 1]
    return first
