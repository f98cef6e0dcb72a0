"""Ring attention: keys and values travel round the processes while each attends with its own queries.

Queries, keys and values lie in a layout with equal work (see layout.py). The next keys travel while the present ones
are used. In the backward pass the gradients of keys and values travel behind them and arrive home after a full round.
Liu et al. (arXiv 2310.01889); the balanced order after Brandon et al. (2311.09431).

Shapes: B batch, W tokens here, S tokens of the visiting keys, H query heads, G key/value heads, K head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..kernels.attention import Positions, attend_, attend_backward_, nothing_seen
from ..kernels.autograd import first_order
from .collectives import Pending, exchange
from .layout import Layout
from .shard import SequenceShard


@dataclass(frozen=True)
class Ring:
    """The processes `ranks` of the shard's group in ring order, and which tokens each has."""

    shard: SequenceShard
    layout: Layout
    ranks: tuple[int, ...]
    document_begin: Tensor | None

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def place(self) -> int:
        return self.ranks.index(self.shard.rank)

    def visits(self, x: Tensor, motion: str) -> Iterator[tuple[int, Tensor]]:
        """(whose, keys) of every place in turn, one's own `x` first. The next ones travel while these are used."""
        for step in range(self.size):
            visitor = (self.place - step) % self.size
            pending = self.pass_on(x, visitor, motion) if step < self.size - 1 else None
            yield visitor, x
            if pending is not None:
                x = self.received(pending)

    def pass_on(self, x: Tensor, visitor: int, motion: str) -> Pending[list[Tensor]]:
        """Hand `x` (of `visitor`) to the next process and receive the previous one's from the one before."""
        after, before = self.ranks[(self.place + 1) % self.size], self.ranks[self.place - 1]
        parts = [x.new_empty(0)] * self.shard.size
        shapes: list[tuple[int, ...]] = [(0,)] * self.shard.size
        parts[after] = x
        coming = self.layout.tokens((visitor - 1) % self.size)
        shapes[before] = (x.shape[0], coming, *x.shape[2:])
        return exchange(parts, shapes, self.shard, motion)

    def received(self, pending: Pending[list[Tensor]]) -> Tensor:
        return pending.wait()[self.ranks[self.place - 1]]

    def meetings(self, visitor: int) -> list[tuple[slice, slice, Positions]]:
        """(queries here, keys there, where they stand) of every pair of tiles that can see each other."""
        found = []
        mine, theirs = self.layout.spans[self.place], self.layout.spans[visitor]
        for (query_start, query_stop), queries in zip(mine, _slices(mine), strict=True):
            begin = None if self.document_begin is None else self.document_begin[:, queries]
            earliest = 0 if begin is None else int(begin.min())
            for (key_start, key_stop), keys in zip(theirs, _slices(theirs), strict=True):
                if key_start < query_stop and key_stop > earliest:
                    found.append((queries, keys, Positions(query_start, key_start, begin)))
        return found


def _slices(spans: tuple[tuple[int, int], ...]) -> list[slice]:
    offsets = [0]
    for start, stop in spans:
        offsets.append(offsets[-1] + stop - start)
    return [slice(a, b) for a, b in pairwise(offsets)]


def ring_attention(q_BWHK: Tensor, kv_BW2GK: Tensor, ring: Ring, scale: float) -> Tensor:
    """Causal attention over all processes of the ring: (B, W, H, K)."""
    result = _RingAttention.apply(q_BWHK, kv_BW2GK, ring, scale)
    assert isinstance(result, Tensor)
    return result


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, kv: Tensor, ring: Ring, scale: float) -> Tensor:
        out, lse = nothing_seen(q)
        for visitor, visiting in ring.visits(kv, "ring.forward"):
            k, v = visiting.unbind(2)
            for queries, keys, where in ring.meetings(visitor):
                attend_(out[:, queries], lse[:, queries], q[:, queries], k[:, keys], v[:, keys], where, scale)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, kv, out, lse)
        ctx.ring, ctx.scale = ring, scale
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, out, lse = ctx.saved_tensors
        ring: Ring = ctx.ring
        grad_out, wide = grads[0].to(out.dtype), lse.dtype
        grad_q, travelling = torch.zeros_like(q, dtype=wide), None
        for visitor, visiting in ring.visits(kv, "ring.backward"):
            grad_kv = torch.zeros_like(visiting, dtype=wide)
            _accumulate(grad_q, grad_kv, grad_out, q, visiting, out, lse, ring, visitor, ctx.scale)
            if travelling is not None:  # what the processes before found for these keys
                grad_kv += ring.received(travelling)
            travelling = ring.pass_on(grad_kv, visitor, "ring.backward")
        assert travelling is not None
        return grad_q.to(q.dtype), ring.received(travelling).to(kv.dtype), None, None


def _accumulate(
    grad_q: Tensor,
    grad_kv: Tensor,
    grad_out: Tensor,
    q: Tensor,
    kv: Tensor,
    out: Tensor,
    lse: Tensor,
    ring: Ring,
    visitor: int,
    scale: float,
) -> None:
    """Add what the visiting keys contribute to the gradients of the queries here and of those keys."""
    k, v = kv.unbind(2)
    grad_k, grad_v = grad_kv.unbind(2)
    for queries, keys, where in ring.meetings(visitor):
        attend_backward_(
            (grad_q[:, queries], grad_k[:, keys], grad_v[:, keys]),
            grad_out[:, queries],
            None,
            (q[:, queries], k[:, keys], v[:, keys]),
            out[:, queries],
            lse[:, queries],
            where,
            scale,
        )
