"""Near-duplicates by MinHash LSH (Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, chapter 3).

Documents whose signatures agree in all rows of a band are candidates. Every candidate is verified against the first
document it shares a band with by the estimate from the whole signatures; those that fail try the next of the band.
Verified pairs are the edges of a graph; of each connected component the first document stays, so that a removed
document resembles its neighbours in a chain that leads to the survivor, and the survivor perhaps less (single linkage).

Three stages: `signatures` brings together what is left after exact deduplication, `bands` finds edges, one task a
band, and `clusters` joins them. Costs 4 x num_perm + 8 x bands bytes a document on disk, 16 + what the edges take in
memory. Without verification, bands chain documents that merely share boilerplate into giant clusters.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from megagpt.corpus.config import DedupConfig
from megagpt.corpus.exact import Int64
from megagpt.corpus.hashing import UInt64, mix64
from megagpt.corpus.minhash import UInt32, estimated_similarity
from megagpt.corpus.workspace import Receipt, map_array, write_array

_MOST_LEADERS = 16  # documents of a bucket that others are compared with: bounds the work on huge buckets
_ROW_BLOCK = 1 << 16

Verify = Callable[[Int64, Int64], "np.typing.NDArray[np.bool_]"]


@dataclass(frozen=True)
class SignaturesTask:
    """Collect the documents that are still there: numbers.bin (int64 each), signatures.bin, and band_00.bin with the
    band's keys (uint64 each) for every band."""

    chunks: list[Path]
    """Results of the stage `extract`."""
    exact: Path
    """Result of the stage `exact`."""
    dedup: DedupConfig

    def __str__(self) -> str:
        return "all documents"

    def run(self, folder: Path) -> Receipt:
        """See the class; counts documents."""
        first = map_array(self.exact / "first.bin", np.int64)
        numbers = np.flatnonzero(first == np.arange(first.size))
        write_array(folder / "numbers.bin", numbers)
        begin = 0
        with contextlib.ExitStack() as stack:
            signatures = stack.enter_context(open(folder / "signatures.bin", "wb"))
            count, width = self.dedup.banding
            bands = [stack.enter_context(open(_band_path(folder, band), "wb")) for band in range(count)]
            for chunk in self.chunks:
                rows = map_array(chunk / "signatures.bin", np.uint32, self.dedup.num_perm)
                kept = numbers[slice(*np.searchsorted(numbers, [begin, begin + len(rows)]))] - begin
                for start in range(0, kept.size, _ROW_BLOCK):
                    block = rows[kept[start : start + _ROW_BLOCK]]
                    signatures.write(block.data)
                    for band, file in enumerate(bands):
                        file.write(band_keys(block, band, width).data)
                begin += len(rows)
        return {"documents": numbers.size}


@dataclass(frozen=True)
class BandTask:
    """The verified edges of one band: edges.bin, pairs of int64 row numbers, the smaller first."""

    signatures: Path
    """Result of the stage `signatures`."""
    band: int
    dedup: DedupConfig

    def __str__(self) -> str:
        return f"band {self.band}"

    def run(self, folder: Path) -> Receipt:
        """See the class; counts candidates and edges."""
        signatures = map_array(self.signatures / "signatures.bin", np.uint32, self.dedup.num_perm)
        candidates = 0

        def verify(left: Int64, right: Int64) -> "np.typing.NDArray[np.bool_]":
            nonlocal candidates
            candidates += left.size
            return estimated_similarity(signatures, left, right) >= self.dedup.threshold

        edges = star_edges(map_array(_band_path(self.signatures, self.band), np.uint64), verify)
        write_array(folder / "edges.bin", edges)
        return {"candidates": candidates, "edges": len(edges)}


@dataclass(frozen=True)
class ClustersTask:
    """The survivor of each document's cluster: survivors.bin (int64 row numbers), and similarity.bin, the estimated
    similarity to it (float32)."""

    signatures: Path
    """Result of the stage `signatures`."""
    bands: list[Path]
    """Results of the stage `bands`."""
    dedup: DedupConfig

    def __str__(self) -> str:
        return "all documents"

    def run(self, folder: Path) -> Receipt:
        """See the class; counts duplicates and clusters of more than one document."""
        signatures = map_array(self.signatures / "signatures.bin", np.uint32, self.dedup.num_perm)
        edges = np.concatenate([map_array(band / "edges.bin", np.int64, 2) for band in self.bands])
        survivors = component_minima(len(signatures), edges)
        rows = np.arange(survivors.size)
        duplicates = np.flatnonzero(survivors != rows)
        similarity = np.ones(survivors.size, np.float32)
        similarity[duplicates] = estimated_similarity(signatures, duplicates, survivors[duplicates])
        write_array(folder / "survivors.bin", survivors)
        write_array(folder / "similarity.bin", similarity)
        return {"duplicates": duplicates.size, "clusters": np.unique(survivors[duplicates]).size}


def band_keys(signatures: UInt32, band: int, rows: int) -> UInt64:
    """A 64-bit hash of each signature's values in one band (documents): equal values, equal keys."""
    keys = np.zeros(len(signatures), np.uint64)
    for row in range(band * rows, (band + 1) * rows):
        keys = mix64(keys + signatures[:, row])
    return keys


def star_edges(keys: UInt64, verify: Verify) -> Int64:
    """Edges (edges, 2) from the first document of each bucket of equal keys to the others that `verify` accepts.

    The others form a bucket again, and so on for up to 16 rounds.
    """
    order = np.argsort(keys, kind="stable")  # within a bucket in the order of documents
    sorted_keys = keys[order]
    new = _is_new(sorted_keys)
    shared = ~(new & np.append(new[1:], True))
    members, buckets = order[shared], sorted_keys[shared]
    edges = [np.empty((0, 2), np.int64)]
    for _ in range(_MOST_LEADERS):
        leads = _is_new(buckets)
        leaders = members[leads][np.cumsum(leads) - 1][~leads]
        members, buckets = members[~leads], buckets[~leads]
        similar = verify(leaders, members)
        edges.append(np.stack([leaders[similar], members[similar]], axis=1))
        members, buckets = members[~similar], buckets[~similar]
    return np.concatenate(edges)


def component_minima(nodes: int, edges: Int64) -> Int64:
    """For each node the smallest node of its connected component in the graph of `edges` (edges, 2)."""
    graph = coo_matrix((np.ones(len(edges), np.bool_), (edges[:, 0], edges[:, 1])), shape=(nodes, nodes))
    count, labels = connected_components(graph, directed=False)
    minima = np.full(count, nodes, np.int64)
    np.minimum.at(minima, labels, np.arange(nodes))
    return minima[labels]


def _is_new(values: UInt64) -> "np.typing.NDArray[np.bool_]":
    """Whether each value differs from the one before it."""
    new = np.ones(values.size, bool)
    new[1:] = values[1:] != values[:-1]
    return new


def _band_path(folder: Path, band: int) -> Path:
    return folder / f"band_{band:02d}.bin"
