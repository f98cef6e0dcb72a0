"""infra/slurm/train.sbatch as it is, submitted to a real Slurm cluster of two nodes (see slurm.py)."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ..orchestrator.commands import losses, write_config
from .slurm import NODES, PROGRAMS, Slurm
from .test_slurm import SCRIPT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.soak,
    pytest.mark.timeout(900),
    pytest.mark.skipif(any(shutil.which(name) is None for name in PROGRAMS), reason="Slurm is not installed"),
    pytest.mark.skipif(os.geteuid() != 0, reason="nodes with host names of their own need root"),
]

STEPS = 36
SETTINGS = ("parallel.sequence=2", f"train.steps={STEPS}", "train.validate_every=0", "checkpoint.every=10")
# Says where each process is; the first also says how many CPUs Slurm gave to a task.
PLACES = """#!/bin/bash
echo "$RANK/$WORLD_SIZE $LOCAL_RANK/$LOCAL_WORLD_SIZE $(hostname) $MASTER_ADDR $OMP_NUM_THREADS" > "place-$RANK"
if [ "$RANK" = 0 ]; then scontrol show step "$SLURM_JOB_ID.0" > step; fi
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with Slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that jobs are submitted from."""
    directory = tmp_path_factory.mktemp("jobs")
    write_config(directory)
    return directory


def submit(slurm: Slurm, name: str, *words: str, place: Path, tasks: int = 1, cpus: int = 1, path: Path) -> str:
    asked = (f"--job-name={name}", f"--nodes={len(NODES)}", f"--ntasks-per-node={tasks}")
    asked += ("--gpus-per-node=1", f"--cpus-per-task={cpus}", "--time=60")
    found = f"{path}:{os.environ['PATH']}"
    return slurm.submit(*asked, str(SCRIPT), *words, directory=place, PATH=found, HOME=str(place))


def train(slurm: Slurm, name: str, *words: str, place: Path) -> str:
    """A job of one process a node: its number."""
    given = ("small.yaml", *SETTINGS, *words)
    return submit(slurm, name, *given, place=place, path=Path(sys.executable).parent)


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come in {seconds:.0f} s"
        time.sleep(0.2)


def wait_for_step(slurm: Slurm, job: str, run: Path, step: int) -> None:
    def reached() -> bool:
        assert slurm.job(job)["JobState"] in ("PENDING", "RUNNING"), slurm.job(job)
        log = run / "metrics.jsonl"
        return log.exists() and log.read_bytes().count(b"\n") >= step

    wait_until(reached, f"step {step}")


def wait_for_state(slurm: Slurm, job: str, state: str) -> dict[str, str]:
    """What Slurm says of the job then."""

    def reached() -> bool:
        now = slurm.job(job)["JobState"]
        assert now in (state, "PENDING", "RUNNING", "COMPLETING"), f"job {job} is {now}, not {state}"
        return now == state

    wait_until(reached, f"job {job} {state}")
    return slurm.job(job)


def log(place: Path, name: str, job: str) -> str:
    return (place / f"{name}-{job}.log").read_text()


@pytest.fixture(scope="module")
def undisturbed(slurm: Slurm, place: Path) -> list[float]:
    """The losses of a job that nobody disturbs."""
    job = train(slurm, "peace", place=place)
    assert wait_for_state(slurm, job, "COMPLETED")["Restarts"] == "0"
    assert f"finished at step {STEPS}/{STEPS}" in log(place, "peace", job)
    assert len(losses(place / "runs/peace")) == STEPS
    return losses(place / "runs/peace")


def test_neighbours_in_rank_share_a_node_and_have_their_cpus(slurm: Slurm, tmp_path: Path) -> None:
    """With a stand-in for `longstride`, which says where it was put."""
    program = tmp_path / "bin/longstride"
    program.parent.mkdir()
    program.write_text(PLACES)
    program.chmod(0o755)
    job = submit(slurm, "places", "x.yaml", place=tmp_path, tasks=2, cpus=2, path=program.parent)
    wait_for_state(slurm, job, "COMPLETED")
    places = [(tmp_path / f"place-{rank}").read_text().strip() for rank in range(4)]
    assert places == [f"{rank}/4 {rank % 2}/2 {list(NODES)[rank // 2]} ls1 2" for rank in range(4)]
    assert "TresPerTask=cpu:2" in (tmp_path / "step").read_text().split()


def test_a_job_is_warned_before_its_time_limit_and_goes_on(slurm: Slurm, place: Path, undisturbed: list[float]) -> None:
    """Slurm's own warning. A process is held, so that the run is not over before it; Slurm wakes whom it warns."""
    run = place / "runs/warned"
    job = train(slurm, "warned", place=place)
    wait_for_step(slurm, job, run, 12)
    slurm.process(job, 1).suspend()
    slurm.update(job, TimeLimit="5")  # minutes, as many as the script wants to be warned ahead
    again = wait_for_state(slurm, job, "PENDING")
    assert again["Restarts"] == "1"
    made = len(losses(run))
    assert 12 <= made < STEPS and (run / f"checkpoints/step-{made:08}/manifest.json").exists(), "its last step is kept"
    slurm.update(job, TimeLimit="60")
    slurm.begin_soon(job)
    wait_for_state(slurm, job, "COMPLETED")
    assert losses(run) == undisturbed
    starts = json.loads((run / "run.json").read_text())["starts"]
    assert [entry["step"] for entry in starts] == [0, made]


def test_a_job_that_loses_a_process_is_queued_again(slurm: Slurm, place: Path, undisturbed: list[float]) -> None:
    run = place / "runs/killed"
    job = train(slurm, "killed", place=place)
    wait_for_step(slurm, job, run, 15)
    slurm.process(job, 1).kill()
    again = wait_for_state(slurm, job, "PENDING")
    assert again["Restarts"] == "1"
    slurm.begin_soon(job)
    wait_for_state(slurm, job, "COMPLETED")
    assert losses(run) == undisturbed
    starts = json.loads((run / "run.json").read_text())["starts"]
    assert len(starts) == 2 and starts[1]["step"] >= 10


def test_a_mistake_is_not_tried_again(slurm: Slurm, place: Path) -> None:
    job = train(slurm, "mistake", "train.stepz=3", place=place)
    ended = wait_for_state(slurm, job, "FAILED")
    assert (ended["ExitCode"], ended["Restarts"]) == ("2:0", "0")
    assert "did you mean train.steps" in log(place, "mistake", job)
