"""First-order linear recurrences in place, over the first dimension of a buffer: x[t] += a[t] x[t-1], either way.

One call a token is the least arithmetic, but where a token's state is small the calls cost more than it does, and none
is large enough for two cores. So neighbours are combined first: two tokens with decays a and b act on what enters as
one token of decay ab. Each level leaves half as many tokens for the plain loop and adds three calls over all the others
(the work-efficient scan of Blelloch, 1990, stopped after a few levels).

Legend: S tokens, X all other elements of a state.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

# From this many elements a token on, a single token's call is shared out over cores, and the plain loop is best.
_LARGE_STATE = 1 << 15
# Elements of one buffer of a segment: half a dozen of them stay in the last-level cache.
_SEGMENT_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class SegmentPlan:
    """How a sequence is walked: `segment` tokens at a time, neighbours combined `levels` times before the loop."""

    segment: int
    levels: int

    @staticmethod
    def choose(length: int, state_elements: int, device: torch.device) -> "SegmentPlan":
        """Segments that stay in cache; as many levels as pay for themselves."""
        if device.type != "cpu":  # launches are dear and memory is plenty
            segment = min(4096, max(256, (1 << 25) // max(state_elements, 1)))
            return SegmentPlan(min(segment, max(length, 1)), 6 if length > 64 else 0)
        segment = min(2048, max(64, _SEGMENT_ELEMENTS // max(state_elements, 1)), max(length, 1))
        return SegmentPlan(segment, 0 if state_elements >= _LARGE_STATE or segment < 64 else 4)

    def padded(self, tokens: int) -> int:
        """Tokens rounded up to what can be halved `levels` times."""
        return -(-tokens >> self.levels) << self.levels


class Recurrence:
    """x[t + 1] += decay[t] x[t] for t = 0, 1, ... S-1; reversed, x[t] += decay[t] x[t + 1] for t = S-1, ... 0.

    `x` (S + 1, ...) has one row more than `decay` (S, ...): its first row, reversed its last, is the state that comes
    in. S must be a multiple of 2 ** levels; `scratch` (S, ...) is overwritten by products of decays. The views of all
    steps are made here, once: in a loop over segments making them anew would cost as much as the arithmetic. `run`
    computes on whatever the buffers then hold.
    """

    def __init__(self, x: Tensor, decay: Tensor, scratch: Tensor, levels: int, *, reverse: bool = False) -> None:
        self._combine: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = []
        self._spread: list[tuple[Tensor, Tensor, Tensor]] = []
        for _ in range(levels):
            even, odd = decay[0::2], decay[1::2]
            product, scratch = scratch.split([len(even), len(scratch) - len(even)])
            middle, outer, far = x[1::2], x[0:-1:2], x[2::2]
            if reverse:
                self._combine.append((outer, even, middle, odd, product))
                self._spread.append((middle, odd, far))
            else:
                self._combine.append((far, odd, middle, even, product))
                self._spread.append((middle, even, outer))
            x, decay = x[0::2], product
        self._spread.reverse()
        rows, factors = list(x.unbind(0)), list(decay.unbind(0))
        if reverse:
            rows.reverse()
            factors.reverse()
        self._loop = [(now, factor, before) for (before, now), factor in zip(pairwise(rows), factors, strict=True)]

    def run(self) -> None:
        for now, factor, before, other_factor, product in self._combine:
            now.addcmul_(factor, before)
            torch.mul(factor, other_factor, out=product)
        for now, factor, before in self._loop:
            now.addcmul_(factor, before)
        for now, factor, before in self._spread:
            now.addcmul_(factor, before)
