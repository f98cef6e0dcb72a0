"""The global order: which window of a corpus is the i-th sequence that training reads.

The order is a pure function of (seed, regions, context). It is computed, not drawn: the i-th sequence is known without
the ones before it, so a position in the order is one integer, and a resume at any step, on any number of processes,
replays nothing. Hashes (BLAKE2b) stand where a random generator would, since those streams may change between releases.

A region of N tokens is read in epochs. An epoch lays floor(N / context) disjoint windows on the region from a random
phase, wrapping at its end, and visits them in a random order: each token is read at most once, and N mod context of
them (other ones in every epoch) not at all.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

_MIXTURE_SLOTS = 1000
_ROUNDS = 6


def stable_hash(*parts: str | int) -> int:
    """64 bits that depend on the parts alone: the same on every machine, process and release."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")


class Permutation:
    """A keyed permutation of range(size) that is evaluated one index at a time, without a table.

    A Feistel network over the next even power of two, walked until it lands inside (Black and Rogaway, "Ciphers with
    arbitrary finite domains", 2002): a few microseconds an index, for any size.
    """

    def __init__(self, size: int, *key: str | int) -> None:
        self.size = size
        self.key = stable_hash(*key)
        self.half_bits = max(2, ((size - 1).bit_length() + 1) // 2)

    def __call__(self, index: int) -> int:
        mask = (1 << self.half_bits) - 1
        while True:
            left, right = index >> self.half_bits, index & mask
            for turn in range(_ROUNDS):
                left, right = right, left ^ (stable_hash(self.key, turn, right) & mask)
            index = (left << self.half_bits) | right
            if index < self.size:
                return index


@dataclass(frozen=True)
class Region:
    """A stretch [start, stop) of a split whose windows wrap inside it, drawn in proportion to its weight."""

    start: int
    stop: int
    weight: float = 1.0
    name: str = ""

    @property
    def length(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Window:
    """One sequence: `context` tokens from `start`, going on at `region.start` when the region ends."""

    start: int
    region: Region

    def spans(self, begin: int, end: int) -> list[tuple[int, int, int]]:
        """Where the window's positions [begin, end) lie: (first token, end, window position of the first), in order."""
        spans = []
        while begin < end:
            first = self.region.start + (self.start - self.region.start + begin) % self.region.length
            stop = min(first + end - begin, self.region.stop)
            spans.append((first, stop, begin))
            begin += stop - first
        return spans


class GlobalOrder:
    """The infinite sequence of training windows.

    With several regions (a mixture) every 1,000 consecutive sequences hold each region in proportion to its weight,
    rounded to a thousandth and at least one, in a random order.
    """

    def __init__(self, regions: Sequence[Region], context: int, seed: int) -> None:
        self.regions = list(regions)
        self.context = context
        self.seed = seed
        self.shares = apportion([region.weight for region in self.regions], _MIXTURE_SLOTS)
        self.offsets = [0, *accumulate(self.shares)]

    def window(self, sequence: int) -> Window:
        """The window that is the `sequence`-th of the order, counted from 0."""
        which = 0
        if len(self.regions) > 1:
            block, place = divmod(sequence, _MIXTURE_SLOTS)
            slot = Permutation(_MIXTURE_SLOTS, self.seed, "mixture", block)(place)
            which = bisect_right(self.offsets, slot) - 1
            sequence = block * self.shares[which] + slot - self.offsets[which]
        region = self.regions[which]
        num_windows = region.length // self.context
        epoch, place = divmod(sequence, num_windows)
        phase = stable_hash(self.seed, "phase", which, epoch) % region.length
        number = Permutation(num_windows, self.seed, "windows", which, epoch)(place)
        return Window(region.start + (phase + number * self.context) % region.length, region)


def spread(regions: Sequence[Region], context: int, count: int) -> list[Window]:
    """At most `count` disjoint windows spread evenly over the regions: the held-out sequences, the same for any seed.

    Regions shorter than the context give none; fewer than `count` come back where the regions hold no more.
    """
    regions = [region for region in regions if region.length >= context]
    windows = []
    for region, share in zip(regions, apportion([region.weight for region in regions], count), strict=True):
        num_windows = min(share, region.length // context)
        stride = region.length // num_windows if num_windows else 0
        windows += [Window(region.start + number * stride, region) for number in range(num_windows)]
    return windows


def apportion(weights: Sequence[float], total: int) -> list[int]:
    """Split `total` slots in proportion to the weights: largest remainders, at least one each while they last."""
    exact = [weight / sum(weights) * total for weight in weights]
    shares = [max(1, int(share)) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda which: (int(exact[which]) - exact[which], which))
    for which in by_remainder[: max(0, total - sum(shares))]:
        shares[which] += 1
    while sum(shares) > total:
        shares[max(range(len(shares)), key=shares.__getitem__)] -= 1
    return shares
