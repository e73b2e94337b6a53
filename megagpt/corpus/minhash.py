"""MinHash signatures (Broder 1997) of word shingles, bit for bit those of datasketch 2's default scheme.

A document's signature is num_perm values of uint32: for each permutation h -> a * h + b modulo 2^32 (a odd) of the
premixed shingle hashes, the smallest value. The share of equal values in two signatures estimates the Jaccard
similarity of the documents' shingle sets, with a standard error of sqrt(J * (1 - J) / num_perm).
Cost: 4 * num_perm bytes a document, and about one multiplication, addition and comparison a shingle and permutation.
"""

import functools

import numpy as np
import numpy.typing as npt

UInt32 = npt.NDArray[np.uint32]

_LARGEST = np.uint32(0xFFFFFFFF)
_BLOCK = 1024  # shingles permuted at once, so that the products stay in the processor's cache
_PAIR_BLOCK = 1 << 14  # pairs compared at once, so that memory stays bounded


@functools.cache
def permutations(num_perm: int) -> tuple[UInt32, UInt32]:
    """datasketch's multipliers and summands for its default seed: (num_perm) each.

    Drawn as it draws them: importing it brings half of scipy, a third of the time that a command's start takes.
    """
    generator = np.random.RandomState(1)  # whose numbers numpy keeps the same for ever
    factors = generator.randint(0, 1 << 31, num_perm, np.uint32) * np.uint32(2) + np.uint32(1)
    return factors, generator.randint(0, 1 << 32, num_perm, np.uint32)


def signature(hashes: UInt32, num_perm: int) -> UInt32:
    """The MinHash signature (num_perm) of a set given by its elements' 32-bit hashes (elements), repeats allowed."""
    factors, summands = permutations(num_perm)
    mixed = _premix(hashes)
    smallest = np.full(num_perm, _LARGEST)
    products = np.empty((min(_BLOCK, mixed.size), num_perm), np.uint32)
    for start in range(0, mixed.size, _BLOCK):
        block = mixed[start : start + _BLOCK, None]
        permuted = products[: len(block)]
        np.multiply(block, factors, out=permuted)
        permuted += summands
        np.minimum(smallest, permuted.min(axis=0), out=smallest)
    return smallest


def estimated_similarity(
    signatures: UInt32, left: npt.NDArray[np.int64], right: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """The estimated Jaccard similarity of each pair left[i], right[i] of rows of `signatures`: (pairs), 0 to 1."""
    similarities = np.empty(left.size, np.float32)
    for start in range(0, left.size, _PAIR_BLOCK):
        block = slice(start, start + _PAIR_BLOCK)
        similarities[block] = row_similarity(signatures[left[block]], signatures[right[block]])
    return similarities


def row_similarity(left: UInt32, right: UInt32) -> npt.NDArray[np.float32]:
    """The estimated Jaccard similarity of each row to its counterpart, (rows, num_perm) both: (rows), 0 to 1."""
    return (left == right).mean(axis=1, dtype=np.float32)


def _premix(hashes: UInt32) -> UInt32:
    """MurmurHash3's 32-bit finalizer, which datasketch applies before permuting."""
    mixed = (hashes ^ (hashes >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return mixed ^ (mixed >> np.uint32(16))
