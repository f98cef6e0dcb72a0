"""Causal attention over a sequence split along its length.

Every strategy is one picture: teams of U neighbouring processes exchange length for heads, and R = P / U teams form a
ring along the length in which every process has the same work.
    heads   U = P, R = 1      ring   U = 1, R = P      grid   both in between
    gather  the ring's layout with all keys and values received at once

Shapes: B batch, T tokens here, W tokens after the head exchange, H query heads, G key/value heads, K head dimension.
"""

from __future__ import annotations

import itertools
from math import gcd

import torch
from torch import Tensor

from ..kernels.attention import attention
from .heads import Team, give_heads, take_heads
from .layout import balanced, contiguous, relayout, replicated
from .ring import Ring, ring_attention
from .shard import SequenceShard, even_bounds

ATTENTION_STRATEGIES = ("heads", "ring", "grid", "gather")


def causal_attention(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGK: Tensor,
    shard: SequenceShard,
    *,
    scale: float | None = None,
    strategy: str | None = None,
) -> Tensor:
    """Softmax attention of each query over the earlier tokens of its document, on whatever process: (B, T, H, K).

    Args:
        q_BTHK, k_BTGK, v_BTGK: this shard's queries, keys, values; positions are already encoded, H a multiple of G.
        scale: of the scores; 1 / sqrt(K) by default.
        strategy: by default what the shard asks for; "auto" exchanges heads as far as they divide over the processes
            (the fewest bytes) and rings over the rest. Numbers per process, forward, with n = T K:
            "heads": 2 n (H + G') (P - 1) / P, where G' counts a key/value head once for each process that needs it;
            "ring":  at most 2 n (H + G) to balance the work, and 2 n G (P - 1) round the ring;
            "grid":  the two combined; "gather": as the ring, all keys and values held at once.

    Raises:
        ValueError: an unknown strategy, or "heads" with fewer heads than processes.
    """
    wanted = strategy or shard.strategies.attention
    if wanted != "auto" and wanted not in ATTENTION_STRATEGIES:
        raise ValueError(f"unknown attention strategy {wanted!r}: choose auto, {', '.join(ATTENTION_STRATEGIES)}")
    scale = float(q_BTHK.shape[-1] ** -0.5) if scale is None else scale
    if shard.size == 1:
        begin = shard.document_begin() if shard.document_starts is not None else None
        return attention(q_BTHK, k_BTGK, v_BTGK, document_begin=begin, scale=scale)[0]
    num_heads = q_BTHK.shape[2]
    if wanted == "heads" and num_heads < shard.size:
        raise ValueError(
            f"attention strategy 'heads' needs a head for each of {shard.size} processes, the layer has {num_heads}: "
            f"choose 'grid' or 'ring'"
        )
    team_size = _team_size(wanted, num_heads, shard.size)
    return _on_grid(q_BTHK, k_BTGK, v_BTGK, shard, team_size, scale, gathered=wanted == "gather")


def _team_size(strategy: str, num_heads: int, size: int) -> int:
    """U: how many processes share heads."""
    if strategy == "heads":
        return size
    if strategy in ("ring", "gather"):
        return 1
    even = gcd(num_heads, size)
    if strategy == "grid" and even in (1, size):  # a grid proper where there is one
        even = next((u for u in range(min(size - 1, num_heads), 1, -1) if size % u == 0), even)
    return even


