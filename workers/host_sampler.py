"""How busy a process's host and GPU are, looked at once a second so that it costs a step next to nothing.

MLflow's own system metrics are logged by a thread of its own straight to the server: what a lost server misses is gone,
and only the first process is seen. These go through the step's record, under MLflow's names.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import psutil
import torch

INTERVAL = 1.0


class HostSample(NamedTuple):
    """NaN stands for what cannot be known.

    Attributes:
        cpu_percent: of the time since the sample before, over all cores.
        host_memory: bytes in use.
        gpu_percent: of this process's GPU, as NVML sees it; gpu_memory: bytes in use there, by whoever.
    """

    cpu_percent: float
    host_memory: float
    gpu_percent: float
    gpu_memory: float


class HostSampler:
    """Called after every step; the sample it returns is at most `INTERVAL` seconds old."""

    def __init__(self, *, on_gpu: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._on_gpu, self._clock = on_gpu, clock
        self._taken = -math.inf
        self._sample = HostSample(math.nan, math.nan, math.nan, math.nan)
        psutil.cpu_percent()  # the next call tells of the time since this one

    def __call__(self) -> HostSample:
        now = self._clock()
        if now - self._taken >= INTERVAL:
            self._taken = now
            gpu = (_gpu_percent(), _gpu_memory()) if self._on_gpu else (math.nan, math.nan)
            self._sample = HostSample(psutil.cpu_percent(), float(psutil.virtual_memory().used), *gpu)
        return self._sample


def _gpu_percent() -> float:
    try:
        return float(torch.cuda.utilization())
    except Exception:  # without nvidia-ml-py; or its own errors, where a driver does not tell (parts of a GPU)
        return math.nan


def _gpu_memory() -> float:
    free, total = torch.cuda.mem_get_info()
    return float(total - free)
