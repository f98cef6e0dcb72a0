"""Layouts: which process works on which queries of causal attention, so that all have the same work.

Outside attention every sequence is contiguous. A later token sees more keys, so inside attention the sequence is cut
into tiles that are dealt out by their work: without packed documents rank r takes tiles r and 2P - 1 - r (zigzag),
with them many tiles go to the least loaded process, the same number to each. `relayout` moves tokens there and back.

Shapes: B batch, T tokens of a contiguous shard, W tokens of this process's tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .collectives import exchange
from .shard import DocumentStarts, SequenceShard, even_bounds

Span = tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """`spans[p]`: the tiles of place p, ascending (start, stop) of global positions; together they cover the sequence.

    A token may lie at several places (`replicated`): moving there copies it, and its gradients add up.
    """

    spans: tuple[tuple[Span, ...], ...]

    def tokens(self, place: int) -> int:
        return sum(stop - start for start, stop in self.spans[place])


def contiguous(bounds: tuple[int, ...]) -> Layout:
    """One tile per place."""
    return Layout(tuple((span,) for span in pairwise(bounds)))


def replicated(length: int, places: int) -> Layout:
    """Every token at every place."""
    return Layout((((0, length),),) * places)


def balanced(length: int, places: int, documents: DocumentStarts | None) -> Layout:
    """Tiles dealt out so that every place has nearly the same number of visible (query, key) pairs."""
    if documents is None:
        tiles = list(pairwise(even_bounds(length, 2 * places))) if length >= 2 * places else []
        if tiles:
            return Layout(tuple((tiles[p], tiles[2 * places - 1 - p]) for p in range(places)))
    per_place = max(1, min(16, length // places))
    tiles = list(pairwise(even_bounds(length, per_place * places)))
    taken: list[list[Span]] = [[] for _ in range(places)]
    load = [0] * places
    for tile in sorted(tiles, key=lambda tile: -pairs_of(tile, documents)):
        place = min((p for p in range(places) if len(taken[p]) < per_place), key=lambda p: (load[p], p))
        taken[place].append(tile)
        load[place] += pairs_of(tile, documents)
    return Layout(tuple(tuple(sorted(spans)) for spans in taken))


def pairs_of(span: Span, documents: DocumentStarts | None) -> int:
    """Visible (query, key) pairs of the queries in a span, summed over the rows of the batch: the work."""
    total = 0
    for starts in documents or ((),):
        for begin, end in pairwise((0, *starts, span[1] + 1)):
            first, last = max(begin, span[0]), min(end, span[1])
            if first < last:  # query i sees i - begin + 1 keys
                total += (last - first) * (first + last + 1 - 2 * begin) // 2
    return total


def relayout(x_BT: Tensor, shard: SequenceShard, source: Layout, target: Layout, ranks: tuple[int, ...]) -> Tensor:
    """Move tokens between two layouts over the processes `ranks` of the group (place p is ranks[p]); differentiable.

    (B, W of the source, ...) -> (B, W of the target, ...), tokens of each tile in order, tiles ascending.
    """
    if source == target or len(ranks) == 1:
        return x_BT
    result = _Relayout.apply(x_BT, shard, source, target, ranks)
    assert isinstance(result, Tensor)
    return result


class _Relayout(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x_BT: Tensor, shard: SequenceShard, source: Layout, target: Layout, ranks: tuple[int, ...]
    ) -> Tensor:
        ctx.arguments = (shard, target, source, ranks)  # type: ignore[attr-defined]
        return _move(x_BT, shard, source, target, ranks, "relayout.forward")

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _move(grads[0], *ctx.arguments, "relayout.backward"), None, None, None, None  # type: ignore[attr-defined]


def _move(
    x_BT: Tensor, shard: SequenceShard, source: Layout, target: Layout, ranks: tuple[int, ...], motion: str
) -> Tensor:
    me = ranks.index(shard.rank)
    batch, rest = x_BT.shape[0], x_BT.shape[2:]
    parts, shapes = [x_BT[:, :0]] * shard.size, [(batch, 0, *rest)] * shard.size
    mine, theirs = source.spans[me], target.spans[me]
    for place, rank in enumerate(ranks):
        leaving = overlaps(mine, target.spans[place])
        parts[rank] = torch.cat([x_BT[:, :0], *(x_BT[:, a:b] for a, b in leaving)], dim=1)
        shapes[rank] = (batch, sum(b - a for a, b in overlaps(theirs, source.spans[place])), *rest)
    arrived = exchange(parts, shapes, shard, motion).wait()
    out = x_BT.new_zeros(batch, target.tokens(me), *rest)
    for place, rank in enumerate(ranks):
        offset = 0
        for a, b in overlaps(theirs, source.spans[place]):
            out[:, a:b] += arrived[rank][:, offset : offset + b - a]
            offset += b - a
    return out


def overlaps(mine: tuple[Span, ...], theirs: tuple[Span, ...]) -> list[Span]:
    """Where tokens of `theirs` lie in the concatenation of `mine`, ascending by position in the sequence."""
    found, offset = [], 0
    for start, stop in mine:
        for other_start, other_stop in theirs:
            a, b = max(start, other_start), min(stop, other_stop)
            if a < b:
                found.append((offset + a - start, offset + b - start))
        offset += stop - start
    return found
