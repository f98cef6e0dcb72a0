"""Every strategy of split attention against a dense softmax on one process; work and bytes; float64."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from longstride.parallel import SequenceShard, causal_attention
from longstride.parallel.heads import Team, take_heads
from longstride.parallel.layout import Layout, balanced, contiguous, pairs_before, relayout, replicated
from longstride.parallel.ring import Ring
from longstride.parallel.shard import even_bounds
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


def split_by_each(
    rank: int, world: int, heads: tuple[int, int], strategies: list[str], length: int
) -> list[tuple[Tensor, list[Tensor], dict[str, int]]]:
    return [split(rank, world, length, *heads, None, strategy) for strategy in strategies]


def test_more_processes_than_heads() -> None:
    expected, _ = dense(40, 2, 1, None)
    for results in zip(*run_ranks(split_by_each, 8, (2, 1), ["auto", "grid", "ring"], 40), strict=True):
        assert relative_error(gathered(r[0] for r in results), expected) < 1e-12


def test_negative_control_documents_do_not_leak() -> None:
    leaking, _ = dense(26, 4, 2, None)
    results = run_ranks(split, 2, 26, 4, 2, DOCUMENTS, "ring")
    assert relative_error(gathered(r[0] for r in results), leaking) > 1e-2


LENGTH = 1 << 16
SHORT_THEN_LONG = ((*range(64, LENGTH * 9 // 10, 64), LENGTH * 9 // 10),)
PACKINGS: dict[str, tuple[tuple[int, ...], ...] | None] = {
    "one document": None,
    "short documents, then a long one": SHORT_THEN_LONG,
    "a long document, then short ones": (tuple(range(LENGTH // 10, LENGTH, 64)),),
    "short, long, short": ((*range(64, LENGTH // 2, 64), LENGTH // 2, *range(LENGTH // 2 + 6000, LENGTH, 64)),),
    "one row each way": (*SHORT_THEN_LONG, tuple(range(LENGTH // 10, LENGTH, 64))),
    "documents of one token, then a long one": (tuple(range(1, LENGTH * 9 // 10)),),
    "documents of one length": (tuple(range(64, LENGTH, 64)),),
    "a document of one token at the end": ((LENGTH - 1,),),
}


def work_of(layout: Layout, documents: tuple[tuple[int, ...], ...] | None) -> list[int]:
    """Visible pairs, by place."""
    before = pairs_before(documents)
    return [sum(before(stop) - before(start) for start, stop in place) for place in layout.spans]


def share(layout: Layout, documents: tuple[tuple[int, ...], ...] | None, length: int) -> tuple[float, float]:
    """The largest place's work and tokens over the mean; every token lies at exactly one place."""
    spans = sorted(span for place in layout.spans for span in place)
    assert spans[0][0] == 0 and spans[-1][1] == length
    assert all(a[1] == b[0] for a, b in pairwise(spans))
    work = work_of(layout, documents)
    tokens = [layout.tokens(place) for place in range(len(work))]
    return max(work) * len(work) / sum(work), max(tokens) * len(work) / length


@pytest.mark.parametrize("places", [4, 8, 64])
@pytest.mark.parametrize("packing", PACKINGS)
def test_work_is_balanced(packing: str, places: int) -> None:
    """The largest share of the work is at most 1.05 of the mean, and no place holds most of the tokens."""
    work, tokens = share(balanced(LENGTH, places, PACKINGS[packing]), PACKINGS[packing], LENGTH)
    assert work <= 1.05 and tokens <= 1.27


def test_no_packing_is_found_that_is_not_balanced() -> None:
    generator = random.Random(0)
    for _ in range(150):
        places, power = generator.choice((4, 5, 8, 16)), generator.choice((0.2, 1.0, 5.0))
        length = places * generator.choice((64, 100, 1000, 8192))
        documents = tuple(
            tuple(
                sorted({int(length * generator.random() ** power) for _ in range(generator.choice((1, 4, 60)))} - {0})
            )
            for _ in range(generator.choice((1, 2, 4)))
        )
        work, tokens = share(balanced(length, places, documents), documents, length)
        assert work <= 1.05 and tokens <= 1.3, (places, length, documents)


def test_negative_control_equal_tiles_are_not_balanced() -> None:
    """Sixteen tiles of equal length for each of 64 places, dealt in turns."""
    tiles = list(pairwise(even_bounds(LENGTH, 16 * 64)))
    dealt = Layout(tuple(tuple(tiles[place::64]) for place in range(64)))
    assert share(dealt, SHORT_THEN_LONG, LENGTH)[0] > 1.1


