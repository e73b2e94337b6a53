"""The last step: one dataset from the tokens of all chunks, in the order of their documents' keys.

An external merge: the order of all documents is cut into blocks; a block's documents are next to each other in every
chunk's file, which is thus read from its beginning to its end. Memory: 40 bytes a document and a few times the tokens
of a block.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megagpt.corpus.tokenize import TOKENIZED
from megagpt.corpus.workspace import map_array
from megagpt.data.indexed import IndexedDatasetWriter
from megagpt.data.manifest import SplitInfo

_BLOCK_TOKENS = 1 << 25


def write_split(
    prefix: Path, split: int, chunks: Sequence[Path], dtype: np.dtype[Any], block_tokens: int = _BLOCK_TOKENS
) -> SplitInfo | None:
    """Write the documents of one split as the dataset `prefix`, unless it has none.

    `chunks` are results of the stage `tokenize`.
    """
    parts = [_ChunkTokens(chunk, split, dtype) for chunk in chunks]
    keys = np.concatenate([part.keys for part in parts])
    if not keys.size:
        return None
    lengths = np.concatenate([part.lengths for part in parts])
    order = np.argsort(keys, kind="stable")
    ends = np.cumsum(lengths[order])
    blocks = (ends - lengths[order]) // block_tokens  # number of the block in which each document begins
    rank = np.empty(order.size, np.int64)
    rank[order] = np.arange(order.size)
    ranks = np.split(rank, np.cumsum([part.keys.size for part in parts])[:-1])
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for start, stop in _runs(blocks):
            texts: list[npt.NDArray[Any]] = []
            positions = []
            for part, part_ranks in zip(parts, ranks, strict=True):
                low, high = np.searchsorted(part_ranks, [start, stop])
                texts += part.documents(low, high)
                positions.append(part_ranks[low:high])
            arranged = np.argsort(np.concatenate(positions))
            writer.add_documents(np.concatenate([texts[i] for i in arranged]), lengths[order[start:stop]])
    return SplitInfo(documents=writer.num_documents, sequences=writer.num_sequences, tokens=writer.num_tokens)


class _ChunkTokens:
    """One chunk's documents of one split, in the order of their keys."""

    def __init__(self, chunk: Path, split: int, dtype: np.dtype[Any]) -> None:
        index = map_array(chunk / "index.bin", TOKENIZED)
        low, high = np.searchsorted(index["split"], [split, split + 1])
        self._path = chunk / "tokens.bin"
        self._dtype = dtype
        self.keys = index["key"][low:high].copy()
        self.lengths = index["tokens"][low:high].astype(np.int64)
        self._begins = int(index["tokens"][:low].sum()) + np.append(0, np.cumsum(self.lengths))

    def documents(self, low: int, high: int) -> list[npt.NDArray[Any]]:
        """The tokens of documents `low` to `high`, read at once."""
        if low == high:
            return []
        begins = self._begins[low : high + 1]
        count, offset = int(begins[-1] - begins[0]), int(begins[0]) * self._dtype.itemsize
        tokens = np.fromfile(self._path, self._dtype, count, offset=offset)
        return np.split(tokens, begins[1:-1] - begins[0])


def _runs(values: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """Begin and end of each run of equal values."""
    begins = np.flatnonzero(np.diff(values, prepend=-1)).tolist()
    return list(zip(begins, [*begins[1:], values.size], strict=True))
