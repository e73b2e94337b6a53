"""Near-duplicates by MinHash LSH (Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, chapter 3).

Documents whose signatures agree in all rows of a band are candidates. Every candidate is verified against the first
document it shares a band with; those that fail try the next of the band. Verified pairs are the edges of a graph; of
each connected component the first document stays (see `clusters`), so that a removed document resembles its neighbours
in a chain that leads to the survivor, and the survivor perhaps less (single linkage). Without verification, bands
chain documents that merely share boilerplate into giant clusters.

Two stages: `keys` writes the sorted keys of every band, part by part; `bands` merges them and writes the verified
edges. Costs 4 x num_perm + 12 x bands bytes a document on disk; memory is bounded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megagpt.corpus.config import DedupConfig
from megagpt.corpus.documents import Documents, Numbers, Part
from megagpt.corpus.exact import PAIR, KeyRange
from megagpt.corpus.external import Records, Run, RunWriter, merge_runs, written_runs
from megagpt.corpus.hashing import UInt64, mix64
from megagpt.corpus.minhash import UInt32, estimated_similarity
from megagpt.corpus.verify import exact_similarity
from megagpt.corpus.workspace import Receipt, map_array, task_folder

Int64 = npt.NDArray[np.int64]
Verify = Callable[[Int64, Int64], npt.NDArray[np.bool_]]
"""Whether the documents at two places among those looked at are similar: (pairs), (pairs) -> (pairs)."""

KEY = np.dtype([("key", "<u8"), ("number", "<u4")])
"""A document's key in a band and its number within the part."""

_KEYS_NAME = "keys.bin"
_MOST_LEADERS = 16  # documents of a bucket that others are compared with: bounds the work on huge buckets
_ROW_BLOCK = 1 << 12  # signatures whose keys are computed at once, so that they stay in the processor's cache
_MEMBER_BLOCK = 1 << 16  # members of buckets whose signatures are held at once


@dataclass(frozen=True)
class KeysTask:
    """The keys of one part: keys.bin, for each band in turn a KEY of every document but exact duplicates, sorted."""

    part: Part
    exact: list[Path]
    """Results of the stage `exact`."""
    dedup: DedupConfig

    def __str__(self) -> str:
        return str(self.part)

    def run(self, folder: Path) -> Receipt:
        """See the class; counts documents."""
        bands, rows = self.dedup.banding
        numbers = np.flatnonzero(~is_duplicate(self.part, self.exact)).astype(np.uint32)
        signatures = map_array(self.part.folder / "signatures.bin", np.uint32, self.dedup.num_perm)
        keys = np.empty((bands, numbers.size), np.uint64)
        for start in range(0, numbers.size, _ROW_BLOCK):
            block = np.ascontiguousarray(signatures[numbers[start : start + _ROW_BLOCK], : bands * rows].T)
            for band in range(bands):
                keys[band, start : start + _ROW_BLOCK] = band_keys(block[band * rows : (band + 1) * rows])
        with open(folder / _KEYS_NAME, "wb") as file:
            for band in range(bands):
                records = np.empty(numbers.size, KEY)
                order = np.argsort(keys[band], kind="stable")
                records["key"], records["number"] = keys[band][order], numbers[order]
                file.write(records.data)
        return {"documents": numbers.size}


def is_duplicate(part: Part, exact: Sequence[Path]) -> npt.NDArray[np.bool_]:
    """Which documents of the part repeat an earlier one (documents), by the results of the stage `exact`."""
    result = np.zeros(part.count, bool)
    result[part_pairs(part, exact)["member"].astype(np.int64) - part.first] = True
    return result


def part_pairs(part: Part, folders: Sequence[Path]) -> Records:
    """The PAIRs in the runs `pairs` of some folders whose member is in the part."""
    found = [np.empty(0, PAIR)]
    for folder in folders:
        for run in written_runs(folder, "pairs", PAIR):
            inside = run.between("member", part.first, part.stop)
            found.append(inside.read(0, len(inside)))
    return np.concatenate(found)


def band_keys(values: UInt32) -> UInt64:
    """A 64-bit hash of each signature's values in one band (rows, documents): (documents); equal values, equal keys.

    A sum of products with random factors (Carter and Wegman's universal hashing), made uniform over all bits.
    """
    keys = np.zeros(values.shape[1], np.uint64)
    for row, factor in zip(values, _factors(len(values)), strict=True):
        keys += row * factor
    return mix64(keys)


def _factors(count: int) -> UInt64:
    return mix64(np.arange(1, count + 1)) | np.uint64(1)


