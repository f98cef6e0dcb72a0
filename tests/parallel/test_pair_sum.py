"""Sums over pairs of tokens, split, against the sums written out: values, gradients, documents, bytes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longstride.kernels.attention import Positions
from longstride.parallel import CommunicationLedger, SequenceShard, pair_sum
from tests.distributed import run_ranks
from tests.parallel.oracles import gathered, local, normal, relative_error

B, M, N, E = 2, 3, 4, 2
DOCUMENTS = [[5, 6, 14], [9]]


def squares(queries_BWM: Tensor, keys_BSN: Tensor, where: Positions) -> Tensor:
    """(q . k)^2 v with k the first M features of a key and v the rest and the first again."""
    query_W1 = torch.arange(where.query_start, where.query_start + queries_BWM.shape[1])[:, None]
    key_S = torch.arange(where.key_start, where.key_start + keys_BSN.shape[1])
    begin_BW1 = torch.zeros(1, 1, 1) if where.document_begin is None else where.document_begin[..., None]
    seen_BWS = (key_S <= query_W1) & (key_S >= begin_BW1)
    scores_BWS = (queries_BWM @ keys_BSN[..., :M].transpose(1, 2)).square() * seen_BWS
    return scores_BWS @ keys_BSN[..., N - E :]


def written_out(queries_BLM: Tensor, keys_BLN: Tensor, documents: list[list[int]] | None) -> Tensor:
    rows = []
    for row in range(B):
        begin, outputs = 0, []
        for t in range(queries_BLM.shape[1]):
            begin = t if documents and t in documents[row] else begin
            scores = (keys_BLN[row, begin : t + 1, :M] @ queries_BLM[row, t]).square()
            outputs.append(scores @ keys_BLN[row, begin : t + 1, N - E :])
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


def compute(
    rank: int, world: int, length: int, documents: list[list[int]] | None
) -> tuple[Tensor, Tensor, Tensor, int]:
    ledger = CommunicationLedger()
    whole = SequenceShard.whole(length, documents)
    shard = whole if world == 1 else SequenceShard.split(length, None, documents, ledger=ledger)
    queries, keys = local(normal(B, length, M), shard), local(normal(B, length, N, seed=1), shard)
    sums = pair_sum(squares, queries, keys, shard)
    (sums * local(normal(B, length, E, seed=2), shard).detach()).sum().backward()
    assert queries.grad is not None and keys.grad is not None
    return sums.detach(), queries.grad, keys.grad, ledger.totals().bytes_sent


@pytest.mark.parametrize("length", [17, 5])
@pytest.mark.parametrize("documents", [None, DOCUMENTS])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_split_equals_the_sums(world: int, documents: list[list[int]] | None, length: int) -> None:
    documents = documents and [[start for start in row if start < length] for row in documents]
    queries, keys = normal(B, length, M).requires_grad_(), normal(B, length, N, seed=1).requires_grad_()
    expected = written_out(queries, keys, documents)
    (expected * normal(B, length, E, seed=2)).sum().backward()
    run = [compute(0, 1, length, documents)] if world == 1 else run_ranks(compute, world, length, documents)
    for place, tensor in enumerate((expected.detach(), queries.grad, keys.grad)):
        assert tensor is not None
        assert relative_error(gathered(result[place] for result in run), tensor) < 1e-13


def test_bytes_are_those_of_the_keys_round_the_ring() -> None:
    length, world = 48, 4
    for _, _, _, sent in run_ranks(compute, world, length, None):
        here, token = length // world, 8 * B
        balancing = here * token * (2 * (M + N) + 2 * E)  # there and back, in both directions
        ring = here * token * N * ((world - 1) * 2 + world)  # keys twice, their gradients once and home
        assert sent <= balancing + ring


def in_half(rank: int, world: int) -> Tensor:
    shard = SequenceShard.split(48)
    queries, keys = (local(normal(B, 48, n, seed=s).bfloat16(), shard) for n, s in ((M, 0), (N, 1)))
    return pair_sum(squares, queries, keys, shard).detach()


def test_parts_in_half_types_are_added_up_in_single_precision() -> None:
    sums = gathered(run_ranks(in_half, 2))
    assert sums.dtype == torch.float32
    queries, keys = (normal(B, 48, n, seed=s).bfloat16().double() for n, s in ((M, 0), (N, 1)))
    assert relative_error(sums.double(), written_out(queries, keys, None)) < 1e-2


def misplaced(rank: int, world: int) -> Tensor:
    """The same with keys that believe themselves at the beginning of the sequence."""
    shard = SequenceShard.split(12)
    queries, keys = (normal(B, 12, n, seed=s)[:, shard.start : shard.stop] for n, s in ((M, 0), (N, 1)))
    return pair_sum(lambda q, k, where: squares(q, k, Positions(where.query_start, 0, None)), queries, keys, shard)


def test_wrong_positions_are_noticed() -> None:
    expected = written_out(normal(B, 12, M), normal(B, 12, N, seed=1), None)
    assert relative_error(gathered(run_ranks(misplaced, 2)), expected) > 1e-2
