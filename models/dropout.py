"""Dropout that does not depend on how a step is split: whether a number is dropped follows from where it stands alone.

That is the run's seed, the step, the sequence's row in the global batch, the token's position in the whole sequence and
the feature; not which process holds it, nor what was drawn before. So every mesh drops the same numbers, and so does a
resumed run.

Each row has a stream of random bits, SplitMix64's (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014), any place of which is computed at once: number i is mix(key + (i + 1) golden), modulo 2^64.
Integers alone, so that every device makes the same. One number of 64 bits decides two features.

Shapes: B rows here, T tokens of this shard, D features, C = ceil(D / 2) pairs of them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


def as_int64(number: int) -> int:
    """`number` modulo 2^64, as int64 has it."""
    return (number + 2**63) % 2**64 - 2**63


GOLDEN, FIRST, SECOND = (as_int64(number) for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
"""SplitMix64's constants."""
DRAWN_AT_ONCE = 1 << 22
"""Numbers of 64 bits that exist at one time."""


@dataclass(frozen=True)
class DropoutKey:
    """What is drawn in one step: of the run's `seed`, the `step`, and from `first_row` of the global batch on."""

    seed: int
    step: int
    first_row: int = 0

    def streams(self, rows: int, purpose: str = "dropout") -> list[int]:
        """The keys of `rows` rows' streams, int64; others for each purpose."""
        numbers = range(self.first_row, self.first_row + rows)
        return [_stream(f"{purpose}/{self.seed}/{self.step}/{number}") for number in numbers]


def dropout(x_BTD: Tensor, probability: float, key: DropoutKey, start: int) -> Tensor:
    """`x_BTD` with numbers zero with this probability, to 2^-32, and the others divided by 1 - `probability`.

    `start`: the global position of the first token here.
    """
    return (x_BTD / (1 - probability)).masked_fill(dropped(x_BTD, probability, key, start), 0)


def dropped(x_BTD: Tensor, probability: float, key: DropoutKey, start: int) -> Tensor:
    """Which numbers of `x_BTD` are dropped, (B, T, D) bool; arguments as of `dropout`."""
    rows, tokens, width = x_BTD.shape
    pairs = -(-width // 2)
    keys_B = torch.tensor(key.streams(rows), dtype=torch.int64).to(x_BTD.device, non_blocking=True)
    threshold = min(round(probability * 2**32), 2**32 - 1) - 2**31
    mask_BTD = torch.empty(x_BTD.shape, dtype=torch.bool, device=x_BTD.device)
    at_once = max(1, DRAWN_AT_ONCE // max(1, rows * pairs))
    for first in range(0, tokens, at_once):
        last = min(first + at_once, tokens)
        places = torch.arange((start + first) * pairs + 1, (start + last) * pairs + 1, device=x_BTD.device)
        draws_BTC = mix(keys_B[:, None, None] + (places * GOLDEN).view(-1, pairs))
        mask_BTD[:, first:last] = draws_BTC.view(torch.int32)[..., :width] < threshold
    return mask_BTD


def mix(draws: Tensor) -> Tensor:
    """SplitMix64's, in place. int64 wraps; its shifts carry the sign along, which is masked out."""
    draws.bitwise_xor_((draws >> 30).bitwise_and_(2**34 - 1)).mul_(FIRST)
    draws.bitwise_xor_((draws >> 27).bitwise_and_(2**37 - 1)).mul_(SECOND)
    return draws.bitwise_xor_((draws >> 31).bitwise_and_(2**33 - 1))


def _stream(name: str) -> int:
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
