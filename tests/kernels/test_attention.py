"""Causal attention in tiles against all scores at once: outputs, log-sum-exps and every gradient in float64."""

from functools import partial

import pytest
import torch
from torch import Tensor

from longstride.kernels import attention
from longstride.kernels.attention import blockwise
from longstride.kernels.attention.reference import attention_reference
from longstride.kernels.attention.tiles import tiles

from .compare import TOLERANCE, assert_same, leaf, outputs_and_gradients, relative_error, worst_error


def arguments(batch: int, queries: int, keys: int, heads: int, kv_heads: int, dim: int) -> list[Tensor]:
    return [
        leaf(batch, queries, heads, dim, seed=1),
        leaf(batch, keys, kv_heads, dim, seed=2),
        leaf(batch, keys, kv_heads, dim, seed=3),
    ]


def finite(function, *inputs: Tensor, **options) -> tuple[Tensor, Tensor]:
    """The log-sum-exp of a query that sees nothing is -inf; compare it as zero."""
    out, lse = function(*inputs, **options)
    return out, torch.where(torch.isinf(lse), 0.0, lse)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1, 2), (2, 7, 7, 2, 1, 3), (2, 65, 65, 4, 2, 8), (1, 130, 130, 3, 3, 5)]
)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_equals_all_scores(shape: tuple[int, ...], scale: float | None) -> None:
    assert_same(partial(attention, scale=scale), partial(attention_reference, scale=scale), arguments(*shape))


OFFSETS = [(40, 0), (40, 20), (40, 40), (40, 55), (40, 10), (40, 79), (40, 80), (40, 200), (0, 0), (100, 0)]


@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize("keys", [1, 20, 60])
def test_any_range_of_queries_and_keys(offsets: tuple[int, int], keys: int) -> None:
    options = {"query_start": offsets[0], "key_start": offsets[1]}
    inputs = arguments(2, 40, keys, 2, 1, 4)
    assert_same(partial(finite, attention, **options), partial(finite, attention_reference, **options), inputs)


def begins(length: int, query_start: int, *rows: tuple[int, ...]) -> Tensor:
    """Where each query's document begins, from the ascending global starts of each row."""
    positions = query_start + torch.arange(length)
    return torch.stack(
        [torch.tensor([0, *row])[torch.bucketize(positions, torch.tensor(row), right=True)] for row in rows]
    )


@pytest.mark.parametrize("offsets", [(0, 0), (30, 0), (30, 10), (30, 45)])
@pytest.mark.parametrize("rows", [((12, 31, 32, 40),), ((31,), (5, 50, 51)), ((33, 60), (33, 60)), ((20,), (69,))])
def test_documents(offsets: tuple[int, int], rows: tuple[tuple[int, ...], ...]) -> None:
    options = {"query_start": offsets[0], "key_start": offsets[1], "document_begin": begins(40, offsets[0], *rows)}
    inputs = arguments(2, 40, 45, 4, 2, 4)
    slow = partial(finite, attention_reference, **options)
    assert_same(partial(finite, attention, **options), slow, inputs)
    if (options["document_begin"] > offsets[1]).any():  # negative control, where the mask hides anything
        open_mask = {**options, "document_begin": None}
        assert worst_error(partial(finite, attention, **open_mask), slow, inputs) > 1e-3


