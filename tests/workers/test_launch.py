"""Whole runs: on a disk with MLflow, on an object store, on S3 from two processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import fsspec
import pytest

from longstride.workers import Experiment, create_run, find_run, reopen_run, train_process
from longstride.workers.evaluate import evaluate, load_run
from longstride.workers.manifest import list_checkpoints, newest_whole
from longstride.workers.metrics import StepRecord, read_records
from longstride.workers.reporting import RunStart, Silent, Summary
from longstride.workers.storage import Storage

from ..distributed import run_ranks
from .tiny import make_trainer, tiny_experiment


class Listener(Silent):
    def __init__(self) -> None:
        self.starts: list[RunStart] = []
        self.records: list[StepRecord] = []
        self.summaries: list[Summary] = []

    def started(self, start: RunStart) -> None:
        self.starts.append(start)

    def stepped(self, record: StepRecord) -> None:
        self.records.append(record)

    def finished(self, summary: Summary) -> None:
        self.summaries.append(summary)


def test_a_run_from_start_to_resume(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    experiment = tiny_experiment(str(tmp_path), "train.steps=6", "tracking.enabled=true", "tracking.patience=120")
    run = create_run(experiment)
    heard = Listener()
    summary = train_process(experiment, threads=1, reporter=heard)
    assert heard.summaries == [summary]
    assert summary is not None
    assert (summary.step, summary.finished, summary.tokens, summary.notes) == (6, True, 6 * 256, [])
    assert summary.prompt == "def "
    assert summary.sample
    assert heard.records == list(read_records(run.storage))
    assert heard.starts[0].parameters == load_run(run, experiment).model.num_parameters()
    assert all(record.memory > 2**27 and 0 <= record.wait_share < 1 for record in heard.records)
    assert all(0 <= record.data_share < 1 for record in heard.records)
    training = experiment.open_corpus().num_tokens("train")
    assert [(record.context, record.epochs) for record in heard.records] == [
        (64, 256 * step / training) for step in range(1, 7)
    ]
    pauses = [record.pause or 0 for record in heard.records]
    assert pauses[0] == 0 < min(pauses[1:])
    assert summary.tracking_uri == f"sqlite:///{tmp_path}/mlflow.db"

    with pytest.raises(ValueError, match=r"has made all its 6 steps; go on with train\.steps=12"):
        reopen_run(run)
    again = reopen_run(run, ["train.steps=8"])
    assert train_process(again, threads=1, resume=True) is not None
    assert [record.step for record in read_records(run.storage)] == list(range(1, 9))
    assert Experiment.load(f"{run.url}/experiment.yaml").train.steps == 8

    client = MlflowClient(tracking_uri=summary.tracking_uri)
    run_id = run.read_info()["mlflow"]["run_id"]
    history = client.get_metric_history(run_id, "loss")
    assert sorted(item.step for item in history) == list(range(1, 9))
    stored = client.get_run(run_id)
    assert stored.data.metrics["system/system_memory_usage_megabytes"] > 100
    assert stored.data.tags["checkpoint"] == f"{run.url}/checkpoints/step-00000008"
    assert stored.data.tags["checkpoint_step"] == "8"
    artifacts = {item.path for item in client.list_artifacts(run_id)}
    assert artifacts == {"environment.txt", "experiment.yaml", "loss.png", "training.png"}
    assert f"\ntorch=={version('torch')}\n" in run.storage.read_text("environment.txt")
    assert len(client.search_runs([stored.info.experiment_id])) == 3, "a child for each start"
    assert stored.data.params["model.width"] == "16"
    assert stored.data.tags["changed.train.steps"] == "8"
    assert stored.info.status == "FINISHED"


def test_an_object_store_serves_as_a_disk_does(tmp_path: Path) -> None:
    directory = f"memory://{tmp_path.name}"
    experiment = tiny_experiment(directory, "train.steps=5", "checkpoint.every=2", "checkpoint.keep=2")
    run = create_run(experiment)
    try:
        summary = train_process(experiment, threads=1)
        assert summary is not None
        assert summary.finished
        assert [found.step for found in list_checkpoints(run)] == [4, 5]
        assert [record.step for record in read_records(run.storage)] == [1, 2, 3, 4, 5]
        assert find_run("tiny", directory).url == run.url
        assert evaluate(experiment, run, device="cpu").scores[0].loss == pytest.approx(
            summary.validation_loss, abs=1e-6
        )
        assert train_process(reopen_run(run, ["train.steps=6"]), threads=1, resume=True) is not None
        assert [record.step for record in read_records(run.storage)] == [1, 2, 3, 4, 5, 6]
    finally:
        Storage(directory).remove("")


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """An S3 bucket of a moto server in a process of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = str(Path(sys.executable).parent / "moto_server")
    server = subprocess.Popen([program, "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    variables = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert time.monotonic() < deadline, "moto_server did not start"
                time.sleep(0.1)
        fsspec.filesystem("s3").mkdir("longstride-runs")
        yield "s3://longstride-runs/some/place"
    finally:
        server.terminate()
        server.wait(10)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def train_on_s3(rank: int, world_size: int, directory: str, variables: dict[str, str], resume: bool) -> list[float]:
    os.environ.update(variables)  # the fork server was started before they were known
    experiment = tiny_experiment(
        directory, "workers=2", "parallel.sequence=2", f"train.steps={6 if resume else 4}", "checkpoint.every=2"
    )
    trainer = make_trainer(experiment, rank)
    if resume:
        trainer.restore()
    trainer.train()
    return [record.loss for record in read_records(trainer.run.storage)]


def test_two_processes_write_to_s3_and_a_flipped_byte_there_is_found(bucket: str) -> None:
    variables = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    first = run_ranks(train_on_s3, 2, bucket, variables, False)[0]
    assert len(first) == 4
    run = find_run("tiny", bucket)
    checkpoint, manifest, _ = newest_whole(run)
    assert (checkpoint.step, manifest.world_size) == (4, 2)
    name = next(name for name in manifest.files if name.endswith("1_0.distcp"))
    content = bytearray(checkpoint.storage.fs.cat_file(checkpoint.storage.path(name)))
    content[len(content) // 2] ^= 4
    checkpoint.storage.fs.pipe_file(checkpoint.storage.path(name), bytes(content))
    assert newest_whole(run)[0].step == 2
    second = run_ranks(train_on_s3, 2, bucket, variables, True)[0]
    assert second[:4] == first  # from step 2 again, bitwise
    assert len(second) == 6
    assert [found.name for found in list_checkpoints(run) if found.committed][-1] == "step-00000006"


def test_a_bucket_that_is_not_there_is_one_line(bucket: str) -> None:
    with pytest.raises(ValueError, match=r"run\.directory=s3://no-such-bucket/x cannot be written") as caught:
        create_run(tiny_experiment("s3://no-such-bucket/x"))
    assert "\n" not in str(caught.value)
