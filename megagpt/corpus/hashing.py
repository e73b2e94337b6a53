"""Hashes that the stages share: of whole texts, of numbers, and of runs of words.

A text is hashed after whitespace was collapsed, so that copies that differ in line breaks or indentation only are
equal. Every function gives the same value on every machine: splits, shuffles and duplicates depend on them.
"""

import functools
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

UInt64 = npt.NDArray[np.uint64]

_SPACE = np.uint8(32)
_IS_SPACE = np.isin(np.arange(256), list(b" \t\n\r\v\f"))
_RADIX = 0x9E3779B97F4A7C15  # of the polynomial over bytes; odd, so that it has an inverse modulo 2^64
_BLOCK = 1 << 16  # bytes hashed at once, so that a block's arrays stay in the processor's cache


def collapse_whitespace(text: bytes) -> npt.NDArray[np.uint8]:
    """The words of a UTF-8 text with one space between them, as bytes.

    A word is what `bytes.split` says: it ends at ASCII whitespace, so that all Unicode spaces are part of words.
    """
    padded = np.frombuffer(
        b" " + text, np.uint8
    )  # the first byte is a space: leading whitespace is repeated whitespace
    space = _IS_SPACE[padded]
    kept = np.where(space, _SPACE, padded)[1:][~(space[1:] & space[:-1])]
    return kept[:-1] if kept.size and kept[-1] == _SPACE else kept


def text_hash(words: npt.NDArray[np.uint8]) -> tuple[int, int]:
    """128-bit XXH3 of a text with collapsed whitespace, as (low, high) halves of 64 bits."""
    value = xxhash.xxh3_128_intdigest(words.data)
    return value & (1 << 64) - 1, value >> 64


def mix64(values: npt.ArrayLike) -> UInt64:
    """A fixed bijection on 64 bits that makes every output bit depend on every input bit (SplitMix64's finalizer)."""
    mixed = np.asarray(values, np.uint64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def shingle_hashes(
    words: npt.NDArray[np.uint8], size: int, unit: Literal["words", "characters"] = "words"
) -> npt.NDArray[np.uint32]:
    """32-bit hash of every run of `size` words, or characters, of a text with collapsed whitespace (runs).

    The upper half of `run_hashes` or `character_run_hashes`.
    """
    hashes = run_hashes(words, size) if unit == "words" else character_run_hashes(words, size)
    return (hashes >> np.uint64(32)).astype(np.uint32)


def character_run_hashes(words: npt.NDArray[np.uint8], size: int) -> UInt64:
    """64-bit hash of every run of `size` characters of a text with collapsed whitespace (runs).

    The hash of a run is mix64(sum of (code point i + 1) * radix^i modulo 2^64). A text of fewer characters is one run;
    an empty text has none.
    """
    characters = np.frombuffer(words.tobytes().decode().encode("utf-32-le"), np.uint32).astype(np.uint64)
    if not characters.size:
        return characters
    size = min(size, characters.size)
    runs = characters.size - size + 1
    sums = np.zeros(runs, np.uint64)
    for place, power in enumerate(_powers(_RADIX)[:size]):
        sums += (characters[place : place + runs] + np.uint64(1)) * power
    return mix64(sums)


def run_hashes(words: npt.NDArray[np.uint8], size: int) -> UInt64:
    """64-bit hash of every run of `size` words of a text with collapsed whitespace (max(1, words - size + 1)).

    The hash of a run, with single spaces between its words as bytes b, is mix64(sum of (b[i] + 1) * radix^i modulo
    2^64). A text of fewer words is one run; an empty text has none.
    """
    return mix64(WordSums.of(words).runs(size)) if words.size else np.empty(0, np.uint64)


class WordSums(NamedTuple):
    """Prefix sums of (b[i] + 1) * radix^i over the bytes of a text, at its words: they give sums over runs of words."""

    begins: UInt64
    """The sum before each word's first byte (words)."""
    ends: UInt64
    """The sum after each word's last byte (words)."""
    inverses: UInt64
    """1 / radix^(position of each word's first byte) (words)."""

    def runs(self, size: int) -> UInt64:
        """The sum of every run of `size` words, as if the text began with it; a text of fewer words is one run."""
        runs = max(1, self.begins.size - size + 1)
        last = min(size, self.begins.size) - 1
        return (self.ends[last:] - self.begins[:runs]) * self.inverses[:runs]

    @classmethod
    def of(cls, words: npt.NDArray[np.uint8]) -> "WordSums":
        """Those of a text with collapsed whitespace that is not empty."""
        powers, inverse_powers = _powers(_RADIX), _powers(pow(_RADIX, -1, 1 << 64))
        begins, ends = [np.zeros(1, np.uint64)], []
        inverses = [np.ones(1, np.uint64)]
        total = 0  # of all blocks before this one
        for start in range(0, words.size, _BLOCK):
            block = words[start : start + _BLOCK]
            sums = np.zeros(block.size + 1, np.uint64)  # sums[i]: of the block's bytes before block[i], not yet scaled
            np.multiply(block.astype(np.uint64) + np.uint64(1), powers[: block.size], out=sums[1:])
            np.cumsum(sums, out=sums)
            scale = pow(_RADIX, start, 1 << 64)
            inverse_scale = pow(_RADIX, -(start + 1), 1 << 64)  # a word begins one byte after its space
            spaces = np.flatnonzero(block == _SPACE)
            ends.append(np.uint64(total) + np.uint64(scale) * sums[spaces])
            begins.append(np.uint64(total) + np.uint64(scale) * sums[spaces + 1])
            inverses.append(np.uint64(inverse_scale) * inverse_powers[spaces])
            total = (total + scale * int(sums[-1])) % (1 << 64)
        ends.append(np.array([total], np.uint64))
        return cls(np.concatenate(begins), np.concatenate(ends), np.concatenate(inverses))


@functools.cache
def _powers(base: int) -> UInt64:
    """base^0, base^1, ... modulo 2^64 (block)."""
    factors = np.full(_BLOCK, base, np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)
