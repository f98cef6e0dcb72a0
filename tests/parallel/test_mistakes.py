"""Mismatched ranks raise one clear error on every rank; a dead or hung peer raises, nothing hangs."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from longstride.parallel import (
    CommunicationError,
    Constant,
    Mesh,
    SequenceShard,
    halo,
    prefix_state,
    reshard,
    sequential_state,
)
from tests.distributed import run_ranks
from tests.parallel.oracles import normal

from ..timing import in_time


def attempt(make: Callable[[], object]) -> str:
    try:
        make()
    except (ValueError, CommunicationError) as error:
        return str(error)
    return "no error"


def pipelined(x_BTD: Tensor, shard: SequenceShard) -> Tensor:
    return prefix_state(Constant(torch.zeros(1)), x_BTD[:, 0, :, None], shard, strategy="pipelined")


def in_turns(x_BTD: Tensor, shard: SequenceShard) -> Tensor:
    return sequential_state(lambda state: (x_BTD, state), x_BTD[:, 0], shard)[0]


MOTIONS: dict[str, Callable[[Tensor, SequenceShard], Tensor]] = {
    "reshard": lambda x, shard: reshard(x, shard, to="channels"),
    "halo": lambda x, shard: halo(x, 2, shard),
    "pipelined": pipelined,
    "in turns": in_turns,
}


def mismatches(rank: int, world: int) -> dict[tuple[str, str], str]:
    """What every rank is told when rank 1 is wrong."""
    found: dict[tuple[str, str], str] = {}
    odd = rank == 1
    for what, options in {
        "length": {"length": 13 if odd else 12},
        "too short": {"length": 2 if odd else 12},
        "bounds": {"length": 12, "bounds": [0, 3, 8, 12] if odd else [0, 4, 8, 12]},
        "document": {"length": 12, "document_starts": [3 if odd else 4]},
        "no document": {"length": 12, "document_starts": None if odd else [4]},
        "document outside": {"length": 12, "document_starts": [30 if odd else 4]},
    }.items():
        found["shard", what] = attempt(lambda options=options: SequenceShard.split(checked=True, **options))
    mesh = Mesh(sequence=world)
    found["mesh", "length"] = attempt(lambda: mesh.shard(13 if odd else 12))
    found["mesh", "documents"] = attempt(lambda: mesh.shard(12, [3] if odd else [4], checked=True))
    shard = SequenceShard.split(12, checked=True)
    for name, motion in MOTIONS.items():
        x = torch.zeros(1, 4, 4, dtype=torch.float64 if odd else torch.float32)
        found[name, "dtype"] = attempt(lambda motion=motion, x=x: motion(x, shard))
        y = torch.zeros(1, 4, 5 if odd else 4)
        found[name, "channels"] = attempt(lambda motion=motion, y=y: motion(y, shard))
    different = MOTIONS["reshard" if odd else "halo"]
    found["reshard or halo", "motion"] = attempt(lambda: different(torch.zeros(1, 4, 4), shard))
    return found


REMEDY = "give every rank the same length, bounds, documents and dtype"
TOLD = {
    ("shard", "length"): f"rank 0 has sequences of 12 tokens, rank 1 of 13: {REMEDY}",
    ("shard", "bounds"): f"rank 1 has other bounds than rank 0: {REMEDY}",
    ("shard", "document"): f"rank 1 has other document starts than rank 0: {REMEDY}",
    ("shard", "no document"): f"rank 1 has other document starts than rank 0: {REMEDY}",
    ("mesh", "length"): f"rank 0 has sequences of 12 tokens, rank 1 of 13: {REMEDY}",
    ("mesh", "documents"): f"rank 1 has other document starts than rank 0: {REMEDY}",
    ("reshard or halo", "motion"): "are in different motions",
}


def test_mismatches_raise_everywhere() -> None:
    by_rank = run_ranks(mismatches, 3)
    for what, message in TOLD.items():
        assert all(message in found[what] for found in by_rank), (what, [found[what] for found in by_rank])
    for what in by_rank[0]:
        if what[1] in ("dtype", "channels"):
            assert len({found[what] for found in by_rank}) == 1, (what, [found[what] for found in by_rank])
            assert re.search(r"rank \d sends \d+ numbers of torch.float\d\d to rank \d, which", by_rank[0][what]), what
    own = {
        "too short": "a sequence of 2 tokens cannot be split over 3 processes: use at most 2",
        "document outside": "document start 30 lies outside the sequence of 12 tokens",
    }
    for what, message in own.items():
        assert by_rank[1]["shard", what] == message
        for rank in (0, 2):
            assert by_rank[rank]["shard", what].startswith("rank 1 of the sequence group cannot make its shard")


def groups(rank: int, world: int) -> tuple[str, str, Tensor | None]:
    """A group of another size, one that this process is not in, and one whose ranks are not neighbours."""
    apart, turned = dist.new_group([0, 2]), dist.new_group([0, 2, 1])
    wrong_size = attempt(lambda: SequenceShard.split(12, turned, bounds=[0, 6, 12]))
    outside = attempt(lambda: SequenceShard.split(12, apart))
    states = []
    for group in (turned, apart):
        if group is not dist.GroupMember.NON_GROUP_MEMBER:
            shard = SequenceShard.split(12, group, checked=True)
            x_BTD = normal(1, 12, 4)[:, shard.start : shard.stop]
            states.append(torch.cat([tokens(x_BTD, shard) for tokens in (MOTIONS["halo"], _state)], dim=1))
            assert torch.equal(states[-1][:, :2], normal(1, 12, 4)[:, shard.start - 2 : shard.start]) or not shard.start
    return wrong_size, outside, states[0][:, 2:]


def _state(x_BTD: Tensor, shard: SequenceShard) -> Tensor:
    return prefix_state(Constant(torch.zeros(1)), x_BTD.sum(1)[..., None], shard).mT


def test_groups_of_any_ranks_and_of_the_wrong_size() -> None:
    """torch orders a group's ranks, however they are written; shards follow the group's own order."""
    for rank, (wrong_size, outside, state) in enumerate(run_ranks(groups, 3)):
        assert wrong_size == "bounds (0, 6, 12) must be 4 ascending offsets from 0 to 12, no part empty"
        told = "this process is not in the sequence group: only the group's members have a shard"
        assert outside == (told if rank == 1 else "no error")
        assert state is not None and torch.allclose(state[0, 0], normal(1, 12, 4)[0, : 4 * rank].sum(0))


LOSSES = ["reshard", "pipelined", "in turns"]  # by collective, along a chain, in turns; a halo is a collective


def hung_peer(rank: int, world: int) -> dict[str, tuple[str, float]]:
    """Rank 1 sleeps beyond the timeouts of all groups."""
    found = {}
    made = {name: dist.new_group(timeout=timedelta(seconds=1)) for name in [*LOSSES, "comparing"]}
    if rank == 1:
        time.sleep(len(made) + 1)
        return {}
    for name, group in made.items():
        begun = time.perf_counter()
        if name == "comparing":
            message = attempt(lambda group=group: SequenceShard.split(8, group, checked=True))
        else:
            shard = SequenceShard.split(8, group).labelled("blocks.3.mixer")
            x = torch.zeros(1, 4, 4, requires_grad=True)
            message = attempt(lambda x=x, shard=shard, name=name: MOTIONS[name](x, shard).sum().backward())
        found[name] = message, time.perf_counter() - begun
    return found


@pytest.mark.timing
def test_a_hung_peer_ends_at_the_timeout_which_is_named() -> None:
    found = run_ranks(hung_peer, 2)[0]
    motions = {
        "reshard": "reshard.forward in layer blocks.3.mixer: ",
        "pipelined": "prefix_state.forward in layer blocks.3.mixer: ",
        "in turns": "sequential_state.forward in layer blocks.3.mixer: ",
        "comparing": "comparing shards: ",
    }
    for name, start in motions.items():
        message, seconds = found[name]
        assert message.startswith(start + "rank 0 of 2 lost its peers"), (name, message)
        assert "(a message may take 1 s)" in message, (name, message)
        in_time(seconds < 3, name, seconds)


def dead_peer(rank: int, world: int, name: str, told: Path) -> None:
    """Rank 1 dies once the connection stands; rank 0 writes down what it was told, and after how many seconds."""
    shard = SequenceShard.split(8).labelled("blocks.3.mixer")
    x = torch.zeros(1, 4, 4, requires_grad=True)
    MOTIONS[name](x, shard).sum().backward()
    if rank == 1:
        os._exit(1)
    begun = time.perf_counter()
    message = attempt(lambda: MOTIONS[name](x, shard).sum().backward())
    told.write_text(f"{time.perf_counter() - begun} {message}")


@pytest.mark.timing
@pytest.mark.parametrize("name", LOSSES)
def test_a_dead_peer_raises_at_once(name: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"^rank 1: died without an answer$"):
        run_ranks(dead_peer, 2, name, tmp_path / "told")
    seconds, message = (tmp_path / "told").read_text().split(" ", 1)
    assert "in layer blocks.3.mixer: rank 0 of 2 lost its peers after waiting" in message
    in_time(float(seconds) < 5, message)  # the group's timeout is 120
