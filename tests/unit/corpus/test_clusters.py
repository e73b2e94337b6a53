"""Connected components out of core, against a union-find in memory."""

import functools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.corpus import clusters, external
from megagpt.corpus.clusters import ClustersTask
from megagpt.corpus.exact import PAIR
from megagpt.corpus.external import RunWriter, written_runs

NODE = st.integers(0, 30)


def survivors_of(folder: Path, edges: list[tuple[int, int]], run_records: int = 1 << 20) -> dict[int, int]:
    """What the stage makes of the edges."""
    for name in ("edges", "out"):
        (folder / name).mkdir(parents=True)
    with RunWriter(folder / "edges", "pairs", PAIR, run_records) as writer:
        writer.add(np.array([(max(edge), min(edge)) for edge in edges if edge[0] != edge[1]], PAIR))
    receipt = ClustersTask([folder / "edges"]).run(folder / "out")
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["largest.json", "pairs.00000"]
    (run,) = written_runs(folder / "out", "pairs", PAIR)
    pairs = run.read(0, len(run)).tolist()
    assert pairs == sorted(pairs)
    sizes = Counter(leader for _, leader in pairs)
    assert (receipt["duplicates"], receipt["clusters"]) == (len(pairs), len(sizes))
    expected = sorted(((count + 1, leader) for leader, count in sizes.items()), key=lambda pair: (-pair[0], pair[1]))
    assert [tuple(pair) for pair in json.loads((folder / "out/largest.json").read_text())] == expected[:20]
    return dict(pairs)


def union_find(edges: list[tuple[int, int]]) -> dict[int, int]:
    """Each node that is not the smallest of its component, with that one."""
    parent: dict[int, int] = {}

    def root(node: int) -> int:
        while parent.setdefault(node, node) != node:
            node = parent[node]
        return node

    for left, right in edges:
        low, high = sorted((root(left), root(right)))
        parent[high] = low
    return {node: root(node) for node in parent if root(node) != node}


@given(st.lists(st.tuples(NODE, NODE), max_size=40), st.integers(1, 9))
def test_survivors_are_the_smallest_of_their_components(
    tmp_path_factory: pytest.TempPathFactory, edges: list[tuple[int, int]], run_records: int
) -> None:
    assert survivors_of(tmp_path_factory.mktemp("graph"), edges, run_records) == union_find(edges)


def test_of_equal_clusters_the_first_are_listed(tmp_path: Path) -> None:
    edges = [(2 * pair, 2 * pair + 1) for pair in range(50)]
    assert survivors_of(tmp_path, edges) == {high: low for low, high in edges}


@pytest.mark.parametrize("shape", ["chain", "shuffled chain", "star around the last", "random", "many small"])
def test_large_graphs_in_little_memory(shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    order = rng.permutation(400) if shape == "shuffled chain" else np.arange(400)
    if shape == "random":
        edges = rng.integers(0, 400, (440, 2)).tolist()
    elif shape == "many small":
        edges = [(node, node - node % 7) for node in rng.permutation(700).tolist()]
    elif shape == "star around the last":
        edges = [(node, 399) for node in range(399)]
    else:
        edges = list(zip(order[1:].tolist(), order[:-1].tolist(), strict=True))
    monkeypatch.setattr(clusters, "RunWriter", functools.partial(RunWriter, run_records=150))
    monkeypatch.setattr(external.merge_runs, "__defaults__", (False, 16 * 200))
    assert survivors_of(tmp_path, edges, 100) == union_find(edges)


def test_without_edges_nobody_goes(tmp_path: Path) -> None:
    assert survivors_of(tmp_path, []) == {}
