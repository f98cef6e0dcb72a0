"""Run a function on several real processes (gloo), fast: one fork server that has torch loaded already.

A spawned process would spend 15 seconds importing; a fork of the server starts in a tenth of a second.
"""

from __future__ import annotations

import io
import multiprocessing as mp
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Only libraries: our own modules take milliseconds, and one that fails to import would take the server down.
PRELOAD = [
    "torch",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "numpy",
    "pydantic",
]


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240) -> list[Any]:
    """Call `function(rank, world_size, *args)` on `world_size` processes; return what they returned, by rank.

    `function` must be importable (module level). Results may hold tensors. One rank's failure fails the call with
    every rank's traceback; a hang fails it after `timeout` seconds.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as directory:
        store = str(Path(directory) / "store")
        processes, connections = [], []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_run, args=(sender, function, rank, world_size, store, timeout, args), daemon=True
            )
            process.start()
            sender.close()
            processes.append(process)
            connections.append(receiver)
        outcomes = [_receive(connection, timeout) for connection in connections]
        for process in processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
    failures = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(outcomes) if error]
    if failures:
        raise AssertionError("\n".join(failures))
    return [value for value, _ in outcomes]


def _receive(connection: Connection, timeout: float) -> tuple[Any, str | None]:
    try:
        if not connection.poll(timeout):
            return None, f"no answer within {timeout:.0f} s"
        value, error = torch.load(io.BytesIO(connection.recv_bytes()), weights_only=False)
        return value, error
    except EOFError:
        return None, "died without an answer"


def _run(
    sender: Connection,
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    store: str,
    timeout: float,
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    outcome: tuple[Any, str | None]
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        dist.barrier()  # a rank that fails at once must not leave while others still connect to it
        outcome = (function(rank, world_size, *args), None)
    except BaseException:
        outcome = (None, traceback.format_exc())
    buffer = io.BytesIO()
    torch.save(outcome, buffer)
    sender.send_bytes(buffer.getvalue())
    sender.close()
    if dist.is_initialized() and outcome[1] is None:
        dist.destroy_process_group()
