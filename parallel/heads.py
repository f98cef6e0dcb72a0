"""From a slice of the length with all heads to a longer slice with some heads, and back (Ulysses, arXiv 2309.14509).

Within a team of neighbouring processes each takes a share of the query heads and the key/value heads that they need;
where several shares need the same key/value head it is sent to each, and its gradients add up.

Shapes: B batch, T tokens here, W tokens of the team, H heads, K head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

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
        rank = self.ranks[member]
        return self.shard.bounds[rank + 1] - self.shard.bounds[rank]


def take_heads(x_BTHK: Tensor, team: Team) -> Tensor:
    """(B, T, H, K) -> (B, W, heads of this member, K); differentiable."""
    result = _TakeHeads.apply(x_BTHK, team)
    assert isinstance(result, Tensor)
    return result


def give_heads(x_BWHK: Tensor, team: Team) -> Tensor:
    """The inverse where every head is taken once: (B, W, heads of this member, K) -> (B, T, H, K)."""
    result = _GiveHeads.apply(x_BWHK, team)
    assert isinstance(result, Tensor)
    return result


class _TakeHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x_BTHK: Tensor, team: Team) -> Tensor:
        ctx.team, ctx.num_heads = team, x_BTHK.shape[2]  # type: ignore[attr-defined]
        return _to_heads(x_BTHK, team, "heads.forward")

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        return _to_tokens(grads[0], ctx.team, ctx.num_heads, "heads.backward"), None  # type: ignore[attr-defined]


class _GiveHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x_BWHK: Tensor, team: Team) -> Tensor:
        ctx.team = team  # type: ignore[attr-defined]
        return _to_tokens(x_BWHK, team, team.heads[-1][1], "heads.forward")

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        return _to_heads(grads[0], ctx.team, "heads.backward"), None  # type: ignore[attr-defined]


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
    out = x_BWHK.new_zeros(batch, shard.local_length, num_heads, dim)
    for member, rank in enumerate(team.ranks):
        a, b = team.heads[member]
        out[:, :, a:b] += arrived[rank]
    return out
