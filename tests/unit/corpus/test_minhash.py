"""Signatures against datasketch's own, and the estimate against exact Jaccard similarity."""

import random

import numpy as np
import pytest
from datasketch import MinHash
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.corpus import minhash
from megagpt.corpus.hashing import collapse_whitespace, shingle_hashes
from megagpt.corpus.minhash import estimated_similarity, signature
from tests.unit.corpus.test_hashing import python_shingle_hash
from tests.unit.corpus.texts import document, edited, jaccard, shingles


def datasketch_signature(text: str, num_perm: int) -> np.ndarray:
    """What datasketch makes of a text's shingles, given one by one."""
    sketch = MinHash(num_perm, hashfunc=python_shingle_hash)
    sketch.update_batch([" ".join(shingle).encode() for shingle in shingles(text)])
    return sketch.hashvalues


def our_signature(text: str, num_perm: int) -> np.ndarray:
    return signature(shingle_hashes(collapse_whitespace(text.encode()), 5), num_perm)


@pytest.mark.parametrize("num_perm", [1, 112, 128, 256])
@pytest.mark.parametrize("words", [1, 4, 5, 6, 40, 1500])
def test_signatures_equal_datasketchs_bit_for_bit(words: int, num_perm: int) -> None:
    text = document(random.Random(words), words)
    ours = our_signature(text, num_perm)
    assert ours.dtype == np.uint32
    assert ours.tolist() == datasketch_signature(text, num_perm).tolist()


@settings(max_examples=50)
@given(st.lists(st.integers(0, 2**32 - 1), max_size=40), st.integers(1, 16))
def test_any_hashes_in_any_blocks_give_datasketchs_signature(hashes: list[int], block: int) -> None:
    sketch = MinHash(32, hashfunc=lambda value: value)
    sketch.update_batch(hashes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minhash, "_BLOCK", block)
        assert signature(np.array(hashes, np.uint32), 32).tolist() == sketch.hashvalues.tolist()


def test_the_estimate_is_datasketchs_and_close_to_the_exact_similarity() -> None:
    rng = random.Random(0)
    texts = [document(rng, 400)]
    texts += [edited(texts[0], rng, changes) for changes in (0, 3, 10, 40)]
    sketches = [MinHash(hashvalues=our_signature(text, 128), scheme="affine32") for text in texts]
    signatures = np.stack([sketch.hashvalues for sketch in sketches])
    estimates = estimated_similarity(signatures, np.zeros(4, np.int64), np.arange(1, 5))
    assert estimates.tolist() == [sketches[0].jaccard(sketch) for sketch in sketches[1:]]
    exact = [jaccard(texts[0], text) for text in texts[1:]]
    assert np.abs(estimates - exact).max() < 4 * np.sqrt(0.25 / 128)
    assert exact[0] == 1.0 > exact[-1] > 0
