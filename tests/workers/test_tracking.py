"""The tracker never blocks or raises; what a lost server missed is sent when it is back."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from longstride.workers import tracking
from longstride.workers.configuration import ConfigError, validate
from longstride.workers.metrics import NOTHING, Order, StepRecord, read_records
from longstride.workers.run_directory import RunDirectory
from longstride.workers.tracking import MlflowSink, Tracker, TrackingConfig, send_all

from ..timing import in_time
from .test_run_directory import record


class FakeSink:
    """A server that can be down, or hang."""

    def __init__(self, known: int = 0) -> None:
        self.records = [record(step) for step in range(1, known + 1)]
        self.down = False
        self.hang = threading.Event()
        self.hang.set()
        self.finished: str | None = None

    @property
    def steps(self) -> list[int]:
        return [item.step for item in self.records]

    def connect(self) -> Order:
        self._answer()
        return self.records[-1].order if self.records else NOTHING

    def send(self, records: list[StepRecord]) -> None:
        self._answer()
        self.records += records

    def finish(self, records: list[StepRecord], status: str) -> None:
        self._answer()
        self.finished = status

    def _answer(self) -> None:
        self.hang.wait()
        if self.down:
            raise ConnectionError("connection refused\nwith details")


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(str(tmp_path), "run", "workers: 1\n")


def feed(run: RunDirectory, tracker: Tracker, steps: range) -> None:
    for step in steps:
        run.metrics.append(record(step))
        tracker.record(record(step))


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_every_step_arrives_once_and_in_order(run: RunDirectory) -> None:
    sink = FakeSink()
    tracker = Tracker(run, sink, interval=0.01)
    feed(run, tracker, range(1, 501))
    assert tracker.close() is None
    assert sink.steps == list(range(1, 501))
    assert sink.finished == "FINISHED"


def test_what_a_lost_server_missed_is_sent_when_it_is_back(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "QUEUE_LENGTH", 16)  # far fewer than will be missed
    monkeypatch.setattr(tracking, "LONGEST_PAUSE", 0.02)
    sink = FakeSink()
    tracker = Tracker(run, sink, interval=0.01)
    feed(run, tracker, range(1, 51))
    until(lambda: len(sink.steps) == 50)
    sink.down = True
    feed(run, tracker, range(51, 200))
    until(lambda: tracker.failures >= 2)
    assert "does not take records (connection refused)" in (tracker.take_note() or "")
    sink.down = False
    feed(run, tracker, range(200, 220))
    until(lambda: tracker.take_note() == "tracking: MLflow takes records again")
    assert tracker.close() is None
    assert sink.steps == list(range(1, 220))


def test_an_object_store_whose_log_lags_behind_loses_nothing(tmp_path: Path) -> None:
    run = RunDirectory.create(f"memory://{tmp_path.name}", "run", "workers: 1\n")
    sink = FakeSink()
    sink.hang.clear()
    tracker = Tracker(run, sink, interval=0.01)
    feed(run, tracker, range(1, 31))
    assert len(list(read_records(run.storage))) < 30, "it is written every ten seconds"
    sink.hang.set()
    assert tracker.close() is None
    assert sink.steps == list(range(1, 31))


def test_a_resumed_run_does_not_send_steps_twice(run: RunDirectory) -> None:
    for step in range(1, 31):
        run.metrics.append(record(step))
    sink = FakeSink(known=20)  # killed before 21 to 30 were sent
    tracker = Tracker(run, sink, interval=0.01)
    feed(run, tracker, range(31, 41))
    assert tracker.close() is None
    assert sink.steps == list(range(1, 41))


@pytest.mark.timing
def test_a_server_that_hangs_delays_nobody(run: RunDirectory) -> None:
    sink = FakeSink()
    sink.hang.clear()
    tracker = Tracker(run, sink, interval=0.01)
    began = time.perf_counter()
    for step in range(1, 1001):
        tracker.record(record(step))
    seconds = time.perf_counter() - began
    in_time(seconds < 0.5, seconds)
    note = tracker.close(patience=0.05)
    assert note is not None
    assert "1000 of 1000 steps are not in MLflow" in note
    sink.hang.set()


def test_a_server_that_comes_back_while_the_run_ends_gets_everything(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "CLOSING_PAUSE", 0.02)
    sink = FakeSink()
    sink.down = True
    tracker = Tracker(run, sink, interval=0.01)
    feed(run, tracker, range(1, 4))
    threading.Timer(0.3, lambda: setattr(sink, "down", False)).start()
    assert tracker.close(patience=20) is None
    assert (sink.steps, sink.finished) == ([1, 2, 3], "FINISHED")


def test_a_server_that_is_down_is_one_line_at_the_end(run: RunDirectory) -> None:
    sink = FakeSink()
    sink.down = True
    tracker = Tracker(run, sink, interval=0.01)
    feed(run, tracker, range(1, 4))
    until(lambda: tracker.failures > 0)
    assert tracker.take_note() == (
        "tracking: MLflow does not take records (connection refused); metrics.jsonl has them, and it is tried again"
    )
    assert tracker.take_note() is None, "said once"
    note = tracker.close(patience=0.5)
    assert note == (
        "tracking: 3 of 3 steps are not in MLflow (connection refused); metrics.jsonl has them all, and "
        f"`longstride track {run.url}` sends them"
    )


def test_of_every_tenth_step_ten_times_fewer_are_said_to_be_missing(run: RunDirectory) -> None:
    sink = FakeSink()
    sink.down = True
    tracker = Tracker(run, sink, interval=0.01, every=10)
    feed(run, tracker, range(1, 36))
    assert "tracking: 4 of 35 steps are not in MLflow (connection refused)" in (tracker.close(patience=0.1) or "")


def test_credentials_are_refused() -> None:
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_USERNAME") as caught:
        validate(TrackingConfig, {"uri": "https://user:hunter2@host/mlflow"})
    assert "hunter2" not in str(caught.value)


def test_the_embedded_store_holds_everything_and_a_resume_continues_it(run: RunDirectory) -> None:
    from mlflow import MlflowClient

    settings = {"seed": 0, "train": {"steps": 20, "rates": {"*.filter.*": 0.1}}}
    for step in range(1, 11):
        run.metrics.append(record(step, loss=3.0 / step))
    first = Tracker(run, MlflowSink(run, TrackingConfig(), settings, "0.1.0+abc"), interval=0.01)
    first.record(record(10, loss=0.3))
    assert first.close("KILLED", patience=120) is None
    for step in range(11, 13):
        run.metrics.append(record(step, loss=3.0 / step))
    changed = {"seed": 0, "train": {"steps": 40, "rates": {}}}
    assert send_all(run, TrackingConfig(), changed, "0.1.0+def") == 2

    known = run.read_info()["mlflow"]
    client = MlflowClient(tracking_uri=known["uri"])
    stored = client.get_run(known["run_id"])
    assert stored.info.run_name == "run"
    assert stored.info.status == "KILLED", "12 of 40 steps are done"
    assert stored.data.params == {"seed": "0", "train.steps": "20", "train.rates": "{'*.filter.*': 0.1}"}
    assert stored.data.tags["changed.train.rates"] == "{}"
    assert stored.data.tags["changed.train.steps"] == "40"
    assert stored.data.tags["code_version"] == "0.1.0+def"
    history = client.get_metric_history(known["run_id"], "loss")
    assert sorted((item.step, item.value) for item in history) == [(step, 3.0 / step) for step in range(1, 13)]
    artifacts = {item.path for item in client.list_artifacts(known["run_id"])}
    assert artifacts == {"experiment.yaml", "loss.png", "training.png"}, "and no environment: nothing trained here"


def test_an_unreachable_server_fails_in_seconds(run: RunDirectory) -> None:
    sink = MlflowSink(run, TrackingConfig(uri="http://127.0.0.1:9"), {}, "0")
    began = time.monotonic()
    with pytest.raises(Exception, match=r"127\.0\.0\.1"):
        sink.connect()
    assert time.monotonic() - began < 20
