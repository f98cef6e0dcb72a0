"""The state's message travels while the layer computes: with a slow link and slow products, nobody waits.

Every prefix message takes DELAY seconds here, and the first matrix product between its sending and its awaiting as
long. A layer that has a product there waits for nothing, forward and backward; with fast products it waits the delay.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longstride.models.mixers import matrix_memory
from longstride.parallel import (
    SequenceShard,
    Strategies,
    Transition,
    causal_attention,
    collectives,
    convolve,
    prefix_state,
    ring,
)
from longstride.parallel.prefix import PendingState
from tests.distributed import run_ranks

from ..timing import in_time
from .cases import WIDTH, make_mixer, numbers

DELAY, LENGTH = 0.2, 32
OVERLAPPED = [
    "mamba",
    "conba",
    "conba, linear",
    "mamba2",
    "retnet",
    "linear_attention",
    "rwkv4",
    "rwkv7",
    "h3",
    "s4",
    "s4d",
    "modal_hyena",
    "hyena_li",
]
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}
Waits = dict[tuple[str, bool], list[float]]


class LateWork:
    """A message that arrives `DELAY` after it was sent."""

    under_way = 0

    def __init__(self, work: dist.Work) -> None:
        self.work, self.due = work, time.perf_counter() + DELAY
        LateWork.under_way += 1

    def wait(self) -> None:
        LateWork.under_way = 0
        time.sleep(max(0.0, self.due - time.perf_counter()))
        self.work.wait()


class SlowProducts(TorchDispatchMode):
    """The first product while a message is under way takes `seconds`."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS and LateWork.under_way:
            LateWork.under_way = 0
            time.sleep(self.seconds)
        return func(*args, **(kwargs or {}))


def waits(rank: int, world: int, names: list[str]) -> Waits:
    """Seconds waited for states, forward and backward, by mixer and whether products are slow."""
    gather = dist.all_gather_single
    collectives.dist.all_gather_single = lambda *args, **kwargs: LateWork(gather(*args, **kwargs))
    found: Waits = {}
    for name in names:
        mixer = make_mixer(name)
        for slow in (False, True):
            shard = SequenceShard.split(LENGTH, dist.group.WORLD, strategies=Strategies(prefix="all_gather"))
            x_BTD = numbers("x", 1, LENGTH, WIDTH)[:, shard.start : shard.stop].clone().requires_grad_()
            with SlowProducts(DELAY if slow else 0.0):
                mixer(x_BTD, shard).sum().backward()
            rows = shard.ledger.by_motion()
            found[name, slow] = [rows[f"prefix_state.{way}"].seconds_waited for way in ("forward", "backward")]
    return found


@pytest.mark.timing
def test_nobody_waits_for_a_state_that_travels_meanwhile() -> None:
    for found in run_ranks(waits, 2, OVERLAPPED):
        for name in OVERLAPPED:
            in_time(min(found[name, False]) > 0.5 * DELAY, name, found)
            in_time(max(found[name, True]) < 0.5 * DELAY, name, found)


def eager_waits(rank: int, world: int) -> Waits:
    """RWKV-7 that awaits the state as soon as it has sent its own."""

    def at_once(transition: Transition, state: Tensor, shard: SequenceShard, **how: Any) -> PendingState:
        return PendingState(None, prefix_state(transition, state, shard, **how))

    with mock.patch.object(matrix_memory, "begin_prefix_state", at_once):
        return waits(rank, world, ["rwkv7"])


@pytest.mark.timing
def test_negative_control_who_computes_after_awaiting_waits() -> None:
    for found in run_ranks(eager_waits, 2):
        in_time(min(found["rwkv7", True]) > 0.5 * DELAY, found)


class SlowTaps(torch.autograd.Function):
    """Taps that take `seconds` to make, and as long in the backward pass."""

    @staticmethod
    def forward(ctx: Any, taps_DL: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return taps_DL.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.seconds)
        return grads[0], None


def channel_waits(rank: int, world: int) -> Waits:
    """Seconds waited by a convolution whose channels travel, forward and backward, by whether its filter is slow."""
    exchange = dist.all_to_all_single
    collectives.dist.all_to_all_single = lambda *args, **kwargs: LateWork(exchange(*args, **kwargs))
    found: Waits = {}
    for slow in (False, True):
        shard = SequenceShard.split(LENGTH, dist.group.WORLD)
        u_BTD = numbers("u", 1, LENGTH, 4)[:, shard.start : shard.stop].clone().requires_grad_()
        taps_DL = numbers("taps", 4, LENGTH).requires_grad_()

        def filter(lags_K: Tensor, channels: slice, taps_DL: Tensor = taps_DL, slow: bool = slow) -> Tensor:
            return SlowTaps.apply(taps_DL[channels, : len(lags_K)], DELAY * slow)

        convolve(u_BTD, filter, shard, form="channels").sum().backward()
        rows = shard.ledger.by_motion()
        found["channels", slow] = [rows[f"reshard.{way}"].seconds_waited for way in ("forward", "backward")]
    return found


@pytest.mark.timing
def test_channels_travel_while_the_filter_is_evaluated() -> None:
    """Of two messages each way, only the one that nothing can hide is waited for."""
    for found in run_ranks(channel_waits, 2):
        in_time(min(found["channels", False]) > 1.5 * DELAY, found)
        in_time(max(found["channels", True]) < 1.5 * DELAY, found)


def ring_events(rank: int, world: int) -> tuple[str, str]:
    """What a process of a ring does, in order: s sends keys, a attends with keys, forward and backward."""
    events: list[str] = []

    def told(letter: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def telling(*args: Any) -> Any:
            events.append(letter)
            return function(*args)

        return telling

    ring.Ring.pass_on = told("s", ring.Ring.pass_on)
    ring.attend_, ring._accumulate = told("a", ring.attend_), told("a", ring._accumulate)
    shard = SequenceShard.split(LENGTH, dist.group.WORLD)
    q, k, v = (numbers(x, 1, shard.local_length, 2, 4).requires_grad_() for x in "qkv")
    out = causal_attention(q, k, v, shard, strategy="ring")
    forward = "".join(events)
    events.clear()
    out.sum().backward()
    return forward, "".join(events)


def test_a_ring_sends_before_it_attends() -> None:
    for forward, backward in run_ranks(ring_events, 3):
        assert re.fullmatch("sa+sa+a+", forward), forward
        # gradients of the keys travel behind them: after each step, and once more to get home
        assert backward == "sas" + "sas" + "as"
