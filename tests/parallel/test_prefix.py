"""prefix_state against a plain left-to-right fold on one process: values and every gradient, float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longstride.parallel import (
    CommunicationLedger,
    Constant,
    Dense,
    LogSpace,
    PerChannel,
    PerHead,
    SequenceShard,
    Transition,
    begin_prefix_state,
    prefix_state,
)
from longstride.parallel.prefix_strategies import STRATEGIES
from tests.distributed import run_ranks
from tests.parallel.oracles import normal, relative_error

B, D, N, LENGTH = 2, 5, 3, 37
KINDS = ["constant", "complex", "per_channel", "per_head", "turning_head", "dense", "log_space"]
DOCUMENTS = [None, [[3, 17], [30]], [[], [1, 2, 19, 20, 36]]]


def transition_of(kind: str, rank: int, tokens: int, reset: Tensor | None) -> tuple[Transition, Tensor]:
    """A transition of each class with its own numbers per rank, and the state that the rank reaches from zero."""
    if kind == "constant":
        return Constant(-normal(D, N, seed=1).abs() / 10, reset), normal(B, D, N, seed=100 + rank)
    if kind == "complex":
        log_decay = torch.complex(-normal(D, N, seed=1).abs() / 10, normal(D, N, seed=2))
        state = torch.complex(normal(B, D, N, seed=100 + rank), normal(B, D, N, seed=200 + rank))
        return Constant(log_decay, reset), state
    if kind == "per_channel":
        steps = normal(B, D, seed=300 + rank).abs()
        return PerChannel(-normal(D, N, seed=1).abs(), steps, reset), normal(B, D, N, seed=100 + rank)
    if kind == "per_head":
        return PerHead(-normal(B, D, seed=300 + rank).abs(), reset), normal(B, D, N, 4, seed=100 + rank)
    if kind == "turning_head":
        decay = torch.complex(-normal(B, D, seed=300 + rank).abs(), normal(B, D, seed=400 + rank))
        return PerHead(decay, reset), torch.complex(normal(B, D, N, seed=100 + rank), normal(B, D, N, seed=200 + rank))
    if kind == "log_space":
        exponent = 30 * normal(B, D, seed=500 + rank)  # far apart: sums in plain numbers would over- or underflow
        pair = normal(B, D, 2, seed=100 + rank)
        pair[..., 1] = pair[..., 1].abs() + 0.1
        return LogSpace(-normal(D, seed=1).abs(), reset), torch.cat([pair, exponent[..., None]], -1)
    matrix = normal(B, D, N, N, seed=300 + rank) / 2
    return Dense(matrix, reset), normal(B, D, N, 2, seed=100 + rank)


def leaves(transition: Transition, state: Tensor) -> tuple[Transition, Tensor, tuple[Tensor, ...]]:
    inputs = tuple(tensor.clone().requires_grad_() for tensor in transition.inputs())
    state = state.clone().requires_grad_()
    return transition.with_inputs(inputs), state, (state, *inputs)


def observe(kind: str, entering: Tensor, rank: int) -> Tensor:
    """A scalar that depends on every number of the state."""
    if kind == "log_space":  # as RWKV-4 reads it: a ratio, together with this token's own term
        a, b, p = entering.unbind(-1)
        k, v = 30 * normal(B, D, seed=900 + rank), normal(B, D, seed=950 + rank)
        q = torch.maximum(p, k).detach()
        return ((torch.exp(p - q) * a + torch.exp(k - q) * v) / (torch.exp(p - q) * b + torch.exp(k - q))).sum()
    weight = normal(*entering.shape, seed=900 + rank)
    if entering.is_complex():
        return (entering.real * weight).sum() + (entering.imag * weight.flip(0)).sum()
    return (entering * weight).sum()


def split(
    rank: int, world: int, kind: str, documents: object, strategy: str, node_size: int | None = None
) -> tuple[Tensor, list[Tensor], int]:
    ledger = CommunicationLedger()
    shard = SequenceShard.split(LENGTH, None, documents, ledger=ledger, node_size=node_size)
    transition, state = transition_of(kind, rank, shard.local_length, shard.reset_mask())
    transition, state, tensors = leaves(transition, state)
    entering = prefix_state(transition, state, shard, strategy=strategy)
    observe(kind, entering, rank).backward()
    sent = ledger.by_motion()["prefix_state.forward"].bytes_sent if world > 1 else 0
    return entering.detach(), [tensor.grad for tensor in tensors], sent  # type: ignore[misc]


def fold(world: int, kind: str, documents: list[list[int]] | None) -> list[tuple[Tensor | None, list[Tensor]]]:
    """The same on one process, the recurrence written out in plain numbers."""
    total = torch.zeros((), dtype=torch.float64)
    entering, collected, states = None, [], []
    for rank in range(world):
        bounds = [LENGTH // world * r + min(r, LENGTH % world) for r in range(world + 1)]
        tokens = bounds[rank + 1] - bounds[rank]
        transition, state, tensors = leaves(*transition_of(kind, rank, tokens, None))
        own = state
        if kind == "log_space":
            own = state[..., :2] * torch.exp(state[..., 2:])
        if entering is None:
            entering = torch.zeros_like(own)
        states.append(None if kind == "log_space" else entering.detach())
        if kind == "log_space":
            assert isinstance(transition, LogSpace)
            seen = torch.cat([entering, torch.zeros_like(entering[..., :1])], dim=-1)  # exponent 0: plain numbers
            moved = entering * torch.exp(transition.log_decay_D * tokens)[:, None]
        else:
            seen, moved = entering, transition.apply(transition.travelling(), tokens, entering)
        total = total + observe(kind, seen, rank)
        if documents is not None:
            rows = [any(bounds[rank] <= p < bounds[rank + 1] for p in row) for row in documents]
            keep = torch.tensor([0.0 if reset else 1.0 for reset in rows], dtype=torch.float64)
            moved = moved * keep.reshape(-1, *([1] * (moved.dim() - 1)))
        entering = moved + own
        collected.append(tensors)
    total.backward()
    grads = [[torch.zeros_like(t) if t.grad is None else t.grad for t in tensors] for tensors in collected]
    return list(zip(states, grads, strict=True))


def split_all(
    rank: int, world: int, cases: list[tuple[str, object, str]], node_size: int | None = None
) -> list[tuple[Tensor, list[Tensor], int]]:
    """Every case in one set of processes."""
    return [split(rank, world, kind, documents, strategy, node_size) for kind, documents, strategy in cases]


def check(world: int, strategies: list[str], node_size: int | None = None) -> None:
    cases = [(kind, documents, strategy) for kind in KINDS for documents in DOCUMENTS for strategy in strategies]
    by_rank = run_ranks(split_all, world, cases, node_size)
    for index, (kind, documents, strategy) in enumerate(cases):
        for rank, (true_state, true_grads) in enumerate(fold(world, kind, documents)):
            state, grads, _ = by_rank[rank][index]
            assert true_state is None or relative_error(state, true_state) < 1e-12, (kind, documents, strategy)
            for grad, true_grad in zip(grads, true_grads, strict=True):
                close = relative_error(grad, true_grad) < 1e-12 or float((grad - true_grad).abs().max()) < 1e-12
                assert close, (kind, documents, strategy)


@pytest.mark.parametrize("world", [2, 3, 5])
def test_equals_fold(world: int) -> None:
    check(world, sorted(STRATEGIES))


@pytest.mark.parametrize(("world", "node_size"), [(4, 2), (6, 2), (6, 6), (8, 8)])
def test_two_levels_equal_fold(world: int, node_size: int) -> None:
    """With nodes of 6 and 8 some processes are left without a slice of the five channels."""
    check(world, ["hierarchical"], node_size)


def test_negative_control_a_missing_reset_is_noticed() -> None:
    expected = fold(3, "per_channel", None)
    got = run_ranks(split, 3, "per_channel", DOCUMENTS[1], "all_gather")
    errors = [relative_error(a[0], b[0]) for a, b in zip(got, expected, strict=True) if b[0] is not None]
    assert max(errors) > 1e-3


Sent = dict[str, int]


def bytes_sent(rank: int, world: int, kinds: list[str], node_size: int | None) -> Sent:
    """Forward, by kind and strategy."""
    return {
        f"{kind} {strategy}": split(rank, world, kind, None, strategy, node_size)[2]
        for kind in kinds
        for strategy in STRATEGIES
    }


def test_bytes() -> None:
    """Mamba-1 sends the state and D step sums: 8 (D N + D) bytes in float64 per receiver, never 2 D N."""
    state = 8 * B * D * N
    for sent in run_ranks(bytes_sent, 2, ["per_channel", "constant"], None):
        assert sent["per_channel all_gather"] == state + 8 * B * D
        assert sent["constant all_gather"] == state
    by_rank = run_ranks(bytes_sent, 8, ["constant"], 4)
    assert max(sent["constant logarithmic"] for sent in by_rank) == 3 * state  # grows with log P
    assert [sent["constant pipelined"] for sent in by_rank] == 7 * [state] + [0]
    # to the three neighbours all but the own slice, and their prefixes home; between two nodes one slice to the right
    slices = [8 * B * N * channels for channels in (2, 1, 1, 1)]
    for rank, sent in enumerate(by_rank):
        own = slices[rank % 4]
        across = own if rank < 4 else 0
        assert sent["constant hierarchical"] == (state - own) + across + 3 * own


HALF = torch.bfloat16


def of_half_precision(rank: int, world: int) -> dict[str, list[tuple[Tensor, list[Tensor], int]]]:
    """By strategy, from bfloat16 inputs and from the same numbers in float32: the state, gradients, bytes sent."""
    found: dict[str, list[tuple[Tensor, list[Tensor], int]]] = {strategy: [] for strategy in STRATEGIES}
    for strategy, results in found.items():
        for dtype in (HALF, torch.float32):
            shard = SequenceShard.split(LENGTH, None, node_size=2, ledger=CommunicationLedger())
            rate, steps = -normal(D, N, seed=1).abs(), normal(B, D, seed=300 + rank).abs()
            numbers = (normal(B, D, N, seed=100 + rank), rate, steps)
            state, rate, steps = (x.to(HALF).to(dtype).requires_grad_() for x in numbers)
            entering = prefix_state(PerChannel(rate, steps), state, shard, strategy=strategy)
            observe("per_channel", entering, rank).backward()
            grads = [tensor.grad for tensor in (state, rate, steps) if tensor.grad is not None]
            results.append((entering.detach(), grads, shard.ledger.totals().bytes_sent))
    return found


def test_half_precision_travels_in_float32() -> None:
    """The result is what float32 makes of the same numbers, rounded once; a bfloat16 sum of steps would be off."""
    for by_strategy in run_ranks(of_half_precision, 4):
        for strategy, ((half, half_grads, sent), (single, grads, sent_in_float32)) in by_strategy.items():
            assert half.dtype == HALF and torch.equal(half, single.to(HALF)), strategy
            assert sent == sent_in_float32, strategy
            assert [grad.dtype for grad in half_grads] == [HALF] * 3, strategy
            for ours, theirs in zip(half_grads, grads, strict=True):
                # the gradient of the state that came in is rounded on its way
                assert float((ours - theirs).abs().max()) <= 2**-6 * float(theirs.abs().max()), strategy


def after_something(rank: int, world: int) -> list[tuple[Tensor, Tensor | None]]:
    """Entering states and the gradient of `initial`, of three processes; or with a fourth before, whose own it is."""
    before, found = world - 3, []
    for kind in KINDS:
        for documents in DOCUMENTS:
            rows = None if documents is None else [[before + position for position in row] for row in documents]
            bounds = [0, 13, 25, LENGTH] if not before else [0, 1, 14, 26, LENGTH + 1]
            shard = SequenceShard.split(bounds[-1], None, rows, bounds=bounds)
            initial = transition_of(kind, 9, 1, None)[1].requires_grad_()
            here = max(rank - before, 0)
            transition, own = transition_of(kind, here, shard.local_length, shard.reset_mask())
            own.requires_grad_()  # every process takes part in the backward pass
            if before:
                entering = prefix_state(transition, own if rank else initial, shard)
            else:
                entering = prefix_state(transition, own, shard, initial=initial)
            (observe(kind, entering, here) * (rank >= before)).backward()
            found.append((entering.detach(), initial.grad))
    return found


def test_a_state_before_the_sequence_is_that_of_a_shard_before_it() -> None:
    three, (first, *others) = run_ranks(after_something, 3), run_ranks(after_something, 4)
    for ours, theirs in zip(three, others, strict=True):
        assert all(relative_error(own[0], other[0]) < 1e-12 for own, other in zip(ours, theirs, strict=True))
    for (_, ours), (_, theirs) in zip(three[0], first, strict=True):
        assert ours is not None and theirs is not None and relative_error(ours, theirs) < 1e-12


def test_one_process_needs_no_group() -> None:
    shard = SequenceShard.whole(LENGTH)
    pending = begin_prefix_state(Constant(-torch.ones(D, N)), torch.ones(B, D, N), shard)
    assert torch.equal(pending.wait(), torch.zeros(B, D, N))


def test_unknown_strategy_is_named() -> None:
    with pytest.raises(AssertionError, match="unknown prefix strategy 'teleport': choose auto, all_gather"):
        run_ranks(split, 2, "constant", None, "teleport")
