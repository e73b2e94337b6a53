"""Near-duplicates: candidates against datasketch's LSH, clusters against brute force."""

import itertools
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from datasketch import MinHash, MinHashLSH
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from megagpt.corpus.clusters import ClustersTask
from megagpt.corpus.config import DedupConfig
from megagpt.corpus.documents import Documents, Part
from megagpt.corpus.exact import PAIR, ExactTask, KeyRange
from megagpt.corpus.external import written_runs
from megagpt.corpus.extract import DOCUMENT, HASHED
from megagpt.corpus.hashing import collapse_whitespace, shingle_hashes
from megagpt.corpus.minhash import signature
from megagpt.corpus.near import BandTask, KeysTask, Stars, band_keys
from megagpt.corpus.workspace import write_array
from tests.unit.corpus.texts import document, edited, jaccard

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


def keys_of(signatures: np.ndarray, band: int, rows: int) -> np.ndarray:
    return band_keys(signatures[:, band * rows : (band + 1) * rows].T)


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
    ours = set().union(*(bucket_pairs(keys_of(signatures, band, rows)) for band in range(bands)))
    assert ours == expected
    assert len(ours) > 60


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9])
def test_of_the_pairs_at_or_above_any_threshold_nearly_all_become_candidates(
    signatures: np.ndarray, threshold: float
) -> None:
    bands, rows = DedupConfig(threshold=threshold).banding
    assert bands * rows <= 128
    found = set().union(*(bucket_pairs(keys_of(signatures, band, rows)) for band in range(bands)))
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


@pytest.mark.parametrize(("threshold", "num_perm"), [(0.8, 128), (0.5, 64), (0.9, 256)])
def test_datasketchs_choice_of_bands_and_rows_is_available(threshold: float, num_perm: int) -> None:
    index = MinHashLSH(threshold=threshold, num_perm=num_perm)
    dedup = DedupConfig(threshold=threshold, num_perm=num_perm, band_rule="datasketch")
    assert dedup.banding == (index.b, index.r)
    assert (threshold, num_perm) != (0.8, 128) or dedup.banding == (9, 13)


@given(st.floats(0.01, 1), st.integers(1, 300))
def test_any_threshold_and_any_signature_have_bands_within_it(threshold: float, num_perm: int) -> None:
    bands, rows = DedupConfig(threshold=threshold, num_perm=num_perm).banding
    assert bands > 0 < rows
    assert bands * rows <= num_perm


def documents_of(folder: Path, signatures: np.ndarray, cuts: Sequence[int] = ()) -> Documents:
    """Parts with these signatures, all hashes being different, cut at the given numbers."""
    parts = []
    for number, (first, stop) in enumerate(itertools.pairwise([0, *cuts, len(signatures)])):
        part = Part(folder / f"part_{number}", 0, number, first, stop - first)
        part.folder.mkdir()
        hashes = np.zeros(part.count, HASHED)
        hashes["high"], hashes["number"] = np.arange(first, stop), np.arange(part.count)
        write_array(part.folder / "hashes.bin", hashes)
        write_array(part.folder / "documents.bin", np.zeros(part.count, DOCUMENT))
        write_array(part.folder / "signatures.bin", signatures[first:stop])
        parts.append(part)
    return Documents(tuple(parts))


def pairs_in(folder: Path) -> list[tuple[int, int]]:
    return [pair for run in written_runs(folder, "pairs", PAIR) for pair in run.read(0, len(run)).tolist()]


def edges_of(
    folder: Path, documents: Documents, dedup: DedupConfig, bands: Sequence[int] | None = None, ranges: int = 1
) -> list[Path]:
    """Results of the stage `bands`."""

    def new_folder(name: str) -> Path:
        path = folder / name
        path.mkdir(parents=True)
        return path

    exact = new_folder("exact")
    ExactTask(documents, KeyRange(0, 1)).run(exact)
    for part in documents.parts:
        KeysTask(part, [exact], dedup).run(new_folder(f"keys/{part.number:06d}"))
    results = []
    for band, index in itertools.product(range(dedup.banding[0]) if bands is None else bands, range(ranges)):
        results.append(new_folder(f"edges_{band}_{index}"))
        BandTask(documents, folder / "keys", band, KeyRange(index, ranges), dedup).run(results[-1])
    return results


def test_a_pair_exactly_at_the_threshold_is_a_pair(tmp_path: Path) -> None:
    signatures = np.zeros((2, 128), np.uint32)
    signatures[1, 96:] = 1  # 0.75 alike, which floats hold exactly
    for threshold, edges in ((0.75, [(1, 0)]), (0.751, [])):
        folder = tmp_path / str(threshold)
        folder.mkdir()
        (result,) = edges_of(folder, documents_of(folder, signatures), DedupConfig(threshold=threshold), bands=[0])
        assert pairs_in(result) == edges


def test_bands_do_not_share_keys_by_accident(signatures: np.ndarray) -> None:
    shifted = np.roll(signatures, 1, axis=1)
    assert not set(keys_of(signatures, 0, 8).tolist()) & set(keys_of(shifted, 0, 8).tolist())


def star_edges(
    keys: Sequence[int], similar: Callable[[np.ndarray, np.ndarray], np.ndarray], cuts: Sequence[int] = ()
) -> tuple[list[tuple[int, int]], int]:
    """Edges of the documents 0, 1, ... with these keys, given in sorted blocks, and the number of comparisons."""
    order = np.argsort(np.array(keys), kind="stable")
    stars = Stars(lambda numbers: lambda left, right: similar(numbers[left], numbers[right]))
    edges = []
    for block in np.split(order, list(cuts)):
        edges += stars.edges(np.array(keys, np.uint64)[block], block.astype(np.uint64)).tolist()
    return sorted(edges), stars.candidates