def test_pieces_join_through_their_log_sum_exps() -> None:
    """Ring attention: two key ranges, merged by the caller, differentiate to the whole."""
    start = 24

    def ring(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        near, near_lse = attention(q, k[:, start:], v[:, start:], query_start=start, key_start=start)
        far, far_lse = attention(q, k[:, :start], v[:, :start], query_start=start)
        lse = torch.logaddexp(near_lse, far_lse)
        return torch.exp(near_lse - lse)[..., None] * near + torch.exp(far_lse - lse)[..., None] * far

    inputs = arguments(2, 20, 44, 2, 2, 4)
    assert_same(ring, lambda *x: attention_reference(*x, query_start=start)[0], inputs)

    def without_lse_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        near, near_lse = attention(q, k[:, start:], v[:, start:], query_start=start, key_start=start)
        far, far_lse = (
            x.detach() if x.dim() == 3 else x for x in attention(q, k[:, :start], v[:, :start], query_start=start)
        )
        lse = torch.logaddexp(near_lse, far_lse)
        return torch.exp(near_lse - lse)[..., None] * near + torch.exp(far_lse - lse)[..., None] * far

    slow = partial(attention_reference, query_start=start)
    assert worst_error(without_lse_gradient, lambda *x: slow(*x)[0], inputs) > 1e-3  # negative control


@pytest.mark.parametrize("which", [0, 1])
def test_gradcheck_of_each_output(which: int) -> None:
    options = {"query_start": 3, "document_begin": begins(4, 3, (5,))}
    function = lambda *x: attention(*x, **options)[which]  # noqa: E731
    assert torch.autograd.gradcheck(function, tuple(arguments(1, 4, 6, 2, 1, 3)))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("score_elements", [1, 1 << 25])
def test_plain_products_equal_the_fused_tile(monkeypatch, causal: bool, score_elements: int) -> None:
    """The code for other devices, one tile, against the reference."""
    monkeypatch.setattr(blockwise, "_SCORE_ELEMENTS", score_elements)
    queries, keys = 37, 37 if causal else 50
    inputs = arguments(2, queries, keys, 4, 2, 3)
    slow = partial(attention_reference, query_start=0 if causal else 1000)
    (out, lse), gradients = outputs_and_gradients(lambda *x: (*slow(*x)[:1], slow(*x)[1].detach()), inputs)
    q, k, v = (x.detach().transpose(1, 2) for x in inputs)
    fast_out, fast_lse = blockwise.tile_forward(q, k, v, causal, 3**-0.5)
    assert relative_error(fast_out.transpose(1, 2), out) < TOLERANCE
    assert relative_error(fast_lse.transpose(1, 2), lse) < TOLERANCE
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).transpose(1, 2)
    for fast, expected in zip(
        blockwise.tile_backward(grad, q, k, v, fast_out, fast_lse, causal, 3**-0.5), gradients, strict=True
    ):
        assert relative_error(fast.transpose(1, 2), expected) < TOLERANCE


def test_tiles_cover_the_visible_pairs_once() -> None:
    """Every visible pair is in exactly one tile, and nothing else is touched."""
    length, keys, query_start, key_start = 40, 45, 30, 10
    document_begin = begins(length, query_start, (31, 44, 45), (12, 60))
    count = torch.zeros(2, length, keys, dtype=torch.int64)
    for tile in tiles(2, length, keys, query_start, key_start, document_begin):
        block = count[tile.rows, tile.queries, tile.keys]
        block += torch.ones(block.shape[1:], dtype=torch.int64).tril() if tile.causal else 1
        assert not tile.causal or block.shape[1] == block.shape[2]
    query = query_start + torch.arange(length)[None, :, None]
    key = key_start + torch.arange(keys)[None, None]
    assert torch.equal(count, ((key <= query) & (key >= document_begin[:, :, None])).long())


def test_a_long_sequence_of_short_documents_computes_little() -> None:
    length = 4096
    document_begin = (torch.arange(length) // 64 * 64)[None]
    touched = sum(
        (t.queries.stop - t.queries.start) * (t.keys.stop - t.keys.start)
        for t in tiles(1, length, length, 0, 0, document_begin)
    )
    assert touched == length * 64


def test_blind_queries_and_lower_precision() -> None:
    q, k, v = (x.detach().to(torch.bfloat16) for x in arguments(1, 8, 8, 2, 2, 8))
    out, lse = attention(q, k, v, query_start=0, key_start=4)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert (out[:, :4] == 0).all() and torch.isneginf(lse[:, :4]).all()
    expected, _ = attention_reference(q.double(), k.double(), v.double(), key_start=4)
    assert relative_error(out, expected) < 1e-2


def test_wrong_arguments_are_named() -> None:
    q, k, v = (x.detach() for x in arguments(1, 4, 4, 3, 2, 2))
    with pytest.raises(ValueError, match="3 query heads are not a multiple of 2"):
        attention(q, k, v)
    with pytest.raises(ValueError, match="dtypes differ"):
        attention(q[:, :, :2], k.float(), v)
    with pytest.raises(ValueError, match="document_begin has shape"):
        attention(q[:, :, :2], k, v, document_begin=torch.zeros(1, 5, dtype=torch.int64))
