"""A training step over one sequence of up to 1,048,576 bases on 2 processes: time, memory and waiting by context.

The run of configs/ecoli-1m.yaml itself, two steps of it, each context on fresh processes: a process's peak memory
cannot be reset. Seconds are those of the second step, the peak is of all that the run did.
"""

from __future__ import annotations

import resource
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from longstride.parallel import Mesh
from longstride.workers import Experiment, RunDirectory, Trainer, create_run

from .processes import on_processes

CONFIG = Path(__file__).parent.parent / "configs" / "ecoli-1m.yaml"
PROCESSES = 2


@dataclass(frozen=True)
class Step:
    """A step over `context` bases: of the process that needs most memory, and the mean share of time waiting."""

    context: int
    seconds: float
    peak_bytes: int
    wait_share: float
    bytes_sent: int
    loss: float


def measure(longest: int) -> list[Step]:
    """From 16,384 bases upwards, four times as many each."""
    contexts = [context for context in (16_384, 65_536, 262_144, 1_048_576) if context <= longest]
    steps = []
    for context in contexts:
        steps.append(on_processes(train, PROCESSES, context))
        if len(steps) == 1:
            print("\n".join(table([])), flush=True)
        print(_line(asdict(steps[-1])), flush=True)
    return steps


def train(rank: int, world: int, context: int) -> Step:
    with tempfile.TemporaryDirectory() as directory:
        shared = [directory]
        dist.broadcast_object_list(shared)
        experiment = Experiment.load(
            str(CONFIG),
            [
                f"data.context={context}",
                f"workers={world}",
                "train.steps=2",
                "train.warmup=0",
                f"run.directory={shared[0]}",
                "run.name=measured",
                "tracking.enabled=false",
            ],
        )
        run = create_run(experiment) if rank == 0 else None
        dist.barrier()
        run = run or RunDirectory(f"{shared[0]}/measured")
        trainer = Trainer(experiment, Mesh(**asdict(experiment.degrees)), run)
        trainer.train()
        record = trainer.last_record
        assert record is not None
        peak = torch.tensor([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024])
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        return Step(context, record.seconds, int(peak), record.wait_share, record.bytes_sent, record.loss)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown."""
    head = "| bases | seconds a step | peak memory of a process, GiB | share of waiting | sent by all, bytes |"
    return [head, "|---|---|---|---|---|", *(_line(row) for row in rows)]


def _line(row: dict[str, Any]) -> str:
    return (
        f"| {row['context']:,} | {row['seconds']:.2f} | {row['peak_bytes'] / 2**30:.2f} | {row['wait_share']:.1%} "
        f"| {row['bytes_sent']:,} |"
    )
