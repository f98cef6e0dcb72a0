"""A store at the end of a slow link: training waits for it only where it cannot do without."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import fsspec
import pytest

from longstride.data import prepare
from longstride.workers import RunDirectory, metrics, run_directory
from longstride.workers.manifest import list_checkpoints
from longstride.workers.metrics import read_records

from ..orchestrator.commands import finish, running, write_config
from ..timing import in_time
from ..workers.test_run_directory import record
from .proxy import FaultProxy

RATE, LATENCY = 200_000, 0.3  # bytes a second; seconds


@pytest.mark.timing
def test_a_step_does_not_wait_for_the_log(store: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor to learn whether somebody else has taken the run; a checkpoint does wait for the log, and shows how long."""
    # both ask the store again as soon as it has answered, so that who waits for it waits in every step
    for module, interval, share in (
        (metrics, "REWRITE_INTERVAL", "REWRITE_SHARE"),
        (run_directory, "OWNER_INTERVAL", "OWNER_SHARE"),
    ):
        monkeypatch.setattr(module, interval, 0.0)
        monkeypatch.setattr(module, share, math.inf)
    run = RunDirectory.create("s3://bucket/runs", "slow", "")
    run.take()
    store.slow(RATE, LATENCY)
    waits = []
    for step in range(1, 31):
        began = time.monotonic()
        assert not run.lost()
        assert run.metrics.append(record(step)) is None
        waits.append(time.monotonic() - began)
        time.sleep(0.05)
    in_time(sorted(waits)[-3] < LATENCY / 2, waits)
    assert store.faults > 2, "both have asked meanwhile"
    run.metrics.append(record(31))
    began = time.monotonic()
    run.metrics.flush()
    assert time.monotonic() - began > LATENCY, "the control"
    assert len(list(read_records(run.storage))) == 31
    RunDirectory(run.url).take()
    deadline = time.monotonic() + 30
    while not run.lost():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_run_with_all_its_files_behind_it(store: FaultProxy, tmp_path: Path) -> None:
    """Shards, log and checkpoints. Nobody is taken to hang, and no checkpoint is missed."""
    write_config(tmp_path)
    lines = (json.dumps({"text": f"Document {number} says {number}.\n" * 400}) for number in range(100))
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    prepare(f"{tmp_path}/a.jsonl", "s3://bucket/corpus", part_bytes=200_000)
    store.slow(RATE, LATENCY)
    words = ["train", "small.yaml", "run.directory=s3://bucket/runs", "run.name=slow", "workers=2", "data.context=4096"]
    words += ["data.corpus=s3://bucket/corpus", "train.steps=90", "train.validate_every=0", "checkpoint.every=30"]
    words += ["checkpoint.asynchronous=true", "checkpoint.keep=0", "recovery.hang_seconds=60"]
    with running(*words, directory=tmp_path) as training:
        outcome = finish(training, 500)
    store.heal()
    fsspec.filesystem("s3").invalidate_cache()
    assert outcome.code == 0, outcome.stderr
    run = RunDirectory("s3://bucket/runs/slow")
    info, records = run.read_info(), list(read_records(run.storage))
    assert "failures" not in info and len(info["starts"]) == 1
    assert [found.step for found in list_checkpoints(run) if found.committed] == [30, 60, 90]
    pauses = [found.pause or 0.0 for found in records]
    waits = [found.data_share * found.seconds for found in records]
    seconds = sum(found.seconds for found in records)
    print(f"\n{seconds:.0f} s of steps, {sum(pauses):.1f} s of pauses, the longest {max(pauses):.2f} s; ", end="")
    print(f"{sum(waits):.1f} s of waiting for data, {sum(waits[1:]):.1f} s of it after the first step")
    assert sum(pauses) < 0.1 * seconds
