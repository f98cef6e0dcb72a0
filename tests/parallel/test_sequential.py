"""The sequential hand-off against the recurrence on one process: values, gradients, documents, bytes, order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from longstride.parallel import CommunicationLedger, SequenceShard, sequential_state
from tests.distributed import run_ranks
from tests.parallel.oracles import gathered, local, normal, relative_error

B, D = 2, 3
DOCUMENTS = [[5, 6, 14], [9]]


def recurrence(x_BTD: Tensor, weight_DD: Tensor, starts_BT: Tensor | None, state_BD: Tensor) -> tuple[Tensor, Tensor]:
    """h = tanh(W h + x), which no affine map summarises."""
    outputs = []
    for token in range(x_BTD.shape[1]):
        if starts_BT is not None:
            state_BD = state_BD.masked_fill(starts_BT[:, token, None], 0)
        state_BD = torch.tanh(state_BD @ weight_DD + x_BTD[:, token])
        outputs.append(state_BD)
    return torch.stack(outputs, dim=1), state_BD


def compute(shard: SequenceShard, *, learn: tuple[str, ...] = ("x", "weight", "initial")) -> dict[str, Any]:
    x = local(normal(B, shard.length, D), shard)
    weight, initial = normal(D, D, seed=1).requires_grad_(), normal(B, D, seed=2).requires_grad_()
    for name, tensor in (("x", x), ("weight", weight), ("initial", initial)):
        tensor.requires_grad_(name in learn)
    starts = shard.start_mask()
    y, last = sequential_state(lambda state: recurrence(x, weight, starts, state), initial, shard)
    loss = (y * local(normal(B, shard.length, D, seed=3), shard).detach()).sum()
    if shard.stop == shard.length:
        loss = loss + (last * normal(B, D, seed=4)).sum()
    loss.backward()
    return {"y": y.detach(), "x": x.grad, "weight": weight.grad, "initial": initial.grad}


def split(rank: int, world: int, length: int, documents: object, learn: tuple[str, ...]) -> tuple[dict[str, Any], int]:
    ledger = CommunicationLedger()
    shard = SequenceShard.split(length, None, documents, ledger=ledger)
    result = compute(shard, learn=learn)
    assert {row.motion for row in ledger.rows()} == {"sequential_state.forward", "sequential_state.backward"}
    assert ledger.totals().bytes_sent == ledger.totals().bytes_received
    return result, ledger.totals().bytes_sent


@pytest.mark.parametrize("documents", [None, DOCUMENTS])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_split_equals_whole(world: int, documents: object) -> None:
    length, learn = 17, ("x", "weight", "initial")
    expected = compute(SequenceShard.whole(length, documents))
    if world == 1:
        assert expected["initial"].abs().max() > 1e-3
        return
    results = [result for result, _ in run_ranks(split, world, length, documents, learn)]
    for name in ("y", "x"):
        assert relative_error(gathered(result[name] for result in results), expected[name]) < 1e-13, name
    for name in ("weight", "initial"):
        assert relative_error(sum(result[name] for result in results), expected[name]) < 1e-13, name


@pytest.mark.parametrize("learn", [("weight",), ("x",)])
def test_whatever_asks_for_gradients(learn: tuple[str, ...]) -> None:
    (name,) = learn
    expected = compute(SequenceShard.whole(11), learn=learn)[name]
    results = [result[name] for result, _ in run_ranks(split, 3, 11, None, learn)]
    actual = gathered(results) if name == "x" else torch.stack(results).sum(dim=0)
    assert relative_error(actual, expected) < 1e-13


def test_only_a_state_travels_whatever_the_length() -> None:
    state = 8 * B * D
    for length in (9, 90):
        sent = [sent for _, sent in run_ranks(split, 3, length, None, ("weight",))]
        assert sent == [state, 2 * state, state]  # forward to the right, gradients to the left


def indifferent(rank: int, world: int) -> Tensor:
    """A recurrence that ignores what enters: nothing depends on the hand-off, and nobody may wait for ever."""
    shard = SequenceShard.split(6)
    x = local(normal(B, 6, D), shard)
    y, _ = sequential_state(lambda state: (x.tanh(), torch.ones_like(state)), x.new_zeros(B, D), shard)
    y.sum().backward()
    assert x.grad is not None
    return x.grad


def test_a_state_that_nothing_depends_on() -> None:
    assert relative_error(gathered(run_ranks(indifferent, 2)), 1 - normal(B, 6, D).tanh() ** 2) < 1e-14


def last_states(rank: int, world: int) -> Tensor:
    shard = SequenceShard.split(9)
    x = local(normal(B, 9, D), shard)
    _, last = sequential_state(lambda s: recurrence(x, normal(D, D, seed=1), None, s), x.new_zeros(B, D), shard)
    last.sum().backward()
    assert x.grad is not None
    return x.grad


def test_the_state_that_leaves_any_process_has_a_gradient_of_its_own() -> None:
    x = normal(B, 9, D).requires_grad_()
    states, _ = recurrence(x, normal(D, D, seed=1), None, x.new_zeros(B, D))
    (expected,) = torch.autograd.grad(states[:, 4].sum() + states[:, 8].sum(), x)
    assert relative_error(gathered(run_ranks(last_states, 2)), expected) < 1e-14


def without_gradients(rank: int, world: int) -> Tensor:
    shard = SequenceShard.split(8)
    x = normal(B, 8, D)[:, shard.start : shard.stop]
    with torch.no_grad():
        y, _ = sequential_state(lambda s: recurrence(x, normal(D, D, seed=1), None, s), x.new_zeros(B, D), shard)
    assert not y.requires_grad
    return y


def test_without_gradients() -> None:
    expected, _ = recurrence(normal(B, 8, D), normal(D, D, seed=1), None, torch.zeros(B, D, dtype=torch.float64))
    assert relative_error(gathered(run_ranks(without_gradients, 2)), expected) < 1e-14
