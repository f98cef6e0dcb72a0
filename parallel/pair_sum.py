"""Sums over all earlier tokens of a function of two tokens: attention without a softmax, whose parts simply add.

    out_t = sum over tokens s <= t of t's document of pair(queries_t, keys_s)

Split along the sequence the keys travel round a ring, as in ring attention, with each process working on tiles of
equal work. In the backward pass every tile is computed again and the gradients of the keys travel behind them.

Shapes: B batch, T tokens here, W tokens of this process's tiles, S visiting keys, M, N, E features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels.attention import Positions
from ..kernels.autograd import first_order
from .layout import balanced, contiguous, relayout
from .ring import Ring
from .shard import SequenceShard

Pair = Callable[[Tensor, Tensor, Positions], Tensor]
"""(queries (B, W, M), keys (B, S, N), where they stand) -> (B, W, E), summed over the keys that each query sees: not
after it, not before its document. Differentiable in its arguments; what else it uses is not differentiated."""


def pair_sum(pair: Pair, queries_BTM: Tensor, keys_BTN: Tensor, shard: SequenceShard) -> Tensor:
    """The sums at this shard's tokens: (B, T, E), in float32 or better where parts are added up.

    Numbers per process, forward: at most T (M + N + E) to balance the work and T N (P - 1) round the ring.
    """
    device = queries_BTM.device
    if shard.size == 1:
        begin = shard.document_begin(device) if shard.document_starts is not None else None
        return pair(queries_BTM, keys_BTN, Positions(0, 0, begin))
    ranks = tuple(range(shard.size))
    outside, inside = contiguous(shard.bounds), balanced(shard.length, shard.size, shard.document_starts)
    begin = inside.document_begin(shard.rank, shard)
    joined = torch.cat([queries_BTM, keys_BTN], dim=-1)
    sizes = [queries_BTM.shape[-1], keys_BTN.shape[-1]]
    queries_BWM, keys_BWN = relayout(joined, shard, outside, inside, ranks).split(sizes, dim=-1)
    ring = Ring(shard, inside, ranks, None if begin is None else begin.to(device))
    sums = _PairSum.apply(queries_BWM.contiguous(), keys_BWN.contiguous(), ring, pair)
    assert isinstance(sums, Tensor)
    return relayout(sums, shard, inside, outside, ranks)


class _PairSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, ring: Ring, pair: Pair) -> Tensor:
        sums: Tensor | None = None
        for visitor, visiting in ring.visits(keys, "pair_sum.forward"):
            for mine, theirs, where in ring.meetings(visitor):
                part = pair(queries[:, mine], visiting[:, theirs], where)
                if sums is None:
                    wide = torch.promote_types(part.dtype, torch.float32)
                    sums = part.new_zeros(part.shape[0], queries.shape[1], part.shape[2], dtype=wide)
                sums[:, mine] += part
        assert sums is not None  # every token meets itself
        ctx.save_for_backward(queries, keys)
        ctx.ring, ctx.pair = ring, pair
        return sums

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys = ctx.saved_tensors
        ring: Ring = ctx.ring
        wide = torch.promote_types(keys.dtype, torch.float32)
        grad_queries, travelling = torch.zeros_like(queries, dtype=wide), None
        for visitor, visiting in ring.visits(keys, "pair_sum.backward"):
            grad_keys = torch.zeros_like(visiting, dtype=wide)
            for mine, theirs, where in ring.meetings(visitor):
                leaves = [x.detach().requires_grad_() for x in (queries[:, mine], visiting[:, theirs])]
                with torch.enable_grad():
                    part = ctx.pair(*leaves, where)
                of_queries, of_keys = torch.autograd.grad(part, leaves, grads[0][:, mine].to(part.dtype))
                grad_queries[:, mine] += of_queries
                grad_keys[:, theirs] += of_keys
            if travelling is not None:  # what the processes before found for these keys
                grad_keys += ring.received(travelling)
            travelling = ring.pass_on(grad_keys, visitor, "pair_sum.backward")
        assert travelling is not None
        return grad_queries.to(queries.dtype), ring.received(travelling).to(keys.dtype), None, None
