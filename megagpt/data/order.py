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

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

ORDER_VERSION = 1
ROUNDS = 12
_G = 0x9E3779B97F4A7C15
_SHIFTS = (30, 27, 31)
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_MASK = (1 << 64) - 1
_PERMUTATION, _OFFSET = 0, 1
FEW = 8
"""Numbers up to which Python's integers are faster than arrays, whose operations take a microsecond at any length."""

UInt64Array = npt.NDArray[np.uint64]


def permute(indices: npt.ArrayLike, length: int, key: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Where the permutation of [0, length) named by `key` puts `indices`.

    indices: integers in [0, length), shape (count). key: one for all, or one for each index, shape (count).
    Returns shape (count). ValueError: an index lies outside [0, length).
    """
    values = np.atleast_1d(np.asarray(indices)).astype(np.uint64)
    if (values >= length).any():
        raise ValueError(f"indices must lie in 0 to {length - 1}")
    keys = np.atleast_1d(np.asarray(key, np.uint64))
    bits = (length - 1).bit_length()
    outside = np.arange(values.size)
    if values.size > FEW:
        round_keys = _mix(keys + np.arange(1, ROUNDS + 1, dtype=np.uint64)[:, None] * np.uint64(_G))
        while outside.size > FEW:
            own_keys = round_keys if keys.size == 1 else round_keys[:, outside]
            walked = _feistel(values[outside], bits, list(own_keys), _mix)
            values[outside] = walked
            outside = outside[walked >= length]
    for index in outside.tolist():
        values[index] = permute_one(int(values[index]), length, int(keys[index if keys.size > 1 else 0]))
    return values.astype(np.int64)


def permute_one(index: int, length: int, key: int) -> int:
    """As `permute`, of one index in [0, length), by Python's integers."""
    bits, round_keys = (length - 1).bit_length(), _round_keys(key)
    while True:
        index = _feistel(index, bits, round_keys, _mix_one)
        if index < length:
            return index


def permutation_key(seed: int, epochs: npt.ArrayLike) -> UInt64Array:
    """Key of the permutation of each epoch, shape (count)."""
    return _epoch_keys(seed, epochs, _PERMUTATION)


def epoch_offset(seed: int, epochs: npt.ArrayLike, choices: int) -> npt.NDArray[np.int64]:
    """A number in [0, choices) for each epoch, shape (count)."""
    return (_epoch_keys(seed, epochs, _OFFSET) % np.uint64(choices)).astype(np.int64)


def place_one(seed: int, epoch: int, index: int, length: int, choices: int) -> tuple[int, int]:
    """Where the permutation of [0, length) of an epoch puts `index`, and the epoch's number in [0, choices)."""
    place = permute_one(index, length, _epoch_key(seed, epoch, _PERMUTATION))
    return place, _epoch_key(seed, epoch, _OFFSET) % choices


def _epoch_keys(seed: int, epochs: npt.ArrayLike, purpose: int) -> UInt64Array:
    numbers = np.atleast_1d(np.asarray(epochs)).astype(np.uint64)
    if numbers.size <= FEW:
        return np.array([_epoch_key(seed, number, purpose) for number in numbers.tolist()], np.uint64)
    begun = np.uint64((_mix_one(seed + _G) + _G) & _MASK)
    return _mix(_mix(numbers + begun) + np.uint64(purpose + _G))


@functools.lru_cache(maxsize=64)
def _epoch_key(seed: int, epoch: int, purpose: int) -> int:
    return _mix_one(_mix_one(_mix_one(seed + _G) + epoch + _G) + purpose + _G)


@functools.lru_cache(maxsize=64)
def _round_keys(key: int) -> list[int]:
    return [_mix_one(key + (number + 1) * _G) for number in range(ROUNDS)]


def _feistel(values: Any, bits: int, round_keys: Sequence[Any], mix: Callable[[Any], Any]) -> Any:
    """Permute a number of `bits` bits, or many, shape (count), with ROUNDS keys, each one for all or of this shape."""
    right_bits = bits - bits // 2
    left_mask, right_mask = (1 << bits // 2) - 1, (1 << right_bits) - 1
    left, right = values >> right_bits, values & right_mask
    for round_number, key in enumerate(round_keys):
        if round_number % 2 == 0:
            left = left ^ (mix(right + key) & left_mask)
        else:
            right = right ^ (mix(left + key) & right_mask)
    return (left << right_bits) | right


def _mix(z: UInt64Array) -> UInt64Array:
    """The output function of splitmix64: every bit of the result hangs on every bit of `z`, which is overwritten."""
    z ^= z >> _SHIFTS[0]
    z *= _FACTORS[0]
    z ^= z >> _SHIFTS[1]
    z *= _FACTORS[1]
    z ^= z >> _SHIFTS[2]
    return z


def _mix_one(z: int) -> int:
    """The same of one number, which may be larger than 2^64."""
    z &= _MASK
    z = (z ^ (z >> _SHIFTS[0])) * _FACTORS[0] & _MASK
    z = (z ^ (z >> _SHIFTS[1])) * _FACTORS[1] & _MASK
    return z ^ (z >> _SHIFTS[2])
