"""Killed at any moment and resumed, a run gives bitwise the losses of one that was left alone."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from torch.distributed import FileStore

from longstride.workers import RunDirectory, create_run, reopen_run, train_process
from longstride.workers.manifest import list_checkpoints
from longstride.workers.metrics import StepRecord, read_records
from longstride.workers.reporting import Silent

from ..distributed import PRELOAD
from .tiny import tiny_experiment

STEPS = 20
DEGREES = ["workers=2", "parallel.sequence=2", "checkpoint.every=4", "train.validate_every=5"]


class Slow(Silent):
    """Leaves time to be killed."""

    def stepped(self, record: StepRecord) -> None:
        time.sleep(0.05)


def work(rank: int, directory: str, store: str, resume: bool) -> None:
    torch.set_num_threads(1)
    run = RunDirectory(f"{directory}/tiny")
    experiment = tiny_experiment(directory, *DEGREES)
    train_process(
        experiment, rank, 2, run=run.url, store=FileStore(store, 2), threads=1, reporter=Slow(), resume=resume
    )


def start(directory: Path, attempt: str, *, resume: bool = False) -> list[mp.context.ForkServerProcess]:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    store = str(directory / f"store-{attempt}")
    processes = [
        context.Process(target=work, args=(rank, str(directory), store, resume), daemon=True) for rank in range(2)
    ]
    for process in processes:
        process.start()
    return processes


def finish(processes: list[mp.context.ForkServerProcess]) -> None:
    for process in processes:
        process.join(120)
        assert process.exitcode == 0


def losses(run: RunDirectory) -> list[tuple[int, float, float | None, float, int]]:
    return [(r.step, r.loss, r.validation_loss, r.grad_norm, r.tokens) for r in read_records(run.storage)]


def kill_after(processes: list[mp.context.ForkServerProcess], run: RunDirectory, step: int) -> int:
    """SIGKILLs all processes once the run has made `step` steps and a checkpoint; the last step it made."""
    deadline = time.monotonic() + 60
    while True:
        done = [record.step for record in read_records(run.storage)]
        if done and done[-1] >= step and any(found.committed for found in list_checkpoints(run)):
            break
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for process in processes:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
    for process in processes:
        process.join(10)
    return list(read_records(run.storage))[-1].step


def test_killed_twice_and_resumed_is_bitwise_the_run_left_alone(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole = create_run(tiny_experiment(str(tmp_path / "whole"), *DEGREES))
    finish(start(tmp_path / "whole", "0"))
    killed = create_run(tiny_experiment(str(tmp_path / "killed"), *DEGREES))
    last = kill_after(start(tmp_path / "killed", "0"), killed, 6)
    assert last < STEPS
    last = kill_after(start(tmp_path / "killed", "1", resume=True), killed, 13)
    assert last < STEPS
    reopen_run(killed)
    finish(start(tmp_path / "killed", "2", resume=True))
    assert losses(killed) == losses(whole)
    assert [step for step, *_ in losses(killed)] == list(range(1, STEPS + 1))
    starts = killed.read_info()["starts"]
    assert starts[0]["step"] == 0
    assert 0 < starts[1]["step"] < starts[2]["step"] < STEPS
    assert starts[1]["step"] % 4 == 0


def test_a_run_without_a_checkpoint_or_with_nothing_left_is_one_line(tmp_path: Path) -> None:

    run = create_run(tiny_experiment(str(tmp_path)))
    with pytest.raises(ValueError, match="has no complete checkpoint") as caught:
        reopen_run(run)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="seed cannot change"):
        reopen_run(run, ["seed=3"])
    with pytest.raises(ValueError, match=r"unknown setting train\.stepz; did you mean train\.steps"):
        reopen_run(run, ["train.stepz=3"])
