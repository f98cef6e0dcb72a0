"""A store that stays away for longer than any request waits: the run goes on once it is back, with the same losses."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import fsspec
import pytest

from ..orchestrator.commands import finish, losses, run_command, start_command, write_config
from ..orchestrator.nodes import wait_until
from .conftest import SECRET
from .proxy import FaultProxy

# Several times the patience of a request (data/object_store.py): what can be put off is, then a checkpoint fails.
OUTAGE = 120.0
SETTINGS = (
    "workers=2",
    "train.steps=400",
    "train.validate_every=0",
    "checkpoint.every=20",
    "recovery.wait_seconds=300",
)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_run_outlives_an_outage(tmp_path: Path, store: FaultProxy) -> None:
    write_config(tmp_path)
    fs = fsspec.filesystem("s3")
    run = "bucket/runs/away"

    def committed() -> int:
        fs.invalidate_cache()
        return len(fs.glob(f"{run}/checkpoints/*/manifest.json"))

    words = ("train", "small.yaml", *SETTINGS, "run.name=away", "run.directory=s3://bucket/runs")
    training = start_command(*words, directory=tmp_path)
    try:
        wait_until(lambda: committed() >= 1, "a checkpoint", timeout=300)
        store.refuse()
        time.sleep(OUTAGE)
        store.heal()
        outcome = finish(training, timeout=400)
    finally:
        if training.poll() is None:
            os.killpg(training.pid, signal.SIGTERM)
            training.wait(60)
    assert outcome.code == 0, outcome.stderr
    (tmp_path / "away").mkdir()
    for name in ("metrics.jsonl", "run.json"):
        (tmp_path / "away" / name).write_bytes(fs.cat_file(f"{run}/{name}"))
    info = json.loads((tmp_path / "away" / "run.json").read_text())
    first, second = info["starts"]
    assert first["step"] == 0 and second["step"] > 0 and second["step"] % 20 == 0
    (failure,) = info["failures"]
    assert "given up after" in failure["cause"], failure
    said = outcome.stdout + outcome.stderr
    assert f"{failure['cause']}; going on from step {second['step']}" in said
    assert SECRET not in said

    assert run_command("train", "small.yaml", *SETTINGS, "run.name=peace", directory=tmp_path).code == 0
    found = losses(tmp_path / "away")
    assert len(found) == 400
    assert found == losses(tmp_path / "runs" / "peace"), "bitwise"