@dataclass(frozen=True)
class BandTask:
    """The verified edges among the documents with keys of one band in one range: the runs `pairs`, a PAIR each."""

    documents: Documents
    keys: Path
    """Folder of the stage `keys`."""
    band: int
    range: KeyRange
    dedup: DedupConfig

    def __str__(self) -> str:
        return f"band {self.band}, keys {self.range.index + 1}/{self.range.count}"

    def run(self, folder: Path) -> Receipt:
        """See the class; counts candidates, edges, and each document as its share of the bands."""
        runs = []
        for part in self.documents.parts:
            keys = Run.of(task_folder(self.keys, part.number) / _KEYS_NAME, KEY, part.first)
            count = len(keys) // self.dedup.banding[0]
            run = replace(keys, start=self.band * count, stop=(self.band + 1) * count)
            runs.append(run.between("key", self.range.low, self.range.high))
        edges = 0
        stars = Stars(self._similar)
        with RunWriter(folder, "pairs", PAIR) as writer:
            for block in merge_runs(runs, ("key", "number"), numbered=True):
                for start in range(0, block.size, _MEMBER_BLOCK):
                    found = stars.edges(block["key"][start:][:_MEMBER_BLOCK], block["number"][start:][:_MEMBER_BLOCK])
                    writer.add(found)
                    edges += found.size
        documents = sum(map(len, runs)) / self.dedup.banding[0]
        return {"documents": documents, "candidates": stars.candidates, "edges": edges}

    def _similar(self, numbers: Numbers) -> Verify:
        """The way to verify pairs of some documents."""
        if self.dedup.verification == "none":
            return lambda left, right: np.ones(left.size, bool)
        if self.dedup.verification == "exact":
            exact = exact_similarity(self.documents, numbers, self.dedup)
            return lambda left, right: exact(left, right) >= self.dedup.threshold
        signatures = self.documents.gather("signatures.bin", np.uint32, numbers, self.dedup.num_perm)
        return lambda left, right: estimated_similarity(signatures, left, right) >= self.dedup.threshold


class Stars:
    """Edges from the first documents of each bucket of equal keys to the others, given block by block.

    A document is compared with the leaders of its bucket in turn, the first of which is the bucket's first document,
    until one is similar; if none is, it becomes a leader itself, as long as there are fewer than 16.
    """

    def __init__(self, similar: Callable[[Numbers], Verify]) -> None:
        self.candidates = 0
        """Pairs that were compared."""
        self._similar = similar
        self._last_key: np.uint64 | None = None
        self._last_leaders = np.empty(0, np.uint64)

    def edges(self, keys: UInt64, numbers: Numbers) -> Records:
        """The edges (PAIR) that the next documents add; keys and, within a bucket, numbers ascend."""
        if not keys.size:
            return np.empty(0, PAIR)
        old = self._last_leaders.size
        if self._last_key == keys[0]:  # the bucket goes on: its leaders come first again, and fail again to pair up
            keys = np.concatenate([np.full(old, keys[0], np.uint64), keys])
            numbers = np.concatenate([self._last_leaders, numbers])
            self.candidates -= old * (old - 1) // 2  # which were counted when they failed first
        new = _is_new(keys)
        shared = ~(new & np.append(new[1:], True))
        last_key = keys[-1]
        last_leaders = [] if shared[-1] else [numbers[-1:]]
        members, buckets, numbers = np.arange(np.count_nonzero(shared)), keys[shared], numbers[shared]
        found = [np.empty(0, PAIR)]
        verify = self._similar(numbers)
        for _ in range(_MOST_LEADERS):
            leads = _is_new(buckets)
            if buckets.size and buckets[-1] == last_key:
                last_leaders.append(numbers[members[leads][-1:]])
            leaders = members[leads][np.cumsum(leads) - 1][~leads]
            members, buckets = members[~leads], buckets[~leads]
            if not members.size:
                break
            self.candidates += members.size
            similar = verify(leaders, members)
            pairs = np.empty(np.count_nonzero(similar), PAIR)
            pairs["member"], pairs["leader"] = numbers[members[similar]], numbers[leaders[similar]]
            found.append(pairs)
            members, buckets = members[~similar], buckets[~similar]
        self._last_key, self._last_leaders = last_key, np.concatenate(last_leaders)
        return np.concatenate(found)


def _is_new(values: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Whether each value differs from the one before it."""
    new = np.ones(values.size, bool)
    new[1:] = values[1:] != values[:-1]
    return new
