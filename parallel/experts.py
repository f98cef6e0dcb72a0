"""Expert parallelism: tokens travel to the processes that hold their experts and back. Dropless token-choice top-k.

The expert group is folded over data x sequence: after the mixer, tokens are just rows. Following Mixtral
(arXiv 2401.04088) and MegaBlocks' dropless routing (2211.15841). A token goes at most once to each process, with the
weights of its experts; those that are there are summed there, and one row comes back.

Results travel back, and their gradients out, while a process computes with the tokens that stay.

Shapes: N tokens here, J experts per token, E experts in all, D channels, M rows to compute here, R rows that leave or
arrive, C choices listed by token, P processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.experts import RowMap, check_experts, gather_rows, permute, sum_rows
from .collectives import Pending, exchange_in, exchange_rows
from .flight import Flight, arrive, depart
from .groups import group_rank, group_size
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
        weight_NJ: their weights; they are rounded to the dtype of x.
        expert_fn: (rows (M, D) sorted by local expert, counts (E here) int64) -> rows (M, D). Where experts are spread
            it is called twice, with the rows that arrive and with those that stay. Not a module that FSDP shards for
            itself, which would gather its parameters twice: rather a method of one inside whose forward this runs.
        num_experts: E; process p of the expert group holds experts [p E / P, (p + 1) E / P).
        shard: names the expert group.

    Bytes per process: D numbers each way for every other process that holds any of a token's experts, J weights with
    them, whose gradients come back, and J numbers of experts of a byte each (four where a process holds 256 or more).

    Raises:
        ValueError: the number of experts is not divisible by the size of the expert group or, on the CPU, a token
            chose an expert that is not there.
    """
    size = group_size(shard.expert_group)
    if num_experts % size:
        raise ValueError(
            f"{num_experts} experts cannot be spread over {size} processes: use a divisor of {num_experts}"
        )
    weight_NJ = weight_NJ.to(x_ND.dtype)
    if size == 1:
        order_M, counts_E = permute(expert_index_NJ, num_experts)
        rows = RowMap.of_sorted(order_M, expert_index_NJ.shape[1])
        out_MD = expert_fn(gather_rows(x_ND, rows), counts_E)
        return sum_rows(out_MD, rows, weight_NJ.flatten().to(out_MD.dtype))

    route = _Route.plan(expert_index_NJ, num_experts // size, size, shard)
    weights_arrive = route.begin_trip(weight_NJ.index_select(0, route.leaving.token_M))
    rows_arrive = route.begin_trip(gather_rows(x_ND, route.leaving))
    # the order in which autograd's backward runs is the reverse of this one, message for message
    staying = _Choices.among(route.local_NJ, route.here)
    staying_MD = gather_rows(x_ND, staying.rows)
    arrived = _Choices.among(route.arrived_local.wait(), route.here)
    out_MD = expert_fn(gather_rows(rows_arrive(), arrived.rows), arrived.counts_E)
    sums_arrive = route.begin_trip(arrived.weighted_sum(out_MD, weights_arrive()), back=True)
    y_ND = staying.weighted_sum(expert_fn(staying_MD, staying.counts_E), weight_NJ)
    return sum_rows(sums_arrive(), route.leaving, onto_ND=y_ND)


@dataclass(frozen=True)
class _Choices:
    """The choices of some tokens that fell on experts of this process."""

    rows: RowMap
    counts_E: Tensor
    place_C: Tensor

    @classmethod
    def among(cls, local_NJ: Tensor, here: int) -> _Choices:
        """Of numbers of local experts, `here` where an expert is elsewhere."""
        flat = local_NJ.flatten()
        place_C = (flat < here).nonzero().flatten()
        order_M, counts_E = permute(flat.index_select(0, place_C), here)
        return cls(RowMap.of(order_M, place_C // local_NJ.shape[1], len(local_NJ)), counts_E, place_C)

    def weighted_sum(self, out_MD: Tensor, weight_NJ: Tensor) -> Tensor:
        weight_C = weight_NJ.flatten().index_select(0, self.place_C)
        return sum_rows(out_MD, self.rows, weight_C.to(out_MD.dtype))


@dataclass(frozen=True)
class _Route:
    """Which tokens go to which processes, and what arrives.

    Attributes:
        leaving: one row for each other process that a token goes to, by process and then by token.
        local_NJ: numbers among this process's experts, `here` for those of others.
        arrived_local: the same of the rows that arrive, on its way.
    """

    shard: SequenceShard
    here: int
    leaving: RowMap
    send_rows: list[int]
    receive_rows: list[int]
    local_NJ: Tensor
    arrived_local: Pending[Tensor]

    @classmethod
    def plan(cls, expert_index_NJ: Tensor, here: int, size: int, shard: SequenceShard) -> _Route:
        group, me = shard.expert_group, group_rank(shard.expert_group)
        check_experts("run_experts", expert_index_NJ, here * size)
        process_NJ = expert_index_NJ // here
        goes_PN = torch.zeros(size, len(process_NJ), dtype=torch.bool, device=process_NJ.device)
        goes_PN.scatter_(0, process_NJ.t(), True)
        goes_PN[me] = False
        send_R = goes_PN.sum(1)
        sizes = exchange_in(group, list(send_R.split(1)), [(1,)] * size, shard, "experts.counts")
        process_R, token_R = goes_PN.nonzero().unbind(1)
        place_NP = goes_PN.t().flatten().cumsum(0) - 1  # in the list by token
        choice_R = place_NP.index_select(0, token_R * size + process_R)
        token_C = torch.empty_like(token_R).scatter_(0, choice_R, token_R)
        dtype = torch.uint8 if here < 256 else torch.int32

        def local(index: Tensor, process: Tensor | int) -> Tensor:
            number = index - process * here
            return number.where((number >= 0) & (number < here), here).to(dtype)

        local_RJ = local(expert_index_NJ.index_select(0, token_R), process_R[:, None])
        send_rows, receive_rows = send_R.tolist(), torch.cat(sizes.wait()).tolist()
        return cls(
            shard=shard,
            here=here,
            leaving=RowMap.of(choice_R, token_C, len(process_NJ)),
            send_rows=send_rows,
            receive_rows=receive_rows,
            local_NJ=local(expert_index_NJ, me),
            arrived_local=exchange_rows(group, local_RJ, send_rows, receive_rows, shard, "experts.forward"),
        )

    def begin_trip(self, rows_RD: Tensor, *, back: bool = False) -> Callable[[], Tensor]:
        """Send rows out, or results back; calling the result awaits those that arrive here."""
        sizes = (self.receive_rows, self.send_rows) if back else (self.send_rows, self.receive_rows)
        trip = _Trip(self.shard, *sizes)
        anchor = depart(trip, rows_RD)
        return lambda: arrive(trip, anchor)[0]


class _Trip(Flight):
    """Rows on their way to other processes, and their gradients home."""

    def __init__(self, shard: SequenceShard, send_rows: list[int], receive_rows: list[int]) -> None:
        self._shard, self._send_rows, self._receive_rows = shard, send_rows, receive_rows
        self._under_way: Pending[Tensor] | None = None

    def send(self, *tensors: Tensor) -> None:
        self._under_way = self._exchange(tensors[0], self._send_rows, self._receive_rows, "experts.forward")

    def send_back(self, *gradients: Tensor) -> None:
        grads_RD = gradients[0].contiguous()
        self._under_way = self._exchange(grads_RD, self._receive_rows, self._send_rows, "experts.backward")

    def land(self) -> tuple[Tensor, ...]:
        assert self._under_way is not None
        arrived_RD, self._under_way = self._under_way.wait(), None
        return (arrived_RD,)

    def land_back(self) -> tuple[Tensor, ...]:
        return self.land()

    def _exchange(self, x_RD: Tensor, send_rows: list[int], receive_rows: list[int], motion: str) -> Pending[Tensor]:
        return exchange_rows(self._shard.expert_group, x_RD, send_rows, receive_rows, self._shard, motion)
