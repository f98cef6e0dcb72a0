"""Training on a Ray cluster that the command starts, as a user does it; each start of Ray costs some seconds."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from longstride.orchestrator.cli import main

from .commands import GROWING, finish, losses, run_command, start_command
from .nodes import answers, free_port, title

pytestmark = pytest.mark.alone

TWO = ("train", "small.yaml", "workers=2", "run.name=split")
# Steps for a run that is to be disturbed long before its end.
MANY = ("train.steps=2000", "train.validate_every=0", "checkpoint.every=5")


@pytest.fixture
def temporary() -> Iterator[str]:
    """A directory for Ray's files, with a path short enough for its sockets. None of them may stay."""
    with tempfile.TemporaryDirectory(prefix="ls", dir="/tmp") as directory:
        yield directory
        assert list(Path(directory).glob("longstride-ray-*")) == []


def test_two_workers_agree_with_one(place: Path, temporary: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With a context that grows: every stage has a mesh of its own."""
    outcome = run_command(*TWO, *GROWING, directory=place, TMPDIR=temporary)
    assert outcome.code == 0, outcome.stderr
    assert outcome.stderr == ""
    assert "data 2 x expert 2; python-source, 2 x 64 tokens a step" in outcome.stdout
    assert "sequence 2 x expert 2; python-source, 1 x 128 tokens a step" in outcome.stdout
    assert "finished at step 6/6" in outcome.stdout
    assert main(["train", "small.yaml", *GROWING]) == 0
    assert losses(place / "runs" / "split") == pytest.approx(losses(place / "runs" / "small"), rel=1e-5)
    assert not list(place.glob(".ray*")), "Ray's token stays out of the user's home"


def test_a_cluster_that_is_there_is_joined_and_its_size_respected(place: Path, temporary: str) -> None:
    """A head started by hand, with its token in the user's home, keeps running after the command."""
    address = f"127.0.0.2:{free_port('127.0.0.2')}"
    with _head(address, place, temporary) as head:
        words = ("--address", address)
        outcome = run_command(*TWO, "train.steps=3", *words, directory=place, TMPDIR=temporary)
        assert outcome.code == 0, outcome.stderr
        assert len(losses(place / "runs" / "split")) == 3
        four = ("workers=4", "parallel.data=2", "recovery.wait_seconds=0")
        outcome = run_command("train", "small.yaml", *four, *words, directory=place)
        assert outcome.code == 2
        expected = "workers=4 want a CPU each, and Ray has 2 CPUs and 0 GPUs on 1 node: use workers=2 or fewer"
        assert outcome.stderr == f"longstride: {expected}\n"
        assert not (place / "runs" / "small").exists()
        hurry = {"RAY_NUM_REDIS_GET_RETRIES": "1"}
        outcome = run_command(*TWO, "run.name=other", *words, directory=place, RAY_AUTH_TOKEN="0" * 64, **hurry)
        assert outcome.code == 2
        assert "RAY_AUTH_TOKEN" in outcome.stderr.splitlines()[-1]
        assert head.poll() is None


def test_an_interrupt_writes_a_checkpoint_and_leaves_no_process(place: Path, temporary: str) -> None:
    process = start_command(*TWO, *MANY, "checkpoint.every=0", directory=place, TMPDIR=temporary)
    _wait_for(lambda: len(losses(place / "runs" / "split")) >= 3, process)
    family = _descendants(process)
    assert len(family) > 3
    listening = {e.laddr.port for found in family for e in found.net_connections() if e.status == psutil.CONN_LISTEN}
    assert listening and not listening & {8265, 10001}, "neither a dashboard nor Ray's client listens"
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: Ray's processes get it too
    outcome = finish(process, timeout=60)
    assert outcome.code == 130, outcome.stderr
    assert "stopped at step" in outcome.stdout
    assert "resume:" in outcome.stdout
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []
    steps = len(losses(place / "runs" / "split"))
    assert (place / f"runs/split/checkpoints/step-{steps:08d}/manifest.json").exists()


@pytest.mark.slow
def test_a_worker_that_is_told_to_end_leaves_a_checkpoint(place: Path, temporary: str) -> None:
    """As Slurm's scancel and a system's shutdown tell all processes; the driver, told later, still ends the run."""
    process = start_command(*TWO, *MANY, "checkpoint.every=0", directory=place, TMPDIR=temporary)
    run = place / "runs" / "split"
    _wait_for(lambda: len(losses(run)) >= 3, process)
    workers = [found for found in _descendants(process) if title(found).startswith("ray::Worker")]
    workers[0].terminate()
    _wait_for(lambda: len(json.loads((run / "run.json").read_text())["starts"]) == 2, process)
    steps = len(losses(run))
    _wait_for(lambda: len(losses(run)) > steps, process)
    process.terminate()
    outcome = finish(process, timeout=60)
    assert outcome.code == 143, outcome.stderr
    said = re.search(r"a worker was told to end \(SIGTERM\): going on from step (\d+) with another", outcome.stdout)
    second = json.loads((run / "run.json").read_text())["starts"][1]
    assert said and second["step"] == int(said[1]), outcome.stdout
    assert "failures" not in json.loads((run / "run.json").read_text())


@contextlib.contextmanager
def _head(address: str, home: Path, temporary: str) -> Iterator[subprocess.Popen[bytes]]:
    """A Ray head of two CPUs at `address`."""
    host, port = address.split(":")
    ray = str(Path(sys.executable).parent / "ray")
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text(secrets.token_hex(32))
    words = ["--head", f"--node-ip-address={host}", f"--port={port}", "--num-cpus=2", "--num-gpus=0"]
    words += ["--include-dashboard=false", f"--temp-dir={temporary}/head", "--block", "--disable-usage-stats"]
    environment = {**os.environ, "HOME": str(home), "RAY_AUTH_MODE": "token", "OMP_NUM_THREADS": "1"}
    environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"
    head = subprocess.Popen(
        [ray, "start", *words], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
    )
    try:
        _wait_for(lambda: answers(host, int(port)), head)
        yield head
    finally:
        head.terminate()
        head.wait(30)


def _wait_for(condition: Callable[[], bool], process: subprocess.Popen[Any], timeout: float = 90) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.1)


def _descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)
