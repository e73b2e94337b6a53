"""The unigram baseline, against a loop over its definition."""

import math

import numpy as np
import pytest

from megagpt.data.indexed import IndexedDatasetWriter
from megagpt.data.unigram import unigram_loss


def test_loss_is_the_mean_surprise_under_add_one_frequencies(tmp_path):
    rng = np.random.default_rng(0)
    train, validation = rng.integers(0, 5, 200), np.append(rng.integers(0, 5, 50), 6)
    for name, tokens in (("train", train), ("validation", validation)):
        with IndexedDatasetWriter(tmp_path / name, np.uint16) as writer:
            writer.add_document(tokens)
    total = 0.0
    for token in validation.tolist():
        total -= math.log((train.tolist().count(token) + 1) / (200 + 7))
    assert unigram_loss(tmp_path / "train", tmp_path / "validation", 7) == pytest.approx(total / 51)
