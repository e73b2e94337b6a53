"""Stage `clusters`: of each connected component of similar documents the first, which stays.

Alternates the large-star and small-star operations of Kiveris et al., Connected Components in MapReduce and Beyond
(2014), each a pass over sorted edges, until every document points to the smallest of its component. Memory is bounded;
an edge takes 16 bytes on disk, and about four times that while the stage runs. It is one task: killed, it begins anew.
"""

import heapq
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megagpt.corpus.exact import PAIR
from megagpt.corpus.external import Records, Run, RunWriter, merge_runs, without_repeats, written_runs
from megagpt.corpus.hashing import mix64
from megagpt.corpus.workspace import Receipt

LARGEST_NAME = "largest.json"
_LARGEST = 20


@dataclass(frozen=True)
class ClustersTask:
    """All edges: writes one run `pairs`, a PAIR of every document that goes with the one that stays in its stead, and
    largest.json, pairs of size and number of the survivor of the largest clusters."""

    edges: list[Path]
    """Folders with runs of edges, `pairs`: results of the stages `exact` and `bands`."""

    def __str__(self) -> str:
        return "all documents"

    def run(self, folder: Path) -> Receipt:
        """See the class; counts duplicates, clusters of more than one document, and rounds until all was settled."""
        runs = [run for edges in self.edges for run in written_runs(edges, "pairs", PAIR)]
        before, fingerprint, rounds = None, _fingerprint(runs), 0
        while fingerprint != before:
            target = folder / f"round_{rounds}"
            target.mkdir()
            _large_star(runs, target)
            _small_star(written_runs(target, "large", PAIR), target)
            if rounds:
                shutil.rmtree(folder / f"round_{rounds - 1}")
            runs = written_runs(target, "small", PAIR)
            before, fingerprint, rounds = fingerprint, _fingerprint(runs), rounds + 1
        duplicates = 0
        with open(folder / "pairs.00000", "wb") as file:
            for block in _edges(runs):
                file.write(block.data)
                duplicates += block.size
        clusters, largest = _sizes(runs, folder)
        (folder / LARGEST_NAME).write_text(json.dumps(largest))
        for path in folder.glob("round_*"):
            shutil.rmtree(path)
        return {"duplicates": duplicates, "clusters": clusters, "rounds": rounds}


def _large_star(runs: Sequence[Run], folder: Path) -> None:
    """Join the larger neighbours of every document to the smallest of it and its neighbours: runs `large`."""
    _reverse(runs, folder)
    with RunWriter(folder, "large", PAIR) as writer:
        for neighbours, smallest in _with_first([*runs, *written_runs(folder, "reversed", PAIR)]):
            document, neighbour = neighbours["member"], neighbours["leader"]
            larger = neighbour > document
            writer.add(_pairs(neighbour[larger], np.minimum(smallest, document)[larger]))


def _small_star(runs: Sequence[Run], folder: Path) -> None:
    """Join every document and its smaller neighbours to the smallest of these: runs `small`."""
    with RunWriter(folder, "small", PAIR) as writer:
        for edges, smallest in _with_first(runs):
            is_smallest = edges["leader"] == smallest
            writer.add(_pairs(np.where(is_smallest, edges["member"], edges["leader"]), smallest))


def _reverse(runs: Sequence[Run], folder: Path) -> None:
    with RunWriter(folder, "reversed", PAIR) as writer:
        for block in _edges(runs):
            writer.add(_pairs(block["leader"], block["member"]))


def _pairs(members: npt.NDArray[np.uint64], leaders: npt.NDArray[np.uint64]) -> Records:
    pairs = np.empty(members.size, PAIR)
    pairs["member"], pairs["leader"] = members, leaders
    return pairs


def _edges(runs: Sequence[Run]) -> Iterator[Records]:
    """All edges in order, each once."""
    last = None
    for block in merge_runs(runs, ("member", "leader")):
        edges = without_repeats(block, last)
        if edges.size:
            yield edges
            last = edges[-1:]


def _with_first(runs: Sequence[Run]) -> Iterator[tuple[Records, npt.NDArray[np.uint64]]]:
    """All edges in order, with the smallest leader of each one's member."""
    last_member = last_smallest = None
    for edges in _edges(runs):
        member, leader = edges["member"], edges["leader"]
        is_first = np.append(True, member[1:] != member[:-1])
        starts = np.flatnonzero(is_first)
        firsts = leader[starts]
        if member[0] == last_member:
            firsts[0] = last_smallest
        yield edges, firsts[np.cumsum(is_first) - 1]
        last_member, last_smallest = member[-1], firsts[-1]


def _fingerprint(runs: Sequence[Run]) -> tuple[int, int]:
    """The number of edges, and one that two different sets of them share by chance only."""
    count, total = 0, 0
    for edges in _edges(runs):
        count += edges.size
        total = (total + int(mix64(mix64(edges["member"]) ^ edges["leader"]).sum())) % (1 << 64)
    return count, total


def _sizes(runs: Sequence[Run], folder: Path) -> tuple[int, list[tuple[int, int]]]:
    """The number of clusters, and (size, number of the survivor) of the largest, given edges that are stars."""
    target = folder / "round_sizes"
    target.mkdir()
    _reverse(runs, target)
    clusters = 0
    largest: list[tuple[int, int]] = []  # a heap of (size, -survivor)
    survivor, size = -1, 0

    def close() -> None:
        heapq.heappush(largest, (size, -survivor))
        if len(largest) > _LARGEST:
            heapq.heappop(largest)

    for block in merge_runs(written_runs(target, "reversed", PAIR), ("member", "leader")):
        survivors, sizes = np.unique(block["member"], return_counts=True)
        if survivors[0] == survivor:
            sizes[0] += size
        elif size:
            close()
        clusters += survivors.size - int(survivors[0] == survivor)
        keep = np.lexsort((-survivors[:-1].astype(np.int64), sizes[:-1]))[-_LARGEST:]  # of equal ones, the first
        for index in keep.tolist():
            survivor, size = int(survivors[index]), int(sizes[index])
            close()
        survivor, size = int(survivors[-1]), int(sizes[-1])
    if size:
        close()
    return clusters, [(size + 1, -negative) for size, negative in sorted(largest, reverse=True)]
