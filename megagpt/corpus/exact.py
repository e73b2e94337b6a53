"""Stage `exact`: which documents repeat an earlier one, by the 128-bit hash of their text.

A task takes a range of hashes from the sorted hashes of all parts, and writes the runs `pairs`: for every document
that is not the first of its text a PAIR with that first one. Memory is bounded; the hashes take 20 bytes a document on
disk, the pairs 16 for each repeat.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megagpt.corpus.documents import Documents
from megagpt.corpus.external import Run, RunWriter, merge_runs
from megagpt.corpus.extract import HASHED
from megagpt.corpus.workspace import Receipt

PAIR = np.dtype([("member", "<u8"), ("leader", "<u8")])
"""Numbers of two similar documents, the larger first."""


@dataclass(frozen=True)
class KeyRange:
    """The keys of 64 bits that one of several tasks works on."""

    index: int
    count: int

    @property
    def low(self) -> int:
        """The smallest."""
        return (self.index << 64) // self.count

    @property
    def high(self) -> int | None:
        """The first after the largest; None: there is none."""
        return (self.index + 1 << 64) // self.count if self.index + 1 < self.count else None

    @classmethod
    def split(cls, documents: int, documents_a_task: int = 1 << 21) -> "list[KeyRange]":
        """Ranges for about so many documents a task."""
        count = max(1, -(-documents // documents_a_task))
        return [cls(index, count) for index in range(count)]


@dataclass(frozen=True)
class ExactTask:
    """The documents with hashes in one range."""

    documents: Documents
    keys: KeyRange

    def __str__(self) -> str:
        return f"hashes {self.keys.index + 1}/{self.keys.count}"

    def run(self, folder: Path) -> Receipt:
        """See the module; counts documents and duplicates."""
        runs = [Run.of(part.folder / "hashes.bin", HASHED, part.first) for part in self.documents.parts]
        runs = [run.between("high", self.keys.low, self.keys.high) for run in runs]
        duplicates = 0
        last = None  # the first document of the text that the block before ended with
        with RunWriter(folder, "pairs", PAIR) as writer:
            for block in merge_runs(runs, ("high", "low", "number"), numbered=True):
                if last is not None:
                    block = np.concatenate([last, block])
                is_first = np.ones(block.size, bool)
                is_first[1:] = (block["high"][1:] != block["high"][:-1]) | (block["low"][1:] != block["low"][:-1])
                first = np.flatnonzero(is_first)[np.cumsum(is_first) - 1]
                pairs = np.empty(np.count_nonzero(~is_first), PAIR)
                pairs["member"] = block["number"][~is_first]
                pairs["leader"] = block["number"][first[~is_first]]
                writer.add(pairs)
                duplicates += pairs.size
                last = block[first[-1:]]
        return {"documents": sum(map(len, runs)), "duplicates": duplicates}
