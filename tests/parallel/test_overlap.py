"""The state is on its way while the gate is projected: with slow messages and a slow projection, waiting disappears.

A message is made to take LATENCY seconds and the projection LONGER, forward and backward. Mixers that wait at once for
what they sent (the control) wait that long; those that compute in between hardly wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor, nn

from longstride.models.mixers import mamba, mamba2, retnet
from longstride.parallel import PendingState, SequenceShard, Strategies, convolution, prefix, prefix_strategies
from tests.distributed import run_ranks
from tests.models.cases import WIDTH, make_mixer, numbers

LATENCY, LONGER, LENGTH = 0.2, 0.3, 16

# case: where its prefix begins, and what it computes meanwhile
OVERLAPPING = {
    "mamba": (mamba, "project_gate"),
    "conba": (mamba, "project_gate"),
    "mamba2": (mamba2, "project_gate"),
    "retnet": (retnet, "g_proj"),
    "h3": (convolution, "q_proj"),
}


@dataclass
class LateMessage:
    """A message that has arrived no earlier than `due`."""

    work: dist.Work
    due: float

    def wait(self) -> None:
        self.work.wait()
        time.sleep(max(0.0, self.due - time.monotonic()))


def late(gather: Callable[..., Any]) -> Callable[..., Any]:
    def send(x: Tensor, shard: SequenceShard, motion: str) -> Any:
        pending = gather(x, shard, motion)
        pending.work = LateMessage(pending.work, time.monotonic() + LATENCY)
        return pending

    return send


def slow(project: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same numbers after LONGER seconds, and as long again in the backward pass."""

    def compute(x: Tensor) -> Tensor:
        time.sleep(LONGER)
        y = project(x).clone()
        y.register_hook(lambda gradient: time.sleep(LONGER))
        return y

    return compute


def at_once(transition: Any, state: Tensor, shard: SequenceShard) -> PendingState:
    return PendingState(None, prefix.prefix_state(transition, state, shard))


def seconds_waited(rank: int, world: int, overlapping: bool) -> dict[str, tuple[float, float]]:
    """Of each mixer, for its state and for its state's gradient."""
    prefix_strategies.gather = late(prefix_strategies.gather)
    waited = {}
    for name, (where, projection) in OVERLAPPING.items():
        if not overlapping:
            where.begin_prefix_state = at_once
        mixer = make_mixer(name)
        project = getattr(mixer, projection)
        if isinstance(project, nn.Module):
            project.forward = slow(project.forward)
        else:
            setattr(mixer, projection, slow(project))
        shard = SequenceShard.split(LENGTH, dist.group.WORLD, strategies=Strategies(prefix="all_gather"))
        x_BTD = numbers("x", 1, LENGTH, WIDTH)[:, shard.start : shard.stop].requires_grad_()
        dist.barrier()
        mixer(x_BTD, shard).sum().backward()
        rows = shard.ledger.by_motion()
        waited[name] = tuple(rows[f"prefix_state.{way}"].seconds_waited for way in ("forward", "backward"))
    return waited


@pytest.mark.parametrize("overlapping", [True, False])
def test_the_state_travels_while_the_gate_is_projected(overlapping: bool) -> None:
    for waited in run_ranks(seconds_waited, 2, overlapping):
        for name, seconds in waited.items():
            for way, each in zip(("forward", "backward"), seconds, strict=True):
                if overlapping:
                    assert each < LATENCY / 2, f"{name} waits {each:.3f} s in its {way} pass"
                else:
                    assert each > 0.9 * LATENCY, f"{name} waits {each:.3f} s in its {way} pass"
