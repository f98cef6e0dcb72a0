"""Halo: the tokens just before this shard, for short convolutions and token shifts.

Any width, wider than the neighbours' shards too: each process asks those that hold the tokens. Gradients travel
back and are added where the tokens live. B batch, T tokens here, W width, D channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .adjoint import with_adjoint
from .collectives import exchange
from .shard import SequenceShard


def halo(x_BTD: Tensor, width: int, shard: SequenceShard) -> Tensor:
    """The `width` tokens before this shard: (B, width, D), differentiable.

    Tokens before the sequence, and tokens of a document other than the one that this shard's first token belongs to,
    are zeros. Bytes per process: width x D each way, from and to the neighbours that hold the tokens.

    Args:
        x_BTD: this shard's tokens, any dtype, any number of trailing dimensions.

    Raises:
        ValueError: a negative width, or tokens that are not as many as the shard holds.
    """
    if width < 0:
        raise ValueError(f"halo width must not be negative, got {width}")
    if x_BTD.shape[1] != shard.local_length:
        raise ValueError(f"x has {x_BTD.shape[1]} tokens, this shard holds {shard.local_length}")
    if shard.size == 1:
        return x_BTD.new_zeros(x_BTD.shape[0], width, *x_BTD.shape[2:])
    return with_adjoint(x_BTD, lambda x: _fetch(x, width, shard), lambda grad: _return(grad, width, shard))


def projected_halo(project: Callable[[Tensor], Tensor], x_BTD: Tensor, width: int, shard: SequenceShard) -> Tensor:
    """`halo(project(x), width, shard)` for a `project` that treats all tokens alike and widens them, D numbers to M.

    The tokens travel before they are projected and each process projects its neighbours' few once more: D numbers a
    token on the wire instead of M, and a gradient that is added to T x D numbers instead of T x M.
    """
    if shard.size == 1:
        none_B0M = project(x_BTD[:, :0])
        return none_B0M.new_zeros(x_BTD.shape[0], width, none_B0M.shape[-1])
    before_BWM = project(halo(x_BTD, width, shard))
    # what a projection makes of no token at all, a bias for example, is no token either
    return before_BWM.masked_fill(_foreign(width, shard, before_BWM), 0)


def _fetch(x_BTD: Tensor, width: int, shard: SequenceShard) -> Tensor:
    batch, rest = x_BTD.shape[0], x_BTD.shape[2:]
    wanted = _wanted(width, shard)
    parts = [x_BTD[:, a - shard.start : b - shard.start] for a, b in wanted[shard.rank]]
    shapes = [(batch, b - a, *rest) for a, b in (row[shard.rank] for row in wanted)]
    tokens = exchange(parts, shapes, shard, "halo.forward").wait()
    padding = x_BTD.new_zeros(batch, width - sum(part.shape[1] for part in tokens), *rest)
    halo_BWD = torch.cat([padding, *tokens], dim=1)
    return halo_BWD.masked_fill_(_foreign(width, shard, halo_BWD), 0)


def _return(grad_BWD: Tensor, width: int, shard: SequenceShard) -> Tensor:
    """The adjoint of `_fetch`."""
    grad_BWD = grad_BWD.masked_fill(_foreign(width, shard, grad_BWD), 0)
    batch, rest = grad_BWD.shape[0], grad_BWD.shape[2:]
    wanted = _wanted(width, shard)
    offset = shard.start - width
    parts = [grad_BWD[:, a - offset : b - offset] for a, b in (row[shard.rank] for row in wanted)]
    shapes = [(batch, b - a, *rest) for a, b in wanted[shard.rank]]
    returned = exchange(parts, shapes, shard, "halo.backward").wait()
    grad_x_BTD = grad_BWD.new_zeros(batch, shard.local_length, *rest)
    for (a, b), part in zip(wanted[shard.rank], returned, strict=True):
        grad_x_BTD[:, a - shard.start : b - shard.start] += part
    return grad_x_BTD


def _wanted(width: int, shard: SequenceShard) -> list[list[tuple[int, int]]]:
    """wanted[owner][reader]: the global tokens [a, b) of `owner` that `reader` needs (a == b: none)."""
    table = []
    for owner in range(shard.size):
        row = []
        for reader in range(shard.size):
            a = max(shard.bounds[owner], shard.bounds[reader] - width)
            b = min(shard.bounds[owner + 1], shard.bounds[reader])
            # an empty range is pinned to its owner's start, so that slices of it are in range and empty
            row.append((a, b) if a < b else (shard.bounds[owner], shard.bounds[owner]))
        table.append(row)
    return table


def _foreign(width: int, shard: SequenceShard, like: Tensor) -> Tensor:
    """(B or 1, W, 1...) bool: True where a halo token lies before the document of this shard's first token."""
    positions_W = torch.arange(shard.start - width, shard.start, device=like.device)
    begin_B1 = shard.document_begin(like.device)[:, :1]
    return (positions_W < begin_B1).reshape(*begin_B1.shape[:1], width, *([1] * (like.dim() - 2)))
