"""Near-duplicates: candidates against datasketch's LSH, clusters against brute force."""

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
from datasketch import MinHash, MinHashLSH
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from megagpt.corpus.config import DedupConfig
from megagpt.corpus.hashing import collapse_whitespace, shingle_hashes
from megagpt.corpus.minhash import signature
from megagpt.corpus.near import BandTask, ClustersTask, band_keys, component_minima, star_edges
from megagpt.corpus.workspace import map_array, write_array
from tests.unit.corpus.texts import document, edited

DEDUP = DedupConfig()


@pytest.fixture(scope="module")
def signatures() -> np.ndarray:
    """Of 60 families of documents with zero to many words changed."""
    rng = random.Random(7)
    texts = []
    for _ in range(60):
        original = document(rng, 200)
        texts += [original, *(edited(original, rng, changes) for changes in (0, 1, 2, 4, 8, 16, 32))]
    rng.shuffle(texts)
    return np.stack([signature(shingle_hashes(collapse_whitespace(text.encode()), 5), 128) for text in texts])


def bucket_pairs(keys: np.ndarray) -> set[tuple[int, int]]:
    buckets: dict[int, list[int]] = {}
    for row, key in enumerate(keys.tolist()):
        buckets.setdefault(key, []).append(row)
    return {pair for bucket in buckets.values() for pair in itertools.combinations(bucket, 2)}


@pytest.mark.parametrize(("bands", "rows"), [(14, 8), (25, 5), (2, 64)])
def test_candidate_pairs_are_those_of_datasketchs_lsh(signatures: np.ndarray, bands: int, rows: int) -> None:
    index = MinHashLSH(num_perm=128, params=(bands, rows))
    sketches = [MinHash(hashvalues=row, scheme="affine32") for row in signatures]
    expected = set()
    for row, sketch in enumerate(sketches):
        expected |= {(other, row) for other in index.query(sketch)}
        index.insert(row, sketch)
    ours = set().union(*(bucket_pairs(band_keys(signatures, band, rows)) for band in range(bands)))
    assert ours == expected
    assert len(ours) > 60


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9])
def test_of_the_pairs_at_or_above_any_threshold_nearly_all_become_candidates(
    signatures: np.ndarray, threshold: float
) -> None:
    bands, rows = DedupConfig(threshold=threshold).banding
    assert bands * rows <= 128
    found = set().union(*(bucket_pairs(band_keys(signatures, band, rows)) for band in range(bands)))
    pairs = itertools.combinations(range(len(signatures)), 2)
    similar = {(left, right) for left, right in pairs if np.mean(signatures[left] == signatures[right]) >= threshold}
    assert len(similar) > 200
    assert len(similar & found) >= 0.95 * len(similar)


def test_bands_and_rows_given_by_the_user_are_kept_and_the_default_is_that_of_fineweb() -> None:
    assert DedupConfig().banding == DedupConfig(threshold=0.95).banding == (14, 8)
    assert DedupConfig(bands=3, rows=7, threshold=0.2).banding == (3, 7)
    for wrong in ({"bands": 3}, {"rows": 3}, {"bands": 20, "rows": 7}):
        with pytest.raises(ValidationError):
            DedupConfig.model_validate(wrong)


@given(st.floats(0.01, 1), st.integers(1, 300))
def test_any_threshold_and_any_signature_have_bands_within_it(threshold: float, num_perm: int) -> None:
    bands, rows = DedupConfig(threshold=threshold, num_perm=num_perm).banding
    assert bands > 0 < rows
    assert bands * rows <= num_perm


def test_a_pair_exactly_at_the_threshold_is_a_pair(tmp_path: Path) -> None:
    signatures = np.zeros((2, 128), np.uint32)
    signatures[1, 96:] = 1  # 0.75 alike, which floats hold exactly
    write_array(tmp_path / "signatures.bin", signatures)
    write_array(tmp_path / "band_00.bin", np.zeros(2, np.uint64))
    for threshold, edges in ((0.75, 1), (0.751, 0)):
        receipt = BandTask(tmp_path, 0, DedupConfig(threshold=threshold)).run(tmp_path)
        assert receipt == {"candidates": receipt["candidates"], "edges": edges}


