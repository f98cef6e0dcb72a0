"""What one process finds out, all know; and who fails alone does not leave the others waiting."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from longstride.data.errors import StoreUnavailable
from longstride.workers.manifest import NoCheckpoint
from longstride.workers.shared_outcomes import SharedOutcomes, gloo_group

from ..distributed import run_ranks


class Lost(Exception):
    pass


def fail(error: Exception) -> Any:
    raise error


def agree(rank: int, world_size: int) -> list[object]:
    here = SharedOutcomes(gloo_group(), "the books", Lost, as_is=(NoCheckpoint,))
    plain = SharedOutcomes()
    found: list[object] = [
        here.from_first(lambda: f"said by {rank}"),
        here.from_all(lambda: rank * 10),
        here.gather(rank),
    ]
    for work in (
        lambda: here.from_first(lambda: fail(OSError("no room")) if rank == 0 else "not asked"),
        lambda: here.from_first(lambda: fail(NoCheckpoint("none yet"))),
        lambda: here.from_all(lambda: fail(OSError("no room")) if rank == 1 else rank),
        lambda: plain.from_first(lambda: fail(StoreUnavailable("s3 is away"))),
    ):
        with pytest.raises(Exception) as raised:
            work()
        found.append((raised.type.__name__, str(raised.value)))
        dist.barrier()  # nobody was left behind in an earlier message
    return found


def test_all_know_the_same() -> None:
    outcomes = run_ranks(agree, 3)
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert outcomes[0] == [
        "said by 0",
        [0, 10, 20],
        [0, 1, 2],
        ("Lost", "the books: no room"),
        ("NoCheckpoint", "none yet"),
        ("Lost", "the books: process 1: no room"),
        ("StoreUnavailable", "s3 is away"),
    ]
