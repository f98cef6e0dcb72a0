"""torch.distributed over the processes of a run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import HashStore, Store  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.distributed_c10d import _world

# A process that waits longer than this for another gives up.
COLLECTIVE_TIMEOUT = timedelta(minutes=10)


@contextmanager
def process_group(
    rank: int, world_size: int, store: Store | None, device: str | None, threads: int | None
) -> Iterator[str]:
    """torch.distributed over the run's processes (gloo; NCCL beside it on GPUs); the kind of device is the value."""
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads or max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", world_size))))
    backend, name = "gloo", device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda":
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(_local_gpu())
    if store is None and world_size == 1:
        store = HashStore()
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT)
    try:
        yield name
    finally:
        dist.destroy_process_group()


def leave_groups() -> None:
    """Ends all groups but the one of all processes, once no process needs them any more; all call it.

    Nothing else ends them: each keeps threads and open files, on GPUs memory too, for as long as its process lives.
    """
    dist.barrier()
    for group in list(_world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def _local_gpu() -> int:
    """LOCAL_RANK's GPU; the first where a process sees only its own (as Ray arranges it)."""
    return int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