def test_bands_do_not_share_keys_by_accident(signatures: np.ndarray) -> None:
    shifted = np.roll(signatures, 1, axis=1)
    assert not set(band_keys(signatures, 0, 8).tolist()) & set(band_keys(shifted, 0, 8).tolist())


@given(st.lists(st.integers(0, 3), max_size=30))
def test_when_all_are_similar_each_bucket_is_a_star_around_its_first_document(buckets: list[int]) -> None:
    edges = star_edges(np.array(buckets, np.uint64), lambda left, right: np.ones(left.size, bool))
    expected = {(buckets.index(bucket), row) for row, bucket in enumerate(buckets) if buckets.index(bucket) != row}
    assert sorted(map(tuple, edges.tolist())) == sorted(expected)


def test_documents_unlike_the_first_of_their_bucket_still_find_each_other() -> None:
    groups = np.array([0, 1, 1, 2, 0, 2, 1])  # which are similar, all in one bucket
    edges = star_edges(np.zeros(7, np.uint64), lambda left, right: groups[left] == groups[right])
    assert sorted(map(tuple, edges.tolist())) == [(0, 4), (1, 2), (1, 6), (3, 5)]


def test_a_bucket_of_unlike_documents_costs_a_bounded_number_of_comparisons() -> None:
    compared = 0

    def verify(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        nonlocal compared
        compared += left.size
        return np.zeros(left.size, bool)

    assert len(star_edges(np.zeros(10_000, np.uint64), verify)) == 0
    assert compared < 16 * 10_000


@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=25))
def test_component_minima_are_those_of_a_union_find(edges: list[tuple[int, int]]) -> None:
    parent = list(range(20))

    def root(node: int) -> int:
        while parent[node] != node:
            node = parent[node]
        return node

    for left, right in edges:
        low, high = sorted((root(left), root(right)))
        parent[high] = low
    assert component_minima(20, np.array(edges, np.int64).reshape(-1, 2)).tolist() == [root(i) for i in range(20)]


def test_no_two_verified_candidates_stay_and_nothing_goes_without_one(signatures: np.ndarray, tmp_path: Path) -> None:
    write_array(tmp_path / "signatures.bin", signatures)
    verified = set()
    folders = []
    for band in range(DEDUP.banding[0]):
        keys = band_keys(signatures, band, DEDUP.banding[1])
        write_array(tmp_path / f"band_{band:02d}.bin", keys)
        folders.append(tmp_path / f"edges_{band}")
        folders[-1].mkdir()
        BandTask(tmp_path, band, DEDUP).run(folders[-1])
        verified |= {
            (left, right)
            for left, right in bucket_pairs(keys)
            if np.count_nonzero(signatures[left] == signatures[right]) >= DEDUP.threshold * 128
        }
    receipt = ClustersTask(tmp_path, folders, DEDUP).run(tmp_path)
    survivors = map_array(tmp_path / "survivors.bin", np.int64).tolist()
    similarity = map_array(tmp_path / "similarity.bin", np.float32)
    removed = {row for row, survivor in enumerate(survivors) if survivor != row}
    components = component_minima(len(signatures), np.array(sorted(verified), np.int64))
    assert all(left in removed or right in removed for left, right in verified)
    assert removed <= set(itertools.chain.from_iterable(verified))
    for row in removed:
        assert survivors[row] not in removed
        assert components[row] == components[survivors[row]]
        assert similarity[row] == np.mean(signatures[row] == signatures[survivors[row]])
    assert receipt == {"duplicates": len(removed), "clusters": len({survivors[row] for row in removed})}
    assert len(removed) > 60 * 3
