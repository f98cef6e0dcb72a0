"""run_experts split over processes against a plain loop over tokens and experts; float64, every gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from longstride.parallel import SequenceShard, collectives, run_experts
from tests.distributed import run_ranks
from tests.parallel.oracles import gathered, normal, relative_error

D, E, BOUND = 4, 12, 1e-12


@dataclass(frozen=True)
class Case:
    """Tokens of each process, experts of each token; `lopsided`: nearly all choose the first experts, some get none."""

    tokens: tuple[int, ...]
    top_k: int
    lopsided: bool = False
    num_experts: int = E

    @property
    def total(self) -> int:
        return sum(self.tokens)


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scores = normal(case.total, case.num_experts, seed=1)
    if case.lopsided:
        scores[:, : case.top_k] += 100 * (torch.arange(case.total) % 7 > 0)[:, None]
    weight, index = scores.softmax(-1).topk(case.top_k)
    return normal(case.total, D), index, weight, normal(case.num_experts, D, D, seed=2)


def through_matrices(rows: Tensor, counts: Tensor, matrices: Tensor) -> Tensor:
    parts = rows.split(counts.tolist())
    return torch.cat([part @ matrix for part, matrix in zip(parts, matrices, strict=True)]).tanh()


def loop(case: Case) -> tuple[Tensor, list[Tensor]]:
    x, index, weight, matrices = inputs(case)
    tensors = [x.requires_grad_(), weight.requires_grad_(), matrices.requires_grad_()]
    rows = [
        sum((weight[n, j] * (x[n] @ matrices[index[n, j]]).tanh() for j in range(case.top_k)), start=torch.zeros(D))
        for n in range(case.total)
    ]
    out = torch.stack(rows)
    (out * normal(case.total, D, seed=3)).sum().backward()
    return out.detach(), [t.grad for t in tensors]  # type: ignore[misc]


Result = tuple[Tensor, list[Tensor], dict[str, int]]


def split(rank: int, world: int, cases: list[Case], shift: int = 0) -> list[Result]:
    """`shift`: of the experts that a process takes for its own, for a negative control."""
    results = []
    for case in cases:
        x, index, weight, matrices = inputs(case)
        # its length is not asked for; every message is compared with what its receivers expect
        shard = SequenceShard.split(world, None, expert_group=dist.group.WORLD, checked=True)
        here = slice(sum(case.tokens[:rank]), sum(case.tokens[: rank + 1]))
        mine = matrices.roll(shift, 0).chunk(world)[rank]
        x, weight, matrices = (leaf.clone().requires_grad_() for leaf in (x[here], weight[here], mine))
        out = run_experts(
            x, index[here], weight, lambda r, c, m=matrices: through_matrices(r, c, m), case.num_experts, shard
        )
        (out * normal(case.total, D, seed=3)[here]).sum().backward()
        sent = {motion: row.bytes_sent for motion, row in shard.ledger.by_motion().items()}
        results.append((out.detach(), [x.grad, weight.grad, matrices.grad], sent))
    return results


def errors(case: Case, results: tuple[Result, ...]) -> list[float]:
    """Of outputs and the gradients of tokens, weights and matrices."""
    out, grads = loop(case)
    pairs = [(gathered((r[0] for r in results), dim=0), out)]
    pairs += [(gathered((r[1][i] for r in results), dim=0), grad) for i, grad in enumerate(grads)]
    return [relative_error(ours, true) for ours, true in pairs]


def tokens(world: int) -> list[tuple[int, ...]]:
    """Uneven counts; some processes without a token; one token in all."""
    return [(7, 4, 0, 5)[:world], (0, 6, 0, 0)[:world] if world > 1 else (6,), (*[0] * (world - 1), 1)]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_equals_loop(world: int) -> None:
    cases = [
        Case(counts, top_k, lopsided)
        for counts in tokens(world)
        for top_k in (1, 2, 3, 4)
        for lopsided in (False, True)
    ]
    for case, results in zip(cases, zip(*run_ranks(split, world, cases), strict=True), strict=True):
        assert max(errors(case, results)) < BOUND, case


def test_experts_of_another_process_are_noticed() -> None:
    """The negative control: outputs, and every gradient."""
    case = Case((7, 4), 2)
    assert min(errors(case, tuple(results[0] for results in run_ranks(split, 2, [case], 1)))) > 1e-3


@pytest.mark.parametrize("world", [2, 4])
def test_bytes_are_those_of_each_token_once_to_each_process(world: int) -> None:
    cases = [Case((7, 4, 0, 5)[:world], top_k) for top_k in (1, 2, 4)]
    for case, results in zip(cases, zip(*run_ranks(split, world, cases), strict=True), strict=True):
        owners = (inputs(case)[1] // (E // world)).split(case.tokens)
        goes = [[sum(p in row for row in rows.tolist()) for p in range(world)] for rows in owners]
        assert case.top_k == 1 or sum(map(sum, goes)) < case.top_k * case.total, "some travel for two experts"
        for rank, (_, _, sent) in enumerate(results):
            leave = sum(goes[rank][p] for p in range(world) if p != rank)
            arrive = sum(goes[p][rank] for p in range(world) if p != rank)
            assert sent == {
                "experts.counts": 8 * (world - 1),
                # rows, weights and a byte for the number of each expert; results come back
                "experts.forward": leave * (8 * D + 8 * case.top_k + case.top_k) + arrive * 8 * D,
                "experts.backward": leave * 8 * D + arrive * (8 * D + 8 * case.top_k),
            }


def test_more_experts_on_a_process_than_a_byte_counts() -> None:
    case = Case((9, 8), 3, num_experts=1200)
    results = tuple(result[0] for result in run_ranks(split, 2, [case]))
    assert max(errors(case, results)) < BOUND
    assert results[0][2]["experts.forward"] % 4 == 0


class Told:
    """A message under way: w, it was awaited."""

    def __init__(self, work: dist.Work | None, events: list[str]) -> None:
        assert work is not None
        self.work, self.events = work, events

    def wait(self) -> None:
        self.events.append("w")
        self.work.wait()


class Experts(torch.autograd.Function):
    """e: experts were at work, in either pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, events: list[str]) -> Tensor:
        ctx.events = events
        events.append("e")
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.events.append("e")
        return grads[0], None


