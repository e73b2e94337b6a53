"""The order of samples: a keyed permutation of [0, length) that is computed, never built, stored or shuffled.

A Feistel network (Luby & Rackoff 1988) permutes [0, 2^bits), the smallest such range that holds `length` numbers;
cycle walking (Black & Rogaway 2002) applies it again while the result is not below `length`: fewer than two
applications a number on average. Time and memory are O(1) a number at any length, from 1 to 2^63.

The sample order of every run hangs on these definitions; whoever changes one raises ORDER_VERSION. Modulo 2^64:
    G            = 0x9E3779B97F4A7C15
    mix(z)       : z ^= z >> 30; z *= 0xBF58476D1CE4E5B9; z ^= z >> 27; z *= 0x94D049BB133111EB; z ^= z >> 31
                   (the output function of splitmix64, Steele et al. 2014)
    round key    k(r) = mix(key + (r + 1) * G) for r = 0 ... ROUNDS - 1
    round r      of x = left * 2^w + right, where right has w = ceil(bits / 2) bits and left the others:
                   even r: left ^= mix(right + k(r)), odd r: right ^= mix(left + k(r)), cut to the width of the half
    epoch key    = mix(mix(mix(seed + G) + epoch + G) + purpose + G), purpose 0 for permutations, 1 for offsets
"""

import numpy as np
import numpy.typing as npt

ORDER_VERSION = 1
ROUNDS = 12
_G = np.uint64(0x9E3779B97F4A7C15)
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))
_FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_PERMUTATION, _OFFSET = 0, 1

UInt64Array = npt.NDArray[np.uint64]


def permute(indices: npt.ArrayLike, length: int, key: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Where the permutation of [0, length) named by `key` puts `indices`.

    indices: integers in [0, length), shape (count). key: one for all, or one for each index, shape (count).
    Returns shape (count). ValueError: an index lies outside [0, length).
    """
    values = np.atleast_1d(np.asarray(indices)).astype(np.uint64)
    if (values >= length).any():
        raise ValueError(f"indices must lie in 0 to {length - 1}")
    round_numbers = np.arange(1, ROUNDS + 1, dtype=np.uint64)[:, None]
    round_keys = np.broadcast_to(
        _mix(np.atleast_1d(np.asarray(key, np.uint64)) + round_numbers * _G), (ROUNDS, values.size)
    )
    bits = (length - 1).bit_length()
    outside = np.arange(values.size)
    while outside.size:
        values[outside] = _feistel(values[outside], bits, round_keys[:, outside])
        outside = outside[values[outside] >= length]
    return values.astype(np.int64)


def permutation_key(seed: int, epochs: npt.ArrayLike) -> UInt64Array:
    """Key of the permutation of each epoch, shape (count)."""
    return _epoch_key(seed, epochs, _PERMUTATION)


def epoch_offset(seed: int, epochs: npt.ArrayLike, choices: int) -> npt.NDArray[np.int64]:
    """A number in [0, choices) for each epoch, shape (count)."""
    return (_epoch_key(seed, epochs, _OFFSET) % np.uint64(choices)).astype(np.int64)


def _epoch_key(seed: int, epochs: npt.ArrayLike, purpose: int) -> UInt64Array:
    key = np.zeros(1, np.uint64)
    for part in (np.uint64(seed), np.atleast_1d(np.asarray(epochs)).astype(np.uint64), np.uint64(purpose)):
        key = _mix(key + part + _G)
    return key


def _feistel(values: UInt64Array, bits: int, round_keys: UInt64Array) -> UInt64Array:
    """Permute numbers of `bits` bits, shape (count), with round keys of shape (ROUNDS, count)."""
    right_bits = np.uint64(bits - bits // 2)
    left_mask, right_mask = np.uint64((1 << bits // 2) - 1), np.uint64((1 << int(right_bits)) - 1)
    left, right = values >> right_bits, values & right_mask
    for round_number, key in enumerate(round_keys):
        if round_number % 2 == 0:
            left = left ^ (_mix(right + key) & left_mask)
        else:
            right = right ^ (_mix(left + key) & right_mask)
    return (left << right_bits) | right


def _mix(z: UInt64Array) -> UInt64Array:
    """The output function of splitmix64: every bit of the result hangs on every bit of `z`."""
    z = (z ^ (z >> _SHIFTS[0])) * _FACTORS[0]
    z = (z ^ (z >> _SHIFTS[1])) * _FACTORS[1]
    return z ^ (z >> _SHIFTS[2])
