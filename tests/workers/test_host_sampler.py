"""What the processes measure of their hosts, and what a step's record says of them all."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import psutil
import pytest
import torch

from longstride.parallel import CommunicationLedger, Mesh
from longstride.workers.exchange import Shared, StepExchange
from longstride.workers.host_sampler import HostSample, HostSampler
from longstride.workers.metrics import StepRecord
from longstride.workers.mlflow_client import SYSTEM_METRICS, values
from longstride.workers.shared_outcomes import gloo_group

from ..distributed import run_ranks
from .test_run_directory import record


def test_a_sample_is_taken_once_a_second() -> None:
    now = [0.0]
    sampler = HostSampler(on_gpu=False, clock=lambda: now[0])
    first = sampler()
    assert abs(first.host_memory - psutil.virtual_memory().used) < 0.2 * psutil.virtual_memory().total
    assert math.isnan(first.gpu_percent) and math.isnan(first.gpu_memory)
    now[0] = 0.99
    assert sampler() is first
    now[0] = 1.0
    spent = time.process_time() + 0.05
    while time.process_time() < spent:
        pass
    assert sampler() is not first
    assert 0 < sampler().cpu_percent <= 100


def test_a_step_pays_next_to_nothing_for_it() -> None:
    sampler = HostSampler(on_gpu=False)
    sampler()
    began = time.process_time()
    for _ in range(10_000):
        sampler()
    assert (time.process_time() - began) / 10_000 < 0.2e-3


def test_a_gpu_is_asked_and_may_be_silent_about_its_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no GPU here: torch's two questions are answered for it."""

    def silent() -> float:
        raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed")

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3 * 2**30, 8 * 2**30))
    monkeypatch.setattr(torch.cuda, "utilization", lambda: 73)
    assert HostSampler(on_gpu=True)()[2:] == (73.0, 5 * 2**30)

    class NVMLError(Exception):
        """Not one of Python's, as NVML's own are."""

    def unknown() -> float:
        raise NVMLError("Not Supported")

    for answer in (silent, unknown):
        monkeypatch.setattr(torch.cuda, "utilization", answer)
        percent, memory = HostSampler(on_gpu=True)()[2:]
        assert math.isnan(percent) and memory == 5 * 2**30


def exchange(rank: int, world_size: int) -> Shared:
    """What is shared after a step of 2 s."""
    exchange = StepExchange(Mesh(data=world_size), CommunicationLedger(), gloo_group())
    samples = [HostSample(10.0, 5e9, math.nan, math.nan), HostSample(30.0, 4e9, 80.0, 2e9)]
    exchange._sampler = lambda: samples[rank]  # type: ignore[assignment]
    return exchange(2.0, 0.5 * rank, stop=rank == 1, unwritten=rank == 1, time_is_up=rank == 1)


def test_all_processes_hear_the_mean_the_fullest_and_the_first() -> None:
    first, second = run_ranks(exchange, 2)
    assert first == second
    measures = first.measures
    assert (measures.cpu_percent, measures.host_memory) == (20.0, 5_000_000_000)
    assert (measures.gpu_percent, measures.gpu_memory) == (80.0, 2_000_000_000), "of the one that has a GPU"
    assert (measures.wait_share, measures.data_share, measures.bytes_sent) == (0.0, 0.25, 0)
    assert first.stop and first.unwritten, "any may ask to stop, or miss a checkpoint"
    assert not first.time_is_up, "only the first process's clock counts"


def test_mlflow_hears_of_what_was_measured() -> None:
    measured = replace(record(1), cpu_percent=20.0, host_memory=5_000_000_000)
    found = {name: value for name, value in values(measured).items() if name in SYSTEM_METRICS}
    assert found == {
        "system/cpu_utilization_percentage": 20.0,
        "system/system_memory_usage_megabytes": pytest.approx(5000.0),
    }
    old = {name: value for name, value in vars(measured).items() if not name.startswith(("cpu", "host", "gpu"))}
    assert not SYSTEM_METRICS.keys() & values(StepRecord.from_dict(old)).keys(), "records of older versions"
