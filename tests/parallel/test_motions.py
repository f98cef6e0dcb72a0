"""halo, reshard and global sums against slices of the global tensor: values, gradients, bytes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from longstride.parallel import (
    CommunicationLedger,
    Constant,
    SequenceShard,
    causal_attention,
    global_sum,
    halo,
    pair_sum,
    prefix_state,
    projected_halo,
    reshard,
    run_experts,
)
from longstride.parallel.shard import check_bounds, even_bounds
from tests.distributed import run_ranks
from tests.parallel.oracles import gathered, local, normal, relative_error

B, D = 2, 3
DOCUMENTS = [[5, 6, 14], [9]]


def split_halo(rank: int, world: int, length: int, width: int, documents: object) -> tuple[Tensor, Tensor, int]:
    shard = SequenceShard.split(length, None, documents, ledger=CommunicationLedger())
    x = local(normal(B, length, D), shard)
    tokens = halo(x, width, shard)
    ((tokens * normal(B, width, D, seed=rank + 1)).sum() + 0 * x.sum()).backward()
    return tokens.detach(), x.grad, shard.ledger.totals().bytes_sent  # type: ignore[return-value]


def whole_halo(world: int, length: int, width: int, documents: object) -> tuple[list[Tensor], Tensor]:
    x = normal(B, length, D).requires_grad_()
    halos, total = [], torch.zeros((), dtype=torch.float64)
    for rank in range(world):
        start = length // world * rank + min(rank, length % world)
        padded = torch.cat([x.new_zeros(B, width, D), x], dim=1)[:, start : start + width]
        for row in range(B):
            begin = max([p for p in (documents[row] if documents else []) if p <= start], default=0)  # type: ignore[index]
            keep = (torch.arange(start - width, start) >= begin).to(x.dtype)
            padded = torch.cat([padded[:row], (padded[row] * keep[:, None])[None], padded[row + 1 :]])
        halos.append(padded.detach())
        total = total + (padded * normal(B, width, D, seed=rank + 1)).sum()
    total.backward()
    assert x.grad is not None
    return halos, x.grad


HALOS = [(width, documents) for width in (0, 1, 3, 11) for documents in (None, DOCUMENTS)]  # 11: wider than a shard


def split_halos(rank: int, world: int, length: int) -> list[tuple[Tensor, Tensor, int]]:
    return [split_halo(rank, world, length, width, documents) for width, documents in HALOS]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_halo(world: int) -> None:
    length = 17
    by_rank = run_ranks(split_halos, world, length)
    for (width, documents), results in zip(HALOS, zip(*by_rank, strict=True), strict=True):
        expected, expected_grad = whole_halo(world, length, width, documents)
        for (tokens, _, _), true_tokens in zip(results, expected, strict=True):
            assert torch.equal(tokens, true_tokens)
        if width:
            assert relative_error(gathered(grad for _, grad, _ in results), expected_grad) < 1e-14


def test_halo_bytes_are_width_times_channels() -> None:
    sent = [sent for _, _, sent in run_ranks(split_halo, 3, 30, 4, None)]
    one = 8 * B * 4 * D
    assert sent == [one, 2 * one, one]  # forward to the right neighbour, gradients to the left one


def both_orders(rank: int, world: int, length: int) -> list[tuple[list[Tensor], list[Tensor], int]]:
    """Halo of the projection, and projection of the halo, each with its gradients; bytes of the second."""
    found = []
    for width, documents in HALOS:
        results, ledger = [], CommunicationLedger()
        shard = SequenceShard.split(length, None, documents, ledger=ledger)
        for narrow in (False, True):
            x = local(normal(B, length, D), shard)
            weight, bias = normal(5, D, seed=7).requires_grad_(), normal(5, seed=8).requires_grad_()

            def project(x: Tensor, weight: Tensor = weight, bias: Tensor = bias) -> Tensor:
                return torch.nn.functional.linear(x, weight, bias)

            ledger.reset()
            tokens = projected_halo(project, x, width, shard) if narrow else halo(project(x), width, shard)
            ((tokens * normal(B, width, 5, seed=rank + 1)).sum() + 0 * x.sum()).backward()
            gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in (x, weight, bias)]
            results.append([tokens.detach(), *gradients])
        found.append((results[0], results[1], ledger.totals().bytes_sent))
    return found


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_halo_may_be_projected_after_the_journey(world: int) -> None:
    for (width, _), parts in zip(HALOS, zip(*run_ranks(both_orders, world, 17), strict=True), strict=True):
        for wide, narrow, _ in parts:
            torch.testing.assert_close(narrow[:2], wide[:2], rtol=1e-12, atol=1e-12)
        for index in (2, 3):  # a process projects its neighbours' tokens: only the sum over processes is the same
            sums = [torch.stack([part[order][index] for part in parts]).sum(0) for order in (0, 1)]
            torch.testing.assert_close(sums[1], sums[0], rtol=1e-12, atol=1e-12)
        if world == 2 and width:
            assert [sent for *_, sent in parts] == [8 * B * min(width, 9) * D] * 2


def there_and_back(rank: int, world: int, length: int) -> tuple[list[Tensor], Tensor, Tensor, int]:
    shard = SequenceShard.split(length, None, ledger=CommunicationLedger())
    x, y = local(normal(B, length, 7), shard), local(normal(B, length, 4, 2, seed=5), shard)
    x_channels, y_channels = reshard((x, y), shard, to="channels")
    forward_bytes = shard.ledger.totals().bytes_sent
    weight = normal(B, length, 7, seed=9)
    back = reshard(x_channels * 2, shard, to="length", channels=7)
    (back * weight[:, shard.start : shard.stop]).sum().backward()
    assert y_channels.shape[:2] == (B, length)
    return [x_channels.detach(), y_channels.detach()], back.detach(), x.grad, forward_bytes  # type: ignore[return-value]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_reshard_there_and_back(world: int) -> None:
    length = 13
    results = run_ranks(there_and_back, world, length)
    assert torch.equal(gathered((r[0][0] for r in results), dim=2), normal(B, length, 7))
    assert torch.equal(gathered((r[0][1] for r in results), dim=2), normal(B, length, 4, 2, seed=5))
    assert torch.equal(gathered(r[1] for r in results), 2 * normal(B, length, 7))
    assert torch.equal(gathered(r[2] for r in results), 2 * normal(B, length, 7, seed=9))


def test_reshard_bytes() -> None:
    results = run_ranks(there_and_back, 2, 12)
    assert [r[3] for r in results] == [8 * B * 6 * (3 + 2 * 2), 8 * B * 6 * (4 + 2 * 2)]


def summed(rank: int, world: int) -> tuple[Tensor, Tensor]:
    x = torch.tensor([1.0 + rank], dtype=torch.float64, requires_grad=True)
    total = global_sum(x, SequenceShard.split(world, None))
    (3 * total).sum().backward()
    return total.detach(), x.grad  # type: ignore[return-value]


def test_global_sum_backward_is_partial() -> None:
    for total, grad in run_ranks(summed, 3):
        assert total.item() == 6.0
        assert grad.item() == 3.0


MOTIONS: dict[str, Callable[[Tensor, SequenceShard], Tensor]] = {
    "halo": lambda x, shard: halo(x, 2, shard),
    "reshard": lambda x, shard: reshard(x, shard, to="channels"),
    "prefix": lambda x, shard: prefix_state(Constant(x.new_full((1,), -0.1)), x.sum(1), shard),
    "heads": lambda x, shard: causal_attention(*[x.unflatten(2, (2, 2))] * 3, shard),
    "ring": lambda x, shard: causal_attention(*[x.unflatten(2, (2, 2))] * 3, shard, strategy="ring"),
    "pairs": lambda x, shard: pair_sum(lambda q, k, _: q * k.sum(1, keepdim=True), x, x, shard),
    "experts": lambda x, shard: run_experts(
        x.flatten(0, 1), torch.arange(4).view(4, 1) % 2, x.new_ones(4, 1), lambda rows, _: rows**2, 2, shard
    ),
}


def second_derivatives(rank: int, world: int) -> dict[str, str]:
    """What is said to who asks for one."""
    shard = SequenceShard.split(8, expert_group=dist.group.WORLD)
    said = {}
    for name, motion in MOTIONS.items():
        x = normal(1, 4, 4, seed=rank).requires_grad_()
        (first,) = torch.autograd.grad(motion(x, shard).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError) as error:
            first.square().sum().backward()
        said[name] = str(error.value)
    return said


def test_a_second_derivative_raises_on_every_process() -> None:
    """Instead of being wrong, or of sending messages for which nobody waits."""
    for said in run_ranks(second_derivatives, 2):
        assert said.keys() == MOTIONS.keys()
        assert all("differentiate twice" in error for error in said.values()), said


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="3 tokens cannot be split over 5"):
        check_bounds(even_bounds(3, 5), 3, 5)
    with pytest.raises(ValueError, match="document start 20 lies outside the sequence of 10 tokens"):
        SequenceShard.whole(10, [20])
    with pytest.raises(ValueError, match="choose 'channels' or 'length'"):
        reshard(torch.zeros(1, 4, 4), SequenceShard.whole(4), to="batch")
