"""Run a benchmark's function on several processes of this machine, one thread each, over gloo."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PRELOAD = ["torch", "torch.distributed.fsdp", "torch.distributed.checkpoint", "torch._dynamo", "longstride.workers"]


def on_processes(function: Callable[..., Any], world_size: int, *args: Any) -> Any:
    """Call `function(rank, world_size, *args)` on fresh processes; returns what rank 0 returned.

    They are forks of a server that has imported everything once, and so start at once.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ["OMP_NUM_THREADS"] = "1"
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    results = context.SimpleQueue()
    arguments = (function, world_size, port, results, args)
    processes = mp.start_processes(_run, arguments, nprocs=world_size, join=False, start_method="forkserver")
    assert processes is not None
    value = None
    while not processes.join(timeout=0.2):
        if value is None and not results.empty():
            value = results.get()
    return value if value is not None else results.get()


def _run(
    rank: int, function: Callable[..., Any], world_size: int, port: int, results: Any, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    value = function(rank, world_size, *args)
    if rank == 0:
        results.put(value)
    dist.barrier()
    dist.destroy_process_group()
