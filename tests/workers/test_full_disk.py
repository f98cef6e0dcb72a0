"""A disk that takes no more: the line says so, not what torch makes of it."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from longstride.workers import create_run, train_process
from longstride.workers.checkpoint import CheckpointError
from longstride.workers.manifest import list_checkpoints

from .tiny import tiny_experiment


@pytest.mark.parametrize("room", [8_000, 40_000], ids=["a first tensor", "a few"])
def test_what_the_disk_says_is_the_cause(room: int, tmp_path: Path) -> None:
    experiment = tiny_experiment(str(tmp_path), "train.steps=4", "checkpoint.every=2")
    run = create_run(experiment)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))  # a real error of a real write, as ENOSPC is
    try:
        with pytest.raises(CheckpointError, match=r"step-00000002 was not written .*File too large"):
            train_process(experiment, threads=1, device="cpu")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not any(found.committed for found in list_checkpoints(run))
