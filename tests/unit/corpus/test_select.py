"""Exact duplicates, the split and the order: properties of the decisions about documents."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megagpt.corpus.exact import first_occurrences
from megagpt.corpus.select import in_validation, shuffle_keys

HASHES = np.random.default_rng(0).integers(0, 2**64, 20_000, np.uint64)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=40))
def test_the_first_of_equal_hashes_is_found_for_each_and_half_equal_ones_differ(pairs: list[tuple[int, int]]) -> None:
    low, high = np.array(pairs, np.uint64).reshape(-1, 2).T
    assert first_occurrences(low, high).tolist() == [pairs.index(pair) for pair in pairs]


def test_the_share_of_validation_is_the_one_asked_for() -> None:
    for fraction in (0.001, 0.01, 0.3, 0.9):
        share = in_validation(HASHES, fraction, seed=0).mean()
        assert abs(share - fraction) < 5 * np.sqrt(fraction * (1 - fraction) / HASHES.size)
    assert not in_validation(HASHES, 0, seed=0).any()


def test_a_document_keeps_its_split_when_others_come_or_go() -> None:
    alone = in_validation(HASHES[:5000], 0.1, seed=3)
    assert (in_validation(HASHES, 0.1, seed=3)[:5000] == alone).all()


def test_a_larger_share_of_validation_only_adds_documents() -> None:
    assert not (in_validation(HASHES, 0.05, seed=1) & ~in_validation(HASHES, 0.1, seed=1)).any()


def test_another_seed_gives_another_split_and_another_order() -> None:
    assert (in_validation(HASHES, 0.5, seed=0) != in_validation(HASHES, 0.5, seed=1)).mean() > 0.4
    positions = np.arange(1000, dtype=np.uint64)
    files = np.zeros(1000, np.uint32)
    orders = [np.argsort(shuffle_keys(files, positions, seed)).tolist() for seed in (0, 1)]
    assert orders[0] != orders[1]


@given(st.integers(2, 50), st.floats(0.0001, 0.9999))
def test_of_two_documents_or_more_each_split_gets_at_least_one(count: int, fraction: float) -> None:
    chosen = in_validation(HASHES[:count], fraction, seed=0)
    assert 0 < chosen.sum() < count


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.floats(0.0001, 0.9999))
def test_copies_are_never_on_both_sides(numbers: list[int], fraction: float) -> None:
    hashes = HASHES[numbers]
    chosen = in_validation(hashes, fraction, seed=0)
    assert not set(hashes[chosen].tolist()) & set(hashes[~chosen].tolist())
    assert chosen.any() == (len(set(numbers)) > 1)


def test_a_single_document_is_for_training() -> None:
    assert not in_validation(HASHES[:1], 0.9, seed=0).any()


def test_shuffle_keys_are_distinct_and_without_visible_order() -> None:
    files = np.repeat(np.arange(50, dtype=np.uint32), 400)
    positions = np.tile(np.arange(400, dtype=np.uint64) * 1000, 50)
    keys = shuffle_keys(files, positions, seed=0)
    assert np.unique(keys).size == keys.size
    ranks = np.argsort(np.argsort(keys))
    assert abs(np.corrcoef(ranks, np.arange(keys.size))[0, 1]) < 0.05
    assert abs(np.corrcoef(ranks[1:], ranks[:-1])[0, 1]) < 0.05
