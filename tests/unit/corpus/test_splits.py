"""The splits: properties of the bounds and of the decisions by them."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from megagpt.corpus.config import CorpusConfig
from megagpt.corpus.splits import draws, nominal_bounds, settled_bounds, split_of

HASHES = np.random.default_rng(0).integers(0, 2**64, 20_000, np.uint64)


def splits_of(hashes: np.ndarray, shares: dict[str, float], seed: int = 0) -> np.ndarray:
    """The number of each document's split, settled over blocks of seven documents."""
    drawn = draws(hashes, seed)
    bounds = nominal_bounds(shares)
    counts = np.bincount(split_of(drawn, bounds), minlength=len(shares) + 1).tolist()

    def blocks() -> Iterator[np.ndarray]:
        yield from (drawn[start : start + 7] for start in range(0, drawn.size, 7))

    return split_of(drawn, settled_bounds(bounds, counts, blocks))


def in_validation(hashes: np.ndarray, share: float, seed: int = 0) -> np.ndarray:
    return splits_of(hashes, {"validation": share}, seed) == 1


@pytest.mark.parametrize(
    "shares", [{}, {"validation": 0.001}, {"validation": 0.3, "test": 0.01}, {"a": 0.9, "b": 0.09}]
)
def test_the_shares_are_those_asked_for(shares: dict[str, float]) -> None:
    found = np.bincount(splits_of(HASHES, shares), minlength=len(shares) + 1) / HASHES.size
    for share, wanted in zip(found, [1 - sum(shares.values()), *shares.values()], strict=True):
        assert abs(share - wanted) < 5 * np.sqrt(max(0, wanted * (1 - wanted)) / HASHES.size) + 1e-9


def test_a_document_keeps_its_split_when_others_come_or_go() -> None:
    shares = {"validation": 0.1, "test": 0.2}
    assert (splits_of(HASHES, shares, 3)[:5000] == splits_of(HASHES[:5000], shares, 3)).all()


def test_a_larger_share_of_validation_only_adds_documents() -> None:
    assert not (in_validation(HASHES, 0.05, 1) & ~in_validation(HASHES, 0.1, 1)).any()


def test_another_seed_gives_another_split() -> None:
    assert (in_validation(HASHES, 0.5, 0) != in_validation(HASHES, 0.5, 1)).mean() > 0.4


@given(st.integers(2, 50), st.floats(0.0001, 0.9999))
def test_of_two_documents_or_more_each_split_gets_at_least_one(count: int, share: float) -> None:
    assert 0 < in_validation(HASHES[:count], share).sum() < count


@given(st.integers(1, 50), st.floats(1e-9, 0.3), st.floats(1e-9, 0.3), st.floats(1e-9, 0.3))
def test_several_splits_get_a_document_each_as_far_as_there_are_enough_and_training_comes_first(
    count: int, one: float, two: float, three: float
) -> None:
    counts = np.bincount(splits_of(HASHES[:count], {"one": one, "two": two, "three": three}), minlength=4)
    assert counts[0] > 0
    if count >= 50:
        assert counts.all()


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.floats(0.0001, 0.9999))
def test_copies_are_never_on_both_sides(numbers: list[int], share: float) -> None:
    hashes = HASHES[numbers]
    chosen = in_validation(hashes, share)
    assert not set(hashes[chosen].tolist()) & set(hashes[~chosen].tolist())
    assert chosen.any() == (len(set(numbers)) > 1)


@pytest.mark.parametrize(
    "wrong", [{"train": 0.1}, {"validation": 0.1}, {"../x": 0.1}, {"test": 0}, {"a": 0.5, "b": 0.5}]
)
def test_splits_that_cannot_be_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match="split"):
        CorpusConfig.model_validate({"input": ["x"], "output": "y", "splits": wrong})


@given(st.lists(st.integers(1, 99), min_size=1, max_size=6), st.floats(0, 0.9))
def test_shares_that_a_configuration_allows_have_ascending_bounds_below_the_largest_draw(
    hundredths: list[int], validation: float
) -> None:
    shares = {f"s{i}": share / 100 for i, share in enumerate(hundredths)}
    settings = {"input": ["x"], "output": "y", "splits": shares, "validation_fraction": validation}
    try:
        config = CorpusConfig.model_validate(settings)
    except ValidationError:
        assert sum(hundredths) / 100 + validation > 0.999
        return
    bounds = nominal_bounds(config.shares)
    assert bounds == sorted(bounds)
    assert bounds[-1] < 2**64 * (1 - 1e-7)
    split_of(HASHES[:5], bounds)
