"""What the processes tell each other after every step: one message, on the CPU."""

from __future__ import annotations

import math
from typing import NamedTuple

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from ..parallel import CommunicationLedger, Mesh
from .host_sampler import HostSampler


class Measures(NamedTuple):
    """What a step's record has of all processes, see `StepRecord`."""

    wait_share: float
    data_share: float
    memory: int
    bytes_sent: int
    cpu_percent: float | None
    host_memory: int | None
    gpu_percent: float | None
    gpu_memory: int | None


class Shared(NamedTuple):
    """The same on every process.

    Attributes:
        stop: whether any process was asked to stop.
        unwritten: whether any process found that the checkpoint beside training cannot be written.
        time_is_up: whether the time between checkpoints has passed on the first process's clock.
    """

    measures: Measures
    stop: bool
    unwritten: bool
    time_is_up: bool


class StepExchange:
    """Every process of the mesh has one and calls it after every step.

    Args:
        group: of all processes, for CPU tensors.
    """

    def __init__(self, mesh: Mesh, ledger: CommunicationLedger, group: dist.ProcessGroup) -> None:
        self._mesh, self._ledger, self._group = mesh, ledger, group
        self._process = psutil.Process()
        self._on_gpu = mesh.device == "cuda"
        self._sampler = HostSampler(on_gpu=self._on_gpu)

    def __call__(self, seconds: float, reading: float, *, stop: bool, unwritten: bool, time_is_up: bool) -> Shared:
        """`seconds` the step took, of which `reading` were spent waiting for data."""
        memory = torch.cuda.max_memory_allocated() if self._on_gpu else self._process.memory_info().rss
        shares = [self._ledger.seconds_waited / seconds, reading / seconds]
        counts = [float(memory), float(self._ledger.totals().bytes_sent)]
        flags = [float(stop), float(unwritten), float(time_is_up)]
        own = torch.tensor([*shares, *counts, *self._sampler(), *flags], dtype=torch.float64)
        everyone: list[Tensor] = [torch.empty_like(own) for _ in range(self._mesh.world_size)]
        dist.all_gather(everyone, own, group=self._group)
        values = torch.stack(everyone)
        # NaN is what a process does not know
        mean, highest = values.nanmean(0).tolist(), values.nan_to_num(nan=-math.inf).amax(0).tolist()
        measures = Measures(
            wait_share=mean[0],
            data_share=highest[1],
            memory=int(highest[2]),
            bytes_sent=int(values[:, 3].sum()),
            cpu_percent=None if math.isnan(mean[4]) else mean[4],
            host_memory=None if math.isinf(highest[5]) else int(highest[5]),
            gpu_percent=None if math.isnan(mean[6]) else mean[6],
            gpu_memory=None if math.isinf(highest[7]) else int(highest[7]),
        )
        return Shared(measures, bool(highest[8]), bool(highest[9]), bool(everyone[0][10]))
