"""A real S3 server killed over and over while two processes train and keep their checkpoints in it.

Part of `make test-s3`, which needs Ceph's programs (see ceph.py).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from longstride.data.object_store import PATIENCE_SECONDS
from longstride.workers.manifest import list_checkpoints
from longstride.workers.run_directory import RunDirectory

from ..orchestrator.commands import losses, write_config
from .ceph import PROGRAMS, CephGateway
from .conftest import ACCESS_KEY, SECRET, forget_connections

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(any(shutil.which(name) is None for name in PROGRAMS), reason="Ceph is not installed"),
]

ROOT = Path(__file__).parents[2]
STEPS, KILLS = 60, 8
SETTINGS = (
    "workers=2",
    "parallel.sequence=2",
    f"train.steps={STEPS}",
    "train.validate_every=0",
    "checkpoint.every=3",
    "checkpoint.asynchronous=true",
    "checkpoint.keep=100",
    "model.width=256",
)


@pytest.fixture
def gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CephGateway]:
    """A gateway with an empty bucket, which this process and those it starts use."""
    with CephGateway(tmp_path / "ceph", ACCESS_KEY, SECRET) as started:
        host, port = started.address
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        forget_connections()
        fsspec.filesystem("s3").mkdir("bucket")
        yield started
    forget_connections()


def start(directory: Path, *overrides: str, patience: float = PATIENCE_SECONDS) -> subprocess.Popen[str]:
    """Two processes that note in `directory`/notes which of their requests failed."""
    (directory / "notes").mkdir(exist_ok=True)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += ["-m", "tests.faults.witness", "train", str(directory / "small.yaml"), *SETTINGS, *overrides]
    noted = {"WITNESS": str(directory / "notes"), "PATIENCE": str(patience)}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **noted}
    pipe = subprocess.PIPE
    return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def failed_tries(directory: Path) -> int:
    """Of requests, by either process. aiohttp itself asks once more where a connection broke off: not counted."""
    return sum(len(file.read_text().splitlines()) for file in (directory / "notes").iterdir())


def kill_in_the_middle(gateway: CephGateway, process: subprocess.Popen[str]) -> int:
    """Once the run uses the gateway again, while it works on a long request; at once if the run has ended.

    Returns how many requests it had begun and never answered.
    """
    deadline, before = time.monotonic() + 60, (0, 0)
    while process.poll() is None:
        begun, answered = gateway.requests()
        if begun > answered >= 5 and (begun, answered) == before:
            break
        assert time.monotonic() < deadline, "the run asks nothing of the store any more"
        before = (begun, answered)
        time.sleep(0.01)
    gateway.kill_gateway()
    begun, answered = gateway.requests()
    return begun - answered


def test_nothing_is_lost_or_torn_when_the_store_is_killed(gateway: CephGateway, tmp_path: Path) -> None:
    write_config(tmp_path)
    quiet = start(tmp_path, "run.name=peace")
    _, stderr = quiet.communicate(timeout=200)
    assert quiet.returncode == 0, stderr

    chance = random.Random(0)
    process, kills, broken_off = start(tmp_path, "run.directory=s3://bucket/runs", "run.name=disturbed"), 0, 0
    try:
        filesystem = fsspec.filesystem("s3")
        while not filesystem.exists("bucket/runs/disturbed/checkpoints"):
            assert process.poll() is None, process.communicate()
            time.sleep(0.2)
        while kills < KILLS and process.poll() is None:
            broken_off += kill_in_the_middle(gateway, process)
            time.sleep(chance.uniform(0.2, 3.0))
            gateway.start_gateway()
            kills += 1
        _, stderr = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, stderr
    assert kills >= KILLS // 2, "the run lasts long enough to be disturbed"
    tries = failed_tries(tmp_path)
    assert broken_off >= kills // 2 and tries >= kills, "the kills strike it"

    forget_connections()
    run = RunDirectory("s3://bucket/runs/disturbed")
    records = [json.loads(line) for line in run.storage.read_text("metrics.jsonl").splitlines()]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert [record["loss"] for record in records] == losses(tmp_path / "runs" / "peace")
    checkpoints = list_checkpoints(run)
    assert checkpoints[-1].committed and checkpoints[-1].name.endswith(f"{STEPS:08}")
    assert [problem for checkpoint in checkpoints if checkpoint.committed for problem in checkpoint.problems()] == []
    whole = sum(checkpoint.committed for checkpoint in checkpoints)
    print(f"{kills} kills, {broken_off} requests broken off, {tries} tries failed; {whole} whole checkpoints")


def test_without_another_try_one_kill_ends_the_run(gateway: CephGateway, tmp_path: Path) -> None:
    write_config(tmp_path)
    words = ("run.directory=s3://bucket/runs", "run.name=disturbed", "recovery.max_failures=0")
    process = start(tmp_path, *words, patience=0)
    try:
        filesystem = fsspec.filesystem("s3")
        while not filesystem.exists("bucket/runs/disturbed/checkpoints"):
            assert process.poll() is None, process.communicate()
            time.sleep(0.2)
        kill_in_the_middle(gateway, process)
        _, stderr = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "given up after 0 s" in stderr
