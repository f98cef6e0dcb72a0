"""From a slice of the length with all heads to a longer slice with some heads, and back (Ulysses, arXiv 2309.14509).

Within a team of neighbouring processes each takes a share of the query heads and the key/value heads that they need;
where several shares need the same key/value head it is sent to each, and its gradients add up.

Shapes: B batch, T tokens here, W tokens of the team, H heads, K head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .adjoint import with_adjoint
from .collectives import exchange
from .shard import SequenceShard

HeadRanges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Team:
    """Neighbouring processes `ranks` of the shard's group; `heads[i]`: the range of heads that member i takes."""

    shard: SequenceShard
    ranks: tuple[int, ...]
    heads: HeadRanges

    @property
    def member(self) -> int:
        return self.ranks.index(self.shard.rank)

    def tokens(self, member: int) -> int:
        return self.shard.length_of(self.ranks[member])


def take_heads(x_BTHK: Tensor, team: Team) -> Tensor:
    """(B, T, H, K) -> (B, W, heads of this member, K); differentiable."""
    num_heads = x_BTHK.shape[2]
    return with_adjoint(
        x_BTHK,
        lambda x: _to_heads(x, team, "heads.forward"),
        lambda grad: _to_tokens(grad, team, num_heads, "heads.backward"),
    )


def give_heads(x_BWHK: Tensor, team: Team) -> Tensor:
    """The inverse where every head is taken once: (B, W, heads of this member, K) -> (B, T, H, K)."""
    return with_adjoint(
        x_BWHK,
        lambda x: _to_tokens(x, team, team.heads[-1][1], "heads.forward"),
        lambda grad: _to_heads(grad, team, "heads.backward"),
    )


def _to_heads(x_BTHK: Tensor, team: Team, motion: str) -> Tensor:
    shard, (batch, _, _, dim) = team.shard, x_BTHK.shape
    parts = [x_BTHK[:0]] * shard.size
    shapes: list[tuple[int, ...]] = [(0,)] * shard.size
    first, last = team.heads[team.member]
    for member, rank in enumerate(team.ranks):
        a, b = team.heads[member]
        parts[rank] = x_BTHK[:, :, a:b]
        shapes[rank] = (batch, team.tokens(member), last - first, dim)
    arrived = exchange(parts, shapes, shard, motion).wait()
    return torch.cat([arrived[rank] for rank in team.ranks], dim=1)


def _to_tokens(x_BWHK: Tensor, team: Team, num_heads: int, motion: str) -> Tensor:
    shard, (batch, _, _, dim) = team.shard, x_BWHK.shape
    parts = [x_BWHK[:0]] * shard.size
    shapes: list[tuple[int, ...]] = [(0,)] * shard.size
    pieces = x_BWHK.split([team.tokens(member) for member in range(len(team.ranks))], dim=1)
    for member, rank in enumerate(team.ranks):
        a, b = team.heads[member]
        parts[rank] = pieces[member]
        shapes[rank] = (batch, shard.local_length, b - a, dim)
    arrived = exchange(parts, shapes, shard, motion).wait()
    # what several members took adds up: in single precision, though it travels in half types
    several = sum(b - a for a, b in team.heads) > num_heads
    dtype = torch.promote_types(x_BWHK.dtype, torch.float32) if several else x_BWHK.dtype
    out = x_BWHK.new_zeros(batch, shard.local_length, num_heads, dim, dtype=dtype)
    for member, rank in enumerate(team.ranks):
        a, b = team.heads[member]
        out[:, :, a:b] += arrived[rank]
    return out.to(x_BWHK.dtype)
