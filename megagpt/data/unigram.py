"""The loss of a unigram model: what a language model must beat to have learned anything from context."""

from pathlib import Path

import numpy as np

from megagpt.data.indexed import IndexedDataset

_BLOCK = 1 << 24  # tokens counted at once


def token_counts(prefix: str | Path, vocab_size: int) -> np.ndarray:
    """How often each token id occurs in a token dataset: int64 (vocab_size,)."""
    dataset = IndexedDataset(prefix)
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, dataset.num_tokens, _BLOCK):
        tokens = dataset.tokens(start, min(start + _BLOCK, dataset.num_tokens))
        counts += np.bincount(tokens, minlength=vocab_size)
    return counts


def unigram_loss(train: str | Path, validation: str | Path, vocab_size: int) -> float:
    """Mean negative log-likelihood in nats of the validation tokens under the training tokens' add-one frequencies."""
    seen = token_counts(train, vocab_size) + 1
    asked = token_counts(validation, vocab_size)
    return float(-(asked * np.log(seen / seen.sum())).sum() / asked.sum())
