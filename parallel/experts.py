"""Expert parallelism: tokens travel to the processes that hold their experts and back. Dropless token-choice top-k.

The expert group is folded over data x sequence: after the mixer, tokens are just rows. Following Mixtral
(arXiv 2401.04088) and MegaBlocks' dropless routing (2211.15841).

Shapes: N tokens here, J experts per token, E experts in all, D channels, M rows to compute here, P processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from ..kernels import permute
from .collectives import exchange_in, exchange_rows
from .groups import group_size
from .shard import SequenceShard

ExpertFunction = Callable[[Tensor, Tensor], Tensor]


def run_experts(
    x_ND: Tensor,
    expert_index_NJ: Tensor,
    weight_NJ: Tensor,
    expert_fn: ExpertFunction,
    num_experts: int,
    shard: SequenceShard,
) -> Tensor:
    """Sum over each token's experts of weight x expert(token): (N, D), differentiable in x, weights and experts.

    Args:
        x_ND: tokens of this process.
        expert_index_NJ: int64, the experts chosen by each token.
        weight_NJ: their weights.
        expert_fn: (rows (M, D) sorted by local expert, counts (E here) int64) -> rows (M, D).
        num_experts: E; process p of the expert group holds experts [p E / P, (p + 1) E / P).
        shard: names the expert group.

    Bytes per process: its tokens x J x D that leave for experts elsewhere, each way, and the counts.

    Raises:
        ValueError: the number of experts is not divisible by the size of the expert group or, on the CPU, a token
            chose an expert that is not there.
    """
    num_tokens, choices = expert_index_NJ.shape
    order, counts_E = permute(expert_index_NJ, num_experts)
    rows_MD = x_ND.index_select(0, order // choices)
    group = shard.expert_group
    size = group_size(group)
    if num_experts % size:
        raise ValueError(
            f"{num_experts} experts cannot be spread over {size} processes: use a divisor of {num_experts}"
        )
    if size == 1:
        out_MD = expert_fn(rows_MD, counts_E)
    else:
        route = _Route.plan(counts_E, size, shard)
        arrived_MD = _send(rows_MD, route)
        sorted_MD = arrived_MD.index_select(0, route.by_expert)
        result_MD = expert_fn(sorted_MD, route.local_counts)
        out_MD = _send(result_MD.index_select(0, route.by_source), route.back())
    unsorted_NJD = out_MD.index_select(0, _inverse(order)).view(num_tokens, choices, -1)
    return torch.einsum("njd,nj->nd", unsorted_NJD, weight_NJ.to(unsorted_NJD.dtype))


def _inverse(order_M: Tensor) -> Tensor:
    """The permutation that undoes another; sorting would take many times as long."""
    return torch.empty_like(order_M).scatter_(0, order_M, torch.arange(len(order_M), device=order_M.device))


@dataclass(frozen=True)
class _Route:
    """Who sends how many rows to whom, and the permutation between order of source and order of expert."""

    shard: SequenceShard
    send_rows: list[int]
    receive_rows: list[int]
    by_expert: Tensor
    by_source: Tensor
    local_counts: Tensor

    @classmethod
    def plan(cls, counts_E: Tensor, size: int, shard: SequenceShard) -> _Route:
        counts_PE = counts_E.view(size, -1)
        here = counts_PE.shape[1]
        arriving = exchange_in(shard.expert_group, list(counts_PE), [(here,)] * size, shard, "experts.counts").wait()
        arriving_PE = torch.stack(arriving)
        # arrived rows are blocks ordered by (source, expert): the same blocks by (expert, source), without a sort
        counts = arriving_PE.flatten().tolist()
        blocks = torch.arange(sum(counts), device=counts_E.device).split(counts)
        by_expert = torch.cat([blocks[source * here + expert] for expert in range(here) for source in range(size)])
        return cls(
            shard=shard,
            send_rows=counts_PE.sum(1).tolist(),
            receive_rows=[sum(counts[source * here : (source + 1) * here]) for source in range(size)],
            by_expert=by_expert,
            by_source=_inverse(by_expert),
            local_counts=arriving_PE.sum(0),
        )

    def back(self) -> _Route:
        return _Route(self.shard, self.receive_rows, self.send_rows, self.by_expert, self.by_source, self.local_counts)


def _send(rows_MD: Tensor, route: _Route) -> Tensor:
    result = _Send.apply(rows_MD, route)
    assert isinstance(result, Tensor)
    return result


class _Send(torch.autograd.Function):
    """Rows to other processes; the backward sends gradients the same way home."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows_MD: Tensor, route: _Route) -> Tensor:
        ctx.route = route  # type: ignore[attr-defined]
        return _exchange_rows(rows_MD, route, "experts.forward")

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        return _exchange_rows(grads[0], ctx.route.back(), "experts.backward"), None  # type: ignore[attr-defined]


def _exchange_rows(rows_MD: Tensor, route: _Route, motion: str) -> Tensor:
    shard = route.shard
    return exchange_rows(shard.expert_group, rows_MD, route.send_rows, route.receive_rows, shard, motion).wait()
