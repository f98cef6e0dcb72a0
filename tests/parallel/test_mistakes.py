"""Mismatched ranks raise one clear error on every rank; a dead or hung peer raises, nothing hangs."""

from __future__ import annotations

import re
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from longstride.parallel import CommunicationError, Constant, SequenceShard, halo, prefix_state, reshard
from tests.distributed import run_ranks


def mismatch(rank: int, world: int, what: str) -> str:
    length = 13 if what == "length" and rank == 1 else 12
    dtype = torch.float64 if what == "dtype" and rank == 1 else torch.float32
    documents = [3] if what == "documents" and rank == 1 else None
    shard = SequenceShard.split(length, None, documents, checked=True)
    x = torch.zeros(1, shard.local_length, 4, dtype=dtype)
    try:
        if what == "motion" and rank == 1:
            halo(x, 2, shard)
        elif what == "documents":
            prefix_state(Constant(torch.zeros(4)), x[:, 0], shard)
        else:
            reshard(x, shard, to="channels")
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("length", "give every rank the same length, bounds, documents and dtype"),
        ("dtype", "numbers of torch.float32 to rank 1, which expects 4 of torch.float64"),
        ("documents", "numbers of torch.float32 to rank"),
        ("motion", "are in different motions"),
    ],
)
def test_mismatches_raise_everywhere(what: str, message: str) -> None:
    for error in run_ranks(mismatch, 3, what):
        assert re.search(message, error), error


def hung_peer(rank: int, world: int) -> tuple[str, float]:
    group = dist.new_group(timeout=timedelta(seconds=2))
    shard = SequenceShard.split(8, group).labelled("blocks.3.mixer")
    begun = time.perf_counter()
    if rank == 1:
        time.sleep(5)
        return "slept", 0.0
    try:
        reshard(torch.zeros(1, 4, 4), shard, to="channels")
    except CommunicationError as error:
        return str(error), time.perf_counter() - begun
    return "no error", 0.0


def test_a_hung_peer_ends_at_the_timeout() -> None:
    message, seconds = run_ranks(hung_peer, 2)[0]
    assert message.startswith("reshard.forward in layer blocks.3.mixer: rank 0 of 2 lost its peers after waiting")
    assert seconds < 4
