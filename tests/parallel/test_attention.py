"""Every strategy of split attention against a dense softmax on one process; work and bytes; float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longstride.parallel import SequenceShard, causal_attention
from longstride.parallel.layout import balanced, pairs_of
from tests.distributed import run_ranks
from tests.parallel.oracles import gathered, local, normal, relative_error

B, K = 2, 4
DOCUMENTS = [[3, 4, 19], [11]]
STRATEGIES = ["heads", "ring", "grid", "gather", "auto"]


def inputs(length: int, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        normal(B, length, heads, K, seed=1),
        normal(B, length, kv_heads, K, seed=2),
        normal(B, length, kv_heads, K, seed=3),
    )


def dense(length: int, heads: int, kv_heads: int, documents: object) -> tuple[Tensor, list[Tensor]]:
    q, k, v = (x.requires_grad_() for x in inputs(length, heads, kv_heads))
    begin = SequenceShard.whole(length, documents).document_begin()
    position = torch.arange(length)
    visible = (position[None, :] <= position[:, None]) & (position[None, None, :] >= begin[:, :, None])
    wide_k, wide_v = (x.repeat_interleave(heads // kv_heads, dim=2) for x in (k, v))
    scores = torch.einsum("bthk,bshk->bhts", q, wide_k) / K**0.5
    weights = scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
    out = torch.einsum("bhts,bshk->bthk", weights, wide_v)
    (out * normal(*out.shape, seed=4)).sum().backward()
    return out.detach(), [x.grad for x in (q, k, v)]  # type: ignore[misc]


def split(
    rank: int, world: int, length: int, heads: int, kv_heads: int, documents: object, strategy: str
) -> tuple[Tensor, list[Tensor], dict[str, int]]:
    shard = SequenceShard.split(length, None, documents)
    q, k, v = (local(x, shard) for x in inputs(length, heads, kv_heads))
    out = causal_attention(q, k, v, shard, strategy=strategy)
    (out * normal(B, length, heads, K, seed=4)[:, shard.start : shard.stop]).sum().backward()
    sent = {name: row.bytes_sent for name, row in shard.ledger.by_motion().items()}
    return out.detach(), [x.grad for x in (q, k, v)], sent  # type: ignore[misc]


CASES = [
    (heads, documents, strategy)
    for heads in ((4, 2), (6, 3), (5, 1))
    for documents in (None, DOCUMENTS)
    for strategy in STRATEGIES
]


def split_all(rank: int, world: int, length: int) -> list[tuple[Tensor, list[Tensor], dict[str, int]] | None]:
    """Every case in one set of processes; None where a layer has too few heads for a strategy."""
    results = []
    for heads, documents, strategy in CASES:
        possible = strategy != "heads" or heads[0] >= world
        results.append(split(rank, world, length, *heads, documents, strategy) if possible else None)
    return results


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_equals_dense(world: int) -> None:
    length = 26
    by_rank = run_ranks(split_all, world, length)
    for case, results in zip(CASES, zip(*by_rank, strict=True), strict=True):
        if results[0] is None:
            continue
        heads, documents, _ = case
        expected, expected_grads = dense(length, *heads, documents)
        assert relative_error(gathered(r[0] for r in results), expected) < 1e-12, case
        for i, true_grad in enumerate(expected_grads):
            assert relative_error(gathered(r[1][i] for r in results), true_grad) < 1e-12, case


def test_more_processes_than_heads() -> None:
    expected, _ = dense(40, 2, 1, None)
    for strategy in ("auto", "grid", "ring"):
        results = run_ranks(split, 8, 40, 2, 1, None, strategy)
        assert relative_error(gathered(r[0] for r in results), expected) < 1e-12


def test_negative_control_documents_do_not_leak() -> None:
    leaking, _ = dense(26, 4, 2, None)
    results = run_ranks(split, 2, 26, 4, 2, DOCUMENTS, "ring")
    assert relative_error(gathered(r[0] for r in results), leaking) > 1e-2


@pytest.mark.parametrize("places", [4, 8, 64])
def test_work_is_balanced(places: int) -> None:
    """The largest share of the work is at most 1.05 of the mean."""
    length = 1 << 16
    generator = torch.Generator().manual_seed(0)
    packed = tuple(tuple(sorted(torch.randint(1, length, (9,), generator=generator).tolist())) for _ in range(2))
    for documents in (None, packed):
        layout = balanced(length, places, documents)
        work = [sum(pairs_of(span, documents) for span in spans) for spans in layout.spans]
        assert max(work) <= 1.05 * sum(work) / places
        assert sum(layout.tokens(place) for place in range(places)) == length
    whole = sum(i - b + 1 for row in packed for b, i in zip(_begins(row, length), range(length), strict=True))
    assert sum(work) == whole


def _begins(row: tuple[int, ...], length: int) -> list[int]:
    return SequenceShard.whole(length, [list(row)]).document_begin()[0].tolist()


def test_bytes() -> None:
    """32 tokens over 4 processes, float64: heads moves q, k, v, out once; the ring moves keys three times."""
    n = 8 * B * 8 * K  # bytes of one head of this process's tokens
    for _, _, sent in run_ranks(split, 4, 32, 4, 4, None, "heads"):
        assert sent == {"heads.forward": 4 * 4 * n * 3 // 4, "heads.backward": 4 * 4 * n * 3 // 4}
    for _, _, sent in run_ranks(split, 4, 32, 4, 4, None, "ring"):
        assert sent["ring.forward"] == 3 * 2 * 4 * n
        assert sent["ring.backward"] == 3 * 2 * 4 * n + 4 * 2 * 4 * n


def test_bad_strategies_are_named() -> None:
    q = normal(1, 4, 2, K)
    with pytest.raises(ValueError, match="unknown attention strategy 'flash': choose auto, heads, ring, grid, gather"):
        causal_attention(q, q, q, SequenceShard.whole(4), strategy="flash")
    with pytest.raises(AssertionError, match="'heads' needs a head for each of 4 processes, the layer has 2"):
        run_ranks(split, 4, 8, 2, 1, None, "heads")