CUTS = st.lists(st.integers(0, 30), max_size=4).map(sorted)


@given(st.lists(st.integers(0, 3), max_size=30), CUTS)
def test_when_all_are_similar_each_bucket_is_a_star_around_its_first_document(
    buckets: list[int], cuts: list[int]
) -> None:
    edges, _ = star_edges(buckets, lambda left, right: np.ones(left.size, bool), cuts)
    expected = {(row, buckets.index(bucket)) for row, bucket in enumerate(buckets) if buckets.index(bucket) != row}
    assert edges == sorted(expected)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 25)), max_size=80), CUTS)
def test_documents_are_compared_with_up_to_sixteen_leaders_of_their_bucket_in_blocks_of_any_size(
    documents: list[tuple[int, int]], cuts: list[int]
) -> None:
    groups = np.array([group for _, group in documents])
    leaders: dict[int, list[int]] = {0: [], 1: [], 2: []}
    expected = []
    for number, (bucket, group) in enumerate(documents):
        same = [leader for leader in leaders[bucket] if groups[leader] == group]
        if same:
            expected.append((number, same[0]))
        elif len(leaders[bucket]) < 16:
            leaders[bucket].append(number)
    edges, _ = star_edges([key for key, _ in documents], lambda left, right: groups[left] == groups[right], cuts)
    assert edges == expected


def test_a_bucket_of_unlike_documents_costs_a_bounded_number_of_comparisons() -> None:
    for cuts in ((), range(7, 10_000, 7)):
        edges, compared = star_edges([0] * 10_000, lambda left, right: np.zeros(left.size, bool), cuts)
        assert (edges, compared) == ([], sum(10_000 - i for i in range(1, 17)))


def test_no_two_verified_candidates_stay_and_nothing_goes_without_one(signatures: np.ndarray, tmp_path: Path) -> None:
    verified = {
        (left, right)
        for band in range(DEDUP.banding[0])
        for left, right in bucket_pairs(keys_of(signatures, band, DEDUP.banding[1]))
        if np.count_nonzero(signatures[left] == signatures[right]) >= DEDUP.threshold * 128
    }
    results = []
    for cuts, ranges in (((), 1), ((5, 5, 200, 417), 3)):
        folder = tmp_path / str(ranges)
        folder.mkdir()
        edges = edges_of(folder, documents_of(folder, signatures, cuts), DEDUP, ranges=ranges)
        receipt = ClustersTask(edges).run(folder)
        results.append((pairs_in(folder), receipt["duplicates"], receipt["clusters"]))
    assert results[0] == results[1]
    survivors, duplicates, clusters = results[0]
    removed = {row for row, _ in survivors}
    assert (duplicates, clusters) == (len(removed), len({survivor for _, survivor in survivors}))
    assert all(left in removed or right in removed for left, right in verified)
    assert removed <= {row for pair in verified for row in pair} - {survivor for _, survivor in survivors}
    assert len(removed) > 60 * 3


def character_jaccard(left: str, right: str) -> float:
    a, b = ({text[i : i + 9] for i in range(len(text) - 8)} for text in map(" ".join, (left.split(), right.split())))
    return len(a & b) / len(a | b)


@pytest.mark.parametrize(("unit", "size", "similarity"), [("words", 5, jaccard), ("characters", 9, character_jaccard)])
def test_exact_verification_decides_by_the_shingles_and_not_by_their_estimate(
    tmp_path: Path, unit: Literal["words", "characters"], size: int, similarity: Callable[[str, str], float]
) -> None:
    rng = random.Random(3)
    original = document(rng, 300)
    texts = [original, *(edited(original, rng, changes) for changes in range(2, 42))]
    encoded = [text.encode() for text in texts]
    signatures = np.stack([signature(shingle_hashes(collapse_whitespace(text), size, unit), 128) for text in encoded])
    documents = documents_of(tmp_path, signatures)
    rows = np.zeros(len(texts), DOCUMENT)
    rows["size"] = [len(text) for text in encoded]
    rows["begin"] = np.cumsum(rows["size"]) - rows["size"]
    write_array(documents.parts[0].folder / "documents.bin", rows)
    (documents.parts[0].folder / "text.bin").write_bytes(b"".join(encoded))
    band = np.zeros(len(texts), np.uint64)
    task = BandTask(
        documents,
        tmp_path,
        0,
        KeyRange(0, 1),
        DedupConfig(verification="exact", threshold=0.7, shingle_size=size, shingle_unit=unit),
    )
    edges = Stars(task._similar).edges(band, np.arange(len(texts), dtype=np.uint64))
    expected = [row for row in range(1, len(texts)) if similarity(texts[0], texts[row]) >= 0.7]
    assert [pair[0] for pair in edges.tolist() if pair[1] == 0] == expected
    assert 3 < len(expected) < 30
    estimated = np.mean(signatures == signatures[0], axis=1) >= 0.7
    assert np.flatnonzero(estimated[1:]).tolist() != [row - 1 for row in expected]


def test_without_verification_every_candidate_is_an_edge(tmp_path: Path) -> None:
    signatures = np.arange(256, dtype=np.uint32).reshape(2, 128)
    signatures[:, :8] = 0
    documents = documents_of(tmp_path, signatures)
    (result,) = edges_of(tmp_path, documents, DedupConfig(verification="none"), bands=[0])
    assert pairs_in(result) == [(1, 0)]
