"""First-order linear recurrences in place, over the first dimension of a buffer: x[t] += a[t] x[t-1], either way.

Two ways to run the same recurrence. The plain loop makes one call per token and is the fastest where a token's state is
large. Where it is small the calls themselves dominate, so the tokens are cut into M chunks of K: all chunks advance
together, K calls for M*K tokens, then M calls carry the states from chunk to chunk.

Legend: S tokens (M chunks of K), X all other elements of a state.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

# Below this many elements a token, call overhead costs more than the arithmetic (measured in kernels.md, section 7).
_PLAIN_LOOP_ELEMENTS = 4096
# Elements of one length x state buffer of a segment: a few buffers of this size fit in a core's second-level cache.
_SEGMENT_ELEMENTS = 1 << 19


@dataclass(frozen=True)
class SegmentPlan:
    """How a sequence is walked: `segment` tokens at a time, in chunks of `chunk` tokens (1: the plain loop)."""

    segment: int
    chunk: int

    @staticmethod
    def choose(length: int, state_elements: int, device: torch.device) -> "SegmentPlan":
        """Segments that stay in cache; chunks where a token's state is too small for one call per token."""
        if device.type != "cpu":  # launches are dear and memory is plenty
            segment = min(4096, max(256, (1 << 25) // max(state_elements, 1)))
            return SegmentPlan(min(segment, max(length, 1)), 32 if length > 64 else 1)
        segment = min(2048, max(64, _SEGMENT_ELEMENTS // max(state_elements, 1)))
        segment = min(segment, max(length, 1))
        if state_elements >= _PLAIN_LOOP_ELEMENTS or segment < 64:
            return SegmentPlan(segment, 1)
        return SegmentPlan(segment, 16 if segment <= 512 else 32)

    def padded(self, tokens: int) -> int:
        """Tokens rounded up to whole chunks."""
        return -(-tokens // self.chunk) * self.chunk


def scan_forward(x: Tensor, decay: Tensor, chunk: int) -> None:
    """x[t + 1] += decay[t] * x[t] for t = 0, 1, ...; x has one row more than decay and x[0] is the incoming state."""
    if chunk > 1:
        _scan_chunks(x[0], x[1:], decay, chunk, reverse=False)
        return
    rows = x.unbind(0)
    for previous, current, factor in zip(rows, rows[1:], decay.unbind(0), strict=False):
        current.addcmul_(factor, previous)


def scan_backward(x: Tensor, decay: Tensor, chunk: int) -> None:
    """x[t] += decay[t] * x[t + 1] for t = S-1, S-2, ...; x has one row more than decay and its last row comes in."""
    if chunk > 1:
        _scan_chunks(x[-1], x[:-1], decay, chunk, reverse=True)
        return
    rows = x.unbind(0)
    for later, current, factor in zip(rows[:0:-1], rows[-2::-1], decay.unbind(0)[::-1], strict=True):
        current.addcmul_(factor, later)


def _scan_chunks(incoming: Tensor, x: Tensor, decay: Tensor, chunk: int, *, reverse: bool) -> None:
    num_chunks = x.shape[0] // chunk
    x_MKX = x.view(num_chunks, chunk, -1)
    decay_MKX = decay.view(num_chunks, chunk, -1)
    cumulative_MKX = decay_MKX.clone(memory_format=torch.contiguous_format)
    columns = list(zip(x_MKX.unbind(1), decay_MKX.unbind(1), cumulative_MKX.unbind(1), strict=True))
    if reverse:
        columns.reverse()
    for (x_before, _, product_before), (x_now, factor, product) in pairwise(columns):
        x_now.addcmul_(factor, x_before)
        product.mul_(product_before)
    # Each chunk ran from zero; now the true state enters each one, in order.
    end = 0 if reverse else chunk - 1
    carried_MX = torch.empty_like(x_MKX[:, 0])
    order = range(num_chunks - 1, -1, -1) if reverse else range(num_chunks)
    state = incoming.reshape(-1)
    ends, products, carried = x_MKX[:, end].unbind(0), cumulative_MKX[:, end].unbind(0), carried_MX.unbind(0)
    for m in order:
        carried[m].copy_(state)
        state = torch.addcmul(ends[m], products[m], state)
    x_MKX.addcmul_(cumulative_MKX, carried_MX.unsqueeze(1))
