"""The order of samples: a permutation at any length, the same for ever, and as good as random."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from megagpt.data.order import epoch_offset, permutation_key, permute

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def reference_permute(value: int, length: int, key: int) -> int:
    """The definition in order.py's docstring, in Python's integers."""
    bits = (length - 1).bit_length()
    width = (bits + 1) // 2
    while True:
        left, right = value >> width, value % (1 << width)
        for number in range(12):
            round_key = mix((key + (number + 1) * GOLDEN) & MASK)
            if number % 2 == 0:
                left ^= mix((right + round_key) & MASK) % (1 << (bits - width))
            else:
                right ^= mix((left + round_key) & MASK) % (1 << width)
        value = left << width | right
        if value < length:
            return value


def reference_key(seed: int, epoch: int, purpose: int) -> int:
    key = mix((seed + GOLDEN) & MASK)
    key = mix((key + epoch + GOLDEN) & MASK)
    return mix((key + purpose + GOLDEN) & MASK)


@given(st.integers(1, 3000), st.integers(0, MASK))
@settings(deadline=None)
def test_every_index_below_any_length_comes_exactly_once(length: int, key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(length), length, key)), np.arange(length))


@given(st.integers(1, 2**63), st.integers(0, MASK), st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=30))
@settings(deadline=None)
def test_lengths_up_to_2_to_the_63_follow_the_documented_definition(length: int, key: int, values: list[int]) -> None:
    indices = [value % length for value in values]
    assert permute(indices, length, key).tolist() == [reference_permute(i, length, key) for i in indices]


@given(st.integers(0, MASK), st.lists(st.integers(0, 2**40), min_size=1, max_size=30), st.integers(1, 2**20))
@settings(deadline=None)
def test_epoch_keys_and_offsets_follow_the_documented_definition(seed: int, epochs: list[int], choices: int) -> None:
    assert permutation_key(seed, epochs).tolist() == [reference_key(seed, epoch, 0) for epoch in epochs]
    expected = [reference_key(seed, epoch, 1) % choices for epoch in epochs]
    assert epoch_offset(seed, epochs, choices).tolist() == expected


def test_the_order_of_existing_runs_never_changes() -> None:
    assert permute(np.arange(10), 10, permutation_key(1234, 0)).tolist() == [5, 9, 6, 1, 7, 4, 3, 2, 8, 0]
    places = permute([0, 1, 10**12 - 1], 10**12, permutation_key(0, 3))
    assert places.tolist() == [95965375403, 962012592009, 276933870325]
    assert epoch_offset(1234, [0, 1, 2], 1024).tolist() == [751, 510, 398]


def test_an_index_has_one_place_whatever_it_is_asked_with() -> None:
    keys = permutation_key(5, np.arange(6))
    together = permute([4, 1, 4, 0, 2, 3], 7, keys)
    assert together.tolist() == [permute(i, 7, keys[n])[0] for n, i in enumerate([4, 1, 4, 0, 2, 3])]


@pytest.mark.parametrize("index", [-1, 7, 2**40])
def test_indices_outside_are_refused(index: int) -> None:
    with pytest.raises(ValueError, match="indices must lie in 0 to 6"):
        permute([0, index], 7, 1)


def test_every_permutation_of_four_is_about_as_frequent_as_any_other() -> None:
    keys = permutation_key(0, np.arange(24_000))
    places = np.stack([permute(np.full(keys.size, index), 4, keys) for index in range(4)], axis=1)
    codes = places @ [64, 16, 4, 1]
    expected = [p @ np.array([64, 16, 4, 1]) for p in map(np.array, itertools.permutations(range(4)))]
    counts = np.array([(codes == code).sum() for code in expected])
    assert chisquare(counts).pvalue > 1e-4


def test_neighbours_are_scattered_like_a_shuffled_list_s() -> None:
    length = 20_000
    order = permute(np.arange(length), length, permutation_key(0, 0))
    shuffled = list(range(length))
    random.Random(0).shuffle(shuffled)
    for values in (order, np.array(shuffled)):
        steps = np.histogram(np.diff(values) % length, bins=50, range=(0, length))[0]
        assert chisquare(steps).pvalue > 1e-4
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(order, permute(np.arange(length), length, permutation_key(0, 1)))[0, 1]) < 0.03
