"""A checkpoint that goes up in parts, and whose processes are killed in the middle of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest

from ..orchestrator.commands import CONFIG, run_command
from ..orchestrator.nodes import wait_until
from .multipart import PART_BYTES
from .proxy import FaultProxy

ROOT = Path(__file__).parents[2]
RUN = "s3://bucket/runs/small"
# 20 MiB of parameters and moments a process: four parts.
SIZE = ("workers=2", "parallel.sequence=2", "model.vocab_size=32768", "model.width=96")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_checkpoint_that_is_killed_between_its_parts_is_torn_and_named(store: FaultProxy, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(CONFIG + "run: {directory: s3://bucket/runs, name: small}\n")
    client: Any = boto3.client("s3", endpoint_url=store.url)

    def uploads() -> dict[str, int]:
        """Unfinished uploads: parts that have arrived, by file."""
        found = client.list_multipart_uploads(Bucket="bucket").get("Uploads", [])
        return {
            upload["Key"].removeprefix("runs/small/checkpoints/"): len(
                client.list_parts(Bucket="bucket", Key=upload["Key"], UploadId=upload["UploadId"]).get("Parts", [])
            )
            for upload in found
        }

    def files(name: str) -> dict[str, int]:
        listing = client.list_objects_v2(Bucket="bucket", Prefix=f"runs/small/checkpoints/{name}/").get("Contents", [])
        return {file["Key"].rpartition("/")[2]: file["Size"] for file in listing}

    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += ["-m", "tests.faults.multipart", "train", str(tmp_path / "small.yaml"), *SIZE, "train.steps=6"]
    words += ["checkpoint.every=2", "train.validate_every=0"]
    training = subprocess.Popen(words, cwd=ROOT, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        wait_until(lambda: "manifest.json" in files("step-00000002"), "the first checkpoint")
        wait_until(lambda: "__0_0.distcp" in files("step-00000004"), "the first process's part of the second")
        wait_until(lambda: uploads().get("step-00000004/__1_0.distcp", 0) >= 1, "the second process's first piece")
    finally:
        processes = [psutil.Process(training.pid), *psutil.Process(training.pid).children(recursive=True)]
        for process in processes:  # torchrun's workers have sessions of their own
            process.kill()
        psutil.wait_procs(processes, timeout=60)
        training.wait(60)
    first = files("step-00000002")
    assert min(first["__0_0.distcp"], first["__1_0.distcp"]) > 3 * PART_BYTES, first
    assert set(files("step-00000004")) == {"__0_0.distcp"}, "what has not all arrived is not there"
    left = uploads()
    assert set(left) == {"step-00000004/__1_0.distcp"} and 1 <= left["step-00000004/__1_0.distcp"] <= 3

    shown = run_command("checkpoints", RUN, "--verify", directory=tmp_path)
    assert shown.code == 1
    assert "whole, verified" in shown.stdout and "step-00000004" in shown.stdout and "broken" in shown.stdout
    words = ["workers=1", "parallel.sequence=1"]  # which also reads it on another mesh
    outcome = run_command("resume", RUN, *words, directory=tmp_path)
    assert outcome.code == 0, outcome.stderr
    assert "step-00000004" in outcome.stdout + outcome.stderr, "the torn one is named"
    assert "finished at step 6/6" in outcome.stdout and "step 3/6" in outcome.stdout, outcome.stdout
    assert uploads() == left, "nobody but the bucket's own rule takes these away"
