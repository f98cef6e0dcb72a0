"""A worker that is refused memory: the run goes on from its newest checkpoint, with the losses of one left alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from ..orchestrator.commands import finish, losses, running, write_config
from ..orchestrator.nodes import title, wait_until
from ..orchestrator.test_cluster import info, recorded

STEPS = 60
# An embedding's gradient of 48 MiB is allocated anew in every step: malloc asks the system for what is that large.
SETTINGS = (
    "workers=2",
    "model.vocab_size=65536",
    "model.width=96",
    f"train.steps={STEPS}",
    "train.dtype=float64",
    "train.validate_every=0",
    "checkpoint.every=3",
    "checkpoint.asynchronous=true",
)


def starve(process: psutil.Process) -> None:
    """The system gives the process no more memory: its address space may not grow beyond less than what it has."""
    limit = process.memory_info().vms - (256 << 20)
    process.rlimit(psutil.RLIMIT_AS, (limit, limit))


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_worker_without_memory_is_replaced(tmp_path: Path) -> None:
    write_config(tmp_path)
    run, peace = (tmp_path / "runs" / name for name in ("starved", "peace"))
    with running("train", "small.yaml", *SETTINGS, "run.name=starved", directory=tmp_path) as training:
        wait_until(lambda: recorded(run) >= 5, "step 5", timeout=300)
        children = psutil.Process(training.pid).children(recursive=True)
        workers = [process for process in children if title(process).startswith("ray::Worker")]
        assert len(workers) == 2
        starve(workers[0])
        wait_until(lambda: len(info(run)["starts"]) == 2, "another start", timeout=300)
        outcome = finish(training, timeout=300)
    assert outcome.code == 0, outcome.stderr
    resumed = info(run)["starts"][1]["step"]
    assert resumed > 0 and resumed % 3 == 0
    (failure,) = info(run)["failures"]
    assert f"{failure['cause']}; going on from step {resumed}" in outcome.stdout + outcome.stderr
    assert "worker" in failure["cause"]
    assert any(word in failure["cause"] for word in ("memory", "died", "alloc")), failure["cause"]

    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += ["-m", "longstride.orchestrator", "train", "small.yaml", *SETTINGS, "run.name=peace"]
    subprocess.run(words, cwd=tmp_path, check=True, capture_output=True)
    assert len(losses(run)) == STEPS
    assert losses(run) == losses(peace), "bitwise"
