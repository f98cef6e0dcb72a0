"""A store that stays away for longer than any request waits: training goes on without checkpoints for a while, another
failure is recovered from once the store is back, and the losses are the same.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import fsspec
import psutil
import pytest

from ..orchestrator.commands import finish, losses, run_command, running, write_config
from ..orchestrator.nodes import title, wait_until
from .conftest import SECRET
from .proxy import FaultProxy

# Several times the patience of a request (data/object_store.py): what can be put off is, then a checkpoint fails.
OUTAGE, KILL_AFTER = 150.0, 130.0
SETTINGS = (
    "workers=2",
    "train.steps=400",
    "train.validate_every=0",
    "checkpoint.every=20",
    "recovery.wait_seconds=300",
)


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
    with running(*words, directory=tmp_path) as training:
        wait_until(lambda: committed() >= 1, "a checkpoint", timeout=300)
        store.refuse()
        time.sleep(KILL_AFTER)
        workers = [child for child in psutil.Process(training.pid).children(recursive=True) if "ray::W" in title(child)]
        assert len(workers) == 2, "the outage alone has ended nothing"
        workers[1].kill()
        time.sleep(OUTAGE - KILL_AFTER)
        store.heal()
        outcome = finish(training, timeout=400)
    assert outcome.code == 0, outcome.stderr
    (tmp_path / "away").mkdir()
    for name in ("metrics.jsonl", "run.json"):
        (tmp_path / "away" / name).write_bytes(fs.cat_file(f"{run}/{name}"))
    info = json.loads((tmp_path / "away" / "run.json").read_text())
    first, second = info["starts"]
    assert first["step"] == 0 and second["step"] > 0 and second["step"] % 20 == 0
    (failure,) = info["failures"]
    assert failure["cause"].startswith("worker "), failure
    said = outcome.stdout + outcome.stderr
    assert re.search(r"given up after \d+ s.*; training goes on, and the next tries again \(failure 1 of 3", said)
    assert f"{failure['cause']}; going on from step {second['step']}" in said
    assert SECRET not in said

    assert run_command("train", "small.yaml", *SETTINGS, "run.name=peace", directory=tmp_path).code == 0
    found = losses(tmp_path / "away")
    assert len(found) == 400
    assert found == losses(tmp_path / "runs" / "peace"), "bitwise"