def _on_grid(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, shard: SequenceShard, team_size: int, scale: float, gathered: bool
) -> Tensor:
    first = shard.rank // team_size * team_size
    team_ranks = tuple(range(first, first + team_size))
    ring_ranks = tuple(range(shard.rank - first, shard.size, team_size))
    kv_BTG2K = torch.stack([k_BTGK, v_BTGK], dim=3)
    q_team, q, kv = _share_heads(q_BTHK, kv_BTG2K, shard, team_ranks)
    blocks = (*(shard.bounds[place * team_size] for place in range(len(ring_ranks))), shard.length)
    kv_BW2GK = kv.transpose(2, 3)
    if len(ring_ranks) == 1:
        whole = contiguous(blocks)
        begin = whole.document_begin(0, shard)
        out, _ = attention(q, kv_BW2GK[:, :, 0], kv_BW2GK[:, :, 1], document_begin=begin, scale=scale)
    else:
        out = _round(q, kv_BW2GK, shard, blocks, ring_ranks, scale, gathered)
    return out if q_team is None else give_heads(out, q_team)


def _share_heads(
    q_BTHK: Tensor, kv_BTG2K: Tensor, shard: SequenceShard, ranks: tuple[int, ...]
) -> tuple[Team | None, Tensor, Tensor]:
    """This process's query heads over the team's tokens, and the key/value head of each (or of groups of them)."""
    if len(ranks) == 1:
        return None, q_BTHK, kv_BTG2K
    num_heads, num_kv = q_BTHK.shape[2], kv_BTG2K.shape[2]
    group = num_heads // num_kv
    bounds = even_bounds(num_heads, len(ranks))
    heads = tuple(itertools.pairwise(bounds))
    kv_heads = tuple((a // group, (b - 1) // group + 1) for a, b in heads)
    q_team = Team(shard, ranks, heads)
    kv_team = Team(shard, ranks, kv_heads)
    q = take_heads(q_BTHK, q_team)
    kv = take_heads(kv_BTG2K.flatten(3), kv_team).unflatten(3, kv_BTG2K.shape[3:])
    (a, b), (kv_a, kv_b) = heads[q_team.member], kv_heads[q_team.member]
    if kv_b - kv_a > 1 and (a % group or b % group):  # the share cuts across groups: a head for each query head
        kv = kv[:, :, torch.arange(a, b, device=kv.device) // group - kv_a]
    return q_team, q, kv


def _round(
    q: Tensor,
    kv: Tensor,
    shard: SequenceShard,
    blocks: tuple[int, ...],
    ranks: tuple[int, ...],
    scale: float,
    gathered: bool,
) -> Tensor:
    """Attention over the blocks of the ring, in a layout of equal work."""
    outside, inside = contiguous(blocks), balanced(shard.length, len(ranks), shard.document_starts)
    place = ranks.index(shard.rank)
    begin = inside.document_begin(place, shard)
    if gathered:
        q = relayout(q, shard, outside, inside, ranks)
        kv = relayout(kv, shard, outside, replicated(shard.length, len(ranks)), ranks)
        out = _over_all_keys(q, kv, inside.spans[place], begin, scale)
    else:
        joined = torch.cat([q, kv.flatten(2, 3)], dim=2)
        q, kv_flat = relayout(joined, shard, outside, inside, ranks).split([q.shape[2], 2 * kv.shape[3]], dim=2)
        kv = kv_flat.unflatten(2, (2, kv.shape[3]))
        out = ring_attention(q.contiguous(), kv.contiguous(), Ring(shard, inside, ranks, begin), scale)
    return relayout(out, shard, inside, outside, ranks)


def _over_all_keys(
    q: Tensor, kv: Tensor, spans: tuple[tuple[int, int], ...], document_begin: Tensor | None, scale: float
) -> Tensor:
    """Attention of the queries of some tiles over all earlier keys, which are all here."""
    k, v = kv.unbind(2)
    outs, offset = [], 0
    for start, stop in spans:
        here = slice(offset, offset + stop - start)
        begin = None if document_begin is None else document_begin[:, here]
        keys = slice(0 if begin is None else int(begin.min()), stop)
        outs.append(
            attention(
                q[:, here],
                k[:, keys],
                v[:, keys],
                query_start=start,
                key_start=keys.start,
                document_begin=begin,
                scale=scale,
            )[0]
        )
        offset = here.stop
    return torch.cat(outs, dim=1)
