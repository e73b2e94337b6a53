"""Hashes, against the same definitions in plain Python integers."""

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.corpus import hashing
from megagpt.corpus.hashing import collapse_whitespace, mix64, shingle_hashes, text_hash

MASK = (1 << 64) - 1
PROSE = st.lists(st.sampled_from([b"a", b"bc", b"\xc3\xa9t\xc3\xa9", b" ", b"  ", b"\n", b"\t ", b"\f\v\r"])).map(
    b"".join
)


def python_mix64(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def python_shingle_hash(shingle: bytes) -> int:
    """The documented formula for one run of words, byte by byte."""
    total = sum((byte + 1) * pow(0x9E3779B97F4A7C15, i, 1 << 64) for i, byte in enumerate(shingle)) & MASK
    return python_mix64(total) >> 32


def python_shingles(text: bytes, size: int) -> list[bytes]:
    words = text.split()
    return [b" ".join(words[i : i + size]) for i in range(max(1, len(words) - size + 1))] if words else []


@given(PROSE)
def test_collapsing_whitespace_leaves_the_words_with_one_space_between(text: bytes) -> None:
    assert collapse_whitespace(text).tobytes() == b" ".join(text.split())


@given(PROSE)
def test_the_text_hash_is_xxh3_of_the_words_in_two_halves(text: bytes) -> None:
    low, high = text_hash(collapse_whitespace(text))
    assert high << 64 | low == xxhash.xxh3_128_intdigest(b" ".join(text.split()))


@given(st.lists(st.integers(0, MASK), min_size=1))
def test_mix64_is_splitmix64s_finalizer(values: list[int]) -> None:
    assert mix64(np.array(values, np.uint64)).tolist() == [python_mix64(value) for value in values]


@settings(max_examples=200)
@given(PROSE, st.integers(1, 7))
def test_shingle_hashes_are_those_of_each_run_of_words_alone(text: bytes, size: int) -> None:
    expected = [python_shingle_hash(shingle) for shingle in python_shingles(text, size)]
    assert shingle_hashes(collapse_whitespace(text), size).tolist() == expected


@given(st.text(st.sampled_from("ab \n\u00e9\u4e2d\U0001f44d")), st.integers(1, 7))
def test_character_shingle_hashes_are_those_of_each_run_of_characters_alone(text: str, size: int) -> None:
    words = " ".join(text.split())
    runs = [words[i : i + size] for i in range(max(1, len(words) - size + 1))] if words else []
    expected = []
    for run in runs:
        terms = ((ord(c) + 1) * pow(0x9E3779B97F4A7C15, i, 1 << 64) for i, c in enumerate(run))
        expected.append(python_mix64(sum(terms) & MASK) >> 32)
    assert shingle_hashes(collapse_whitespace(text.encode()), size, "characters").tolist() == expected


@pytest.mark.parametrize("block", [1, 2, 3, 7])
def test_shingle_hashes_do_not_depend_on_the_block_that_is_hashed_at_once(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = collapse_whitespace(b"the quick brown fox jumps over the lazy dog and a longer-than-a-block-word end")
    expected = shingle_hashes(words, 5).tolist()
    monkeypatch.setattr(hashing, "_BLOCK", block)
    hashing._powers.cache_clear()
    try:
        assert shingle_hashes(words, 5).tolist() == expected
    finally:
        hashing._powers.cache_clear()


def test_a_text_of_many_blocks_hashes_as_its_shingles_do() -> None:
    text = b"x" * 100_000 + b" one two three four " + b"y" * 100_000 + b" five six"
    picked = shingle_hashes(collapse_whitespace(text), 5)
    assert picked.tolist() == [python_shingle_hash_fast(shingle) for shingle in python_shingles(text, 5)]


def python_shingle_hash_fast(shingle: bytes) -> int:
    """The formula by Horner's rule from the end, for long shingles."""
    total = 0
    for byte in reversed(shingle):
        total = (total * 0x9E3779B97F4A7C15 + byte + 1) & MASK
    return python_mix64(total) >> 32
