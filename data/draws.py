"""Random numbers for examples that are made up: the same on every machine, process and release.

Only the raw stream of PCG64 is used, which NumPy promises to keep; what its `Generator` makes of it may change.
"""

import numpy as np

from .order import stable_hash


class Draws:
    """A stream of random numbers that depends on `key` alone."""

    def __init__(self, *key: str | int) -> None:
        self._bits = np.random.PCG64(stable_hash(*key))

    def integers(self, below: int, size: int) -> np.ndarray:
        """`size` independent int64 in [0, below), uniform to within below / 2**63."""
        return (self._raw(size) % np.uint64(below)).astype(np.int64)

    def integer(self, below: int) -> int:
        return int(self.integers(below, 1)[0])

    def subset(self, size: int, count: int) -> np.ndarray:
        """`count` different numbers of range(size), in random order."""
        return np.argsort(self._raw(size), kind="stable")[:count]

    def weighted_subset(self, weights: np.ndarray, count: int) -> np.ndarray:
        """`count` different indices in the order in which drawing one after the other, each by its weight, gives them.

        By exponential waiting times (Efraimidis and Spirakis, "Weighted random sampling with a reservoir", 2006).
        """
        uniform = (self._raw(len(weights)) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return np.argsort(-np.log1p(-uniform) / weights, kind="stable")[:count]

    def _raw(self, size: int) -> np.ndarray:
        return np.asarray(self._bits.random_raw(size), dtype=np.uint64)