@pytest.mark.parametrize("places", [4, 8])
def test_what_a_ring_computes_is_what_was_balanced(places: int) -> None:
    """Pairs in the tiles that are handed to the kernel, over all steps of the ring."""
    length = 4096
    documents = ((*range(64, 3600, 64), 3600), (5, 1000))
    layout = balanced(length, places, documents)
    begin_BL = SequenceShard.whole(length, documents).whole_document_begin()
    computed = []
    for place, spans in enumerate(layout.spans):
        shard = SequenceShard(even_bounds(length, places), place, document_starts=documents)
        begin_BW = torch.cat([begin_BL[:, a:b] for a, b in spans], dim=1)
        ring = Ring(shard, layout, tuple(range(places)), begin_BW)
        pairs = 0
        for queries, keys, where in (meeting for visitor in range(places) for meeting in ring.meetings(visitor)):
            q, k = (torch.empty(2, part.stop - part.start) for part in (queries, keys))
            for tile in where.tiles(q, k):
                wide, high = tile.queries.stop - tile.queries.start, tile.keys.stop - tile.keys.start
                rows = tile.rows.stop - tile.rows.start
                pairs += rows * (wide * (wide + 1) // 2 if tile.causal else wide * high)
        computed.append(pairs)
    assert computed == work_of(layout, documents)
    visible = torch.arange(length) - begin_BL + 1
    assert sum(computed) == int(visible.sum())
    assert max(computed) <= 1.05 * sum(computed) / places


def test_bytes() -> None:
    """32 tokens over 4 processes, float64: heads moves q, k, v, out once; the ring moves keys three times."""
    n = 8 * B * 8 * K  # bytes of one head of this process's tokens
    for (_, _, by_heads), (_, _, sent) in run_ranks(split_by_each, 4, (4, 4), ["heads", "ring"], 32):
        assert by_heads == {"heads.forward": 4 * 4 * n * 3 // 4, "heads.backward": 4 * 4 * n * 3 // 4}
        assert sent["ring.forward"] == 3 * 2 * 4 * n
        assert sent["ring.backward"] == 3 * 2 * 4 * n + 4 * 2 * 4 * n


def test_bad_strategies_are_named() -> None:
    q = normal(1, 4, 2, K)
    with pytest.raises(ValueError, match="unknown attention strategy 'flash': choose auto, heads, ring, grid, gather"):
        causal_attention(q, q, q, SequenceShard.whole(4), strategy="flash")
    with pytest.raises(AssertionError, match="'heads' needs a head for each of 4 processes, the layer has 2"):
        run_ranks(split, 4, 8, 2, 1, None, "heads")


def in_half(rank: int, world: int, length: int) -> list[Tensor]:
    """Outputs and gradients of the ring in bfloat16."""
    return half_attention(SequenceShard.split(length), "ring")


def half_attention(shard: SequenceShard, strategy: str, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Of inputs that are bfloat16 numbers, whatever the dtype."""
    given = [x.bfloat16().to(dtype) for x in (*inputs(shard.length, 4, 2), normal(B, shard.length, 4, K, seed=4))]
    q, k, v, weight = (local(x, shard) for x in given)
    out = causal_attention(q, k, v, shard, strategy=strategy)
    (out * weight.detach()).sum().backward()
    return [out.detach(), *(x.grad for x in (q, k, v))]  # type: ignore[list-item]


def test_the_ring_adds_up_in_single_precision() -> None:
    """In half types its errors are hardly those of one process, though every process joins and adds several parts."""
    length, most = 512, (1.2, 1.25, 0.73, 0.78)  # outputs and gradients of q, k, v; 1.31, 0.77 and 0.88 if in half
    exact, alone = (
        half_attention(SequenceShard.whole(length), "auto", dtype) for dtype in (torch.float64, torch.bfloat16)
    )
    for place, parts in enumerate(zip(*run_ranks(in_half, 4, length), strict=True)):
        error, least = (float((x - exact[place]).norm()) for x in (gathered(parts), alone[place]))
        assert error < most[place] * least, (place, error / least)


COPYING = ("heads", "relayout")


def given_to_all(rank: int, world: int, length: int) -> list[tuple[Tensor, dict[str, int]]]:
    """Gradients in bfloat16, and what was sent, of tokens of which every process takes a copy: as a head, or whole."""
    grad = normal(world, B, length, 1, K, seed=5)[rank].bfloat16()
    ranks, results = tuple(range(world)), []
    for name in COPYING:
        shard = SequenceShard.split(length)
        x = local(normal(B, length, 1, K), shard).detach().bfloat16().requires_grad_()
        if name == "heads":
            everywhere = take_heads(x, Team(shard, ranks, ((0, 1),) * world))
        else:
            everywhere = relayout(x, shard, contiguous(shard.bounds), replicated(length, world), ranks)
        everywhere.backward(grad)
        assert x.grad is not None
        results.append((x.grad, {name: row.bytes_sent for name, row in shard.ledger.by_motion().items()}))
    return results


def test_copies_gradients_add_up_in_single_precision() -> None:
    """Rounded once, though they travel in the half type that they are computed in."""
    length, world = 33, 4
    parts = normal(world, B, length, 1, K, seed=5).bfloat16()
    by_rank = run_ranks(given_to_all, world, length)
    for name, results in zip(COPYING, zip(*by_rank, strict=True), strict=True):
        assert torch.equal(gathered(grad for grad, _ in results), parts.float().sum(0).bfloat16()), name
        sent = [row[f"{name}.backward"] for _, row in results]
        tokens = [b - a for a, b in pairwise(even_bounds(length, world))]
        assert sent == [2 * B * K * (length - own) for own in tokens], name
    one_by_one = torch.zeros_like(parts[0])
    for part in parts:
        one_by_one += part
    assert not torch.equal(one_by_one, parts.float().sum(0).bfloat16())  # negative control