def events_of(rank: int, world: int) -> tuple[str, str]:
    """What a process does, in order, forward and backward; s: a message was sent."""
    events: list[str] = []
    send = dist.all_to_all_single

    def telling(*args: Any, **options: Any) -> Told:
        events.append("s")
        return Told(send(*args, **options), events)

    collectives.dist.all_to_all_single = telling
    x, index, weight, _ = inputs(Case((8, 8), 2))
    here = slice(8 * rank, 8 * rank + 8)
    x, weight = x[here].clone().requires_grad_(), weight[here].clone().requires_grad_()
    shard = SequenceShard.split(world, None, expert_group=dist.group.WORLD)
    out = run_experts(x, index[here], weight, lambda rows, _: Experts.apply(rows, events), E, shard)
    forward = "".join(events)
    events.clear()
    out.sum().backward()
    return forward, "".join(events)


def test_results_and_their_gradients_travel_while_the_tokens_that_stay_are_computed() -> None:
    for forward, backward in run_ranks(events_of, 2):
        # counts; experts' numbers, weights and rows; experts at work on what arrived; results, and what stays
        assert forward == "sw" + "sss" + "ww" + "ew" + "sew"
        # gradients of results, and what stays; those of weights, experts at work, those of rows
        assert backward == "sew" + "ses" + "ww"


def test_experts_that_do_not_divide_are_named() -> None:
    with pytest.raises(AssertionError, match="6 experts cannot be spread over 4 processes"):
        run_ranks(split, 4, [Case((1, 1, 1, 1), 2, num_experts=6)])


def test_an_expert_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"expert 12 is outside 0 \.\. 11"):
        run_experts(normal(1, D), torch.tensor([[12]]), normal(1, 1), lambda r, c: r, E, SequenceShard.whole(1))
