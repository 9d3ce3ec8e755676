"""A pseudo-random order of any number of items, computed item by item: nothing is stored.

A Feistel network (Luby and Rackoff 1988) with keyed round functions is a permutation of the numbers
of 2h bits. To permute n of them, results of n or more are permuted again until one is below n
("cycle walking", Black and Rogaway 2002). That is a permutation of [0, n), and since 2h bits hold
at most 4n numbers (n > 1), a number needs 4 evaluations on average at most.
"""

import hashlib
import json

import numpy as np

_ROUNDS = 8
_FACTOR = np.uint64(0xD6E8FEB86659FD93)
"""Odd multiplier of a 64-bit mixing function (xorshift and multiply)."""
_HALF_WORD = np.uint64(32)


class KeyedPermutation:
    """The order of `count` items that belongs to a key, such as (seed, name, epoch)."""

    def __init__(self, count: int, *key: int | str) -> None:
        """count: 1 to 2^62. Equal keys give equal orders."""
        self.count = count
        self._half = np.uint64(max((count - 1).bit_length() + 1, 2) // 2)
        self._mask = np.uint64((1 << int(self._half)) - 1)
        digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = np.frombuffer(digest, "<u8")

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """The items at `places` (int64, in [0, count)) of the order, int64."""
        values = self._permuted(places.astype(np.uint64))
        outside = np.flatnonzero(values >= self.count)
        while len(outside):
            values[outside] = self._permuted(values[outside])
            outside = outside[values[outside] >= self.count]
        return values.astype(np.int64)

    def _permuted(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half, values & self._mask
        for key in self._keys:
            mixed = (right ^ key) * _FACTOR
            mixed = (mixed ^ (mixed >> _HALF_WORD)) * _FACTOR
            mixed ^= mixed >> _HALF_WORD
            left, right = right, left ^ (mixed & self._mask)
        return (left << self._half) | right
