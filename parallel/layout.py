"""Layouts: which process works on which queries of causal attention, so that all have the same work.

Outside attention every sequence is contiguous. A later token sees more keys, so inside attention the sequence is cut
into tiles that are dealt out by their work: without packed documents rank r takes tiles r and 2P - 1 - r (zigzag),
with them many tiles, the heaviest cut smaller, each go to the least loaded process. `relayout` moves tokens there and
back.

Shapes: B batch, T tokens of a contiguous shard, W tokens of this process's tiles.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from .adjoint import with_adjoint
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

    def document_begin(self, place: int, shard: SequenceShard) -> Tensor | None:
        """(B or 1, W) where the document of each token of a place begins; None without packed documents.

        On the CPU, where attention's kernel reads it: from an accelerator it would have to be waited for.
        """
        if shard.document_starts is None:
            return None
        begin_BL = shard.whole_document_begin()
        return torch.cat([begin_BL[:, start:stop] for start, stop in self.spans[place]], dim=1)


def contiguous(bounds: tuple[int, ...]) -> Layout:
    """One tile per place."""
    return Layout(tuple((span,) for span in pairwise(bounds)))


def replicated(length: int, places: int) -> Layout:
    """Every token at every place."""
    return Layout((((0, length),),) * places)


@lru_cache(maxsize=16)
def balanced(length: int, places: int, documents: DocumentStarts | None) -> Layout:
    """Tiles dealt out so that every place has nearly the same number of visible (query, key) pairs.

    Without documents the largest share is the mean, or a row of tokens more. With them, wherever they begin, it is at
    most 1.05 of the mean where a place has 64 tokens or more (found by search, in the tests).
    """
    if documents is None:
        tiles = list(pairwise(even_bounds(length, 2 * places))) if length >= 2 * places else []
        if tiles:
            return Layout(tuple((tiles[p], tiles[2 * places - 1 - p]) for p in range(places)))
    before = pairs_before(documents)
    per_place = max(1, min(TILES_PER_PLACE, length // places))
    tiles = [(before(b) - before(a), (a, b)) for a, b in pairwise(even_bounds(length, per_place * places))]
    mean = before(length) / places
    for finest in (4, 8, 16, 32, 64):
        tiles = [part for tile in tiles for part in _cut(tile, mean / finest, before)]
        layout, largest = _dealt(tiles, length, places)
        if largest <= WELL_BALANCED * mean:
            break
    return layout


TILES_PER_PLACE = 16
WELL_BALANCED = 1.03
MOST_TOKENS = 1.25
"""Of the mean: a place of light tokens only would otherwise hold most of the sequence."""

Work = tuple[int, Span]


def _cut(tile: Work, most: float, before: Callable[[int], int]) -> list[Work]:
    """The tile in halves, and they again, until none has more than `most` pairs."""
    work, (start, stop) = tile
    if work <= most or stop - start < 2:
        return [tile]
    middle = (start + stop) // 2
    first = before(middle) - before(start)
    halves: list[Work] = [(first, (start, middle)), (work - first, (middle, stop))]
    return [part for half in halves for part in _cut(half, most, before)]


def _dealt(tiles: list[Work], length: int, places: int) -> tuple[Layout, int]:
    """The heaviest tile first, each to the place with the least work that has room for its tokens; the most work."""
    taken: list[list[Span]] = [[] for _ in range(places)]
    room = [MOST_TOKENS * length / places] * places
    load = [0] * places
    for work, (start, stop) in sorted(tiles, key=lambda tile: (-tile[0], tile[1])):
        fitting = [place for place in range(places) if room[place] >= stop - start] or range(places)
        place = min(fitting, key=lambda place: (load[place], -room[place]))
        taken[place].append((start, stop))
        load[place] += work
        room[place] -= stop - start
    return Layout(tuple(tuple(_joined(sorted(spans))) for spans in taken)), max(load)


def _joined(spans: list[Span]) -> list[Span]:
    """Neighbouring tiles as one: fewer pairs of tiles meet."""
    joined = spans[:1]
    for start, stop in spans[1:]:
        if joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined


def pairs_before(documents: DocumentStarts | None) -> Callable[[int], int]:
    """How many (query, key) pairs are visible to all queries before a position, summed over rows: the work."""
    rows = []
    for row in documents or ((),):
        starts = (0, *row)
        whole = accumulate(((b - a) * (b - a + 1) // 2 for a, b in pairwise(starts)), initial=0)
        rows.append((starts, list(whole)))

    def before(position: int) -> int:
        total = 0
        for starts, whole in rows:
            document = bisect.bisect_right(starts, position) - 1
            inside = position - starts[document]
            total += whole[document] + inside * (inside + 1) // 2  # query i of a document sees i + 1 keys
        return total

    return before


def relayout(x_BT: Tensor, shard: SequenceShard, source: Layout, target: Layout, ranks: tuple[int, ...]) -> Tensor:
    """Move tokens between two layouts over the processes `ranks` of the group (place p is ranks[p]); differentiable.

    (B, W of the source, ...) -> (B, W of the target, ...), tokens of each tile in order, tiles ascending.
    """
    if source == target or len(ranks) == 1:
        return x_BT
    return with_adjoint(
        x_BT,
        lambda x: _move(x, shard, source, target, ranks, "relayout.forward"),
        lambda grad: _move(grad, shard, target, source, ranks, "relayout.backward"),
    )


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
    # what lay at several places adds up: in single precision, though it travels in half types
    several = sum(shape[1] for shape in shapes) > target.tokens(me)
    dtype = torch.promote_types(x_BT.dtype, torch.float32) if several else x_BT.dtype
    out = x_BT.new_zeros(batch, target.tokens(me), *rest, dtype=dtype)
    for place, rank in enumerate(ranks):
        offset = 0
        for a, b in overlaps(theirs, source.spans[place]):
            out[:, a:b] += arrived[rank][:, offset : offset + b - a]
            offset += b - a
    return out.to(x_BT.dtype)


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
