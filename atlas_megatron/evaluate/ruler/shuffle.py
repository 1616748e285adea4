"""A random order of 0..n-1 of which any part is computed on its own, so that a long list is never in memory."""

from __future__ import annotations

import numpy as np

ROUNDS = 6


class Shuffle:
    """A permutation of range(count): a Feistel network over twice some bits, walked until it lands below count."""

    def __init__(self, count: int, generator: np.random.Generator) -> None:
        self.count = count
        # Halves of at least 4 bits: fewer leave the round function too little to mix.
        self._bits = np.uint64(max(4, ((max(count, 2) - 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._bits)) - 1)
        self._keys = generator.integers(1, 2**63, size=(ROUNDS, 2), dtype=np.uint64)

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """The numbers at these places, int64."""
        numbers = self._once(places.astype(np.uint64))
        outside = np.flatnonzero(numbers >= self.count)
        while len(outside):
            numbers[outside] = self._once(numbers[outside])
            outside = outside[numbers[outside] >= self.count]
        return numbers.astype(np.int64)

    def _once(self, numbers: np.ndarray) -> np.ndarray:
        left, right = numbers >> self._bits, numbers & self._mask
        for factor, offset in self._keys:
            # The products wrap around 64 bits; the high bits, into which all others went, are the well mixed ones.
            mixed = (right + offset) * (factor | np.uint64(1))
            mixed = (mixed ^ (mixed >> np.uint64(31))) * (offset | np.uint64(1))
            left, right = right, left ^ (mixed >> (np.uint64(64) - self._bits))
        return (left << self._bits) | right
