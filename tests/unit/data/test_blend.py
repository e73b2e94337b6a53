"""The blend: every prefix holds each dataset's share to within one sample, and a lookup is a counting."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.data.blend import MAX_BLOCK, Blend

WEIGHTS = st.lists(st.sampled_from([0.001, 0.1, 0.3, 0.7, 1.0, 2.0, 3.5, 12.0]), min_size=1, max_size=30)


def prefix_errors(blend: Blend, datasets: np.ndarray) -> float:
    """Largest difference between a dataset's count and its share of any prefix of the samples."""
    counts = np.cumsum(datasets[:, None] == np.arange(blend.quotas.size), axis=0)
    return np.abs(counts - np.arange(1, datasets.size + 1)[:, None] * blend.quotas / blend.block).max()


@settings(deadline=None)
@given(WEIGHTS)
def test_every_prefix_is_within_one_sample_of_the_weights(weights: list[float]) -> None:
    blend = Blend(weights)
    datasets, _ = blend.lookup(np.arange(min(blend.block + 10, 20_000)))
    assert prefix_errors(blend, datasets) < 1
    shares = np.array(weights) / sum(weights)
    assert np.allclose(blend.quotas / blend.block, shares, rtol=0, atol=1 / MAX_BLOCK)


@settings(deadline=None)
@given(WEIGHTS, st.integers(0, 3000))
def test_numbers_within_a_dataset_count_its_samples_from_0_without_a_gap(weights: list[float], start: int) -> None:
    blend = Blend(weights)
    datasets, numbers = blend.lookup(np.arange(3 * 1024))
    for dataset in range(len(weights)):
        own = numbers[datasets == dataset]
        assert np.array_equal(own, np.arange(own.size))
    assert np.array_equal(blend.counts(start), np.bincount(datasets[:start], minlength=len(weights)))
    assert np.array_equal(blend.lookup([start])[1], numbers[start : start + 1])


def test_lookups_far_away_agree_with_the_counts_before_them() -> None:
    blend = Blend([0.7, 0.2, 0.1])
    for sample in (10**12, 10**12 + 7):
        dataset, number = blend.lookup([sample])
        assert number[0] == blend.counts(sample)[dataset[0]]
        assert blend.counts(sample).sum() == sample


@pytest.mark.parametrize(
    ("weights", "quotas"),
    [([5.0], [1]), ([1, 1], [1, 1]), ([0.7, 0.3], [7, 3]), ([0.1, 0.2, 0.7], [1, 2, 7]), ([1.5, 0.5], [3, 1])],
)
def test_decimal_weights_are_met_exactly(weights: list[float], quotas: list[int]) -> None:
    assert Blend(weights).quotas.tolist() == quotas


def test_scaling_all_weights_changes_nothing() -> None:
    samples = np.arange(1000)
    assert np.array_equal(Blend([3, 1, 2]).lookup(samples), Blend([0.75, 0.25, 0.5]).lookup(samples))


def test_a_tiny_weight_is_drawn_at_least_once_a_block() -> None:
    blend = Blend([1e-9, 1.0])
    assert blend.quotas.tolist() == [1, MAX_BLOCK]
    assert prefix_errors(blend, blend.lookup(np.arange(blend.block))[0]) < 1


def test_a_thousand_uneven_datasets_keep_the_bound() -> None:
    blend = Blend((np.random.default_rng(0).random(1000) ** 4 + 1e-6).tolist())
    datasets, _ = blend.lookup(np.arange(10_000))
    assert prefix_errors(blend, datasets) < 1
    assert np.array_equal(blend.counts(blend.block), blend.quotas)
