"""A run that goes back: MLflow is sent the steps that are made again, and every start has a child with its own."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longstride.workers import tracking
from longstride.workers.metrics import Order, StepRecord, read_records
from longstride.workers.run_directory import RunDirectory
from longstride.workers.tracked_steps import TrackedSteps
from longstride.workers.tracking import MlflowSink, Tracker, TrackingConfig, send_all

from ..distributed import run_ranks
from .test_run_directory import record
from .test_tracking import FakeSink, until
from .tiny import make_trainer, tiny_experiment

SETTINGS = {"seed": 0, "train": {"steps": 12}}


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's database with nothing in it, which takes seconds to make."""
    from longstride.workers import mlflow_client

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    mlflow_client.connect(f"sqlite:///{path}")
    return path


@pytest.fixture
def run(tmp_path: Path, empty_store: Path) -> RunDirectory:
    shutil.copy(empty_store, tmp_path)
    return RunDirectory.create(str(tmp_path), "run", "workers: 1\n")


def made(steps: Iterable[int], start: int = 0, rewinds: int = 0) -> list[StepRecord]:
    """Records whose loss and time tell by whom they were made."""
    part = 100 * start + 10 * rewinds
    return [
        replace(record(step, loss=step + part / 1000), start=start, rewinds=rewinds, time=1e6 + 1000 * part + step)
        for step in steps
    ]


def feed(run: RunDirectory, tracker: Tracker | None, records: list[StepRecord]) -> None:
    for item in records:
        run.metrics.append(item)
        if tracker is not None:
            tracker.record(item)


class Mlflow:
    """What a run's store holds."""

    def __init__(self, run: RunDirectory) -> None:
        from mlflow import MlflowClient

        known = run.read_info()["mlflow"]
        self.client, self.run_id = MlflowClient(tracking_uri=known["uri"]), known["run_id"]

    def points(self, run_id: str | None = None) -> list[tuple[int, float]]:
        """Step and loss of every point in the order of their times."""
        found = self.client.get_metric_history(run_id or self.run_id, "loss")
        return [(item.step, item.value) for item in sorted(found, key=lambda item: item.timestamp)]

    def children(self) -> dict[str, tuple[str, str, list[tuple[int, float]]]]:
        """By name: the context, how it ended, and the points."""
        experiment = self.client.get_run(self.run_id).info.experiment_id
        found = self.client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{self.run_id}'")
        return {
            child.info.run_name: (child.data.params["context"], child.info.status, self.points(child.info.run_id))
            for child in found
        }

    def tags(self) -> dict[str, str]:
        return self.client.get_run(self.run_id).data.tags


def points(records: list[StepRecord]) -> list[tuple[int, float]]:
    return [(item.step, item.loss) for item in records]


def start(run: RunDirectory, step: int, context: int = 64) -> None:
    run.record_start(step=step, context=context, batch=4, workers=2, parallel={"data": 2})


def test_steps_made_again_after_a_rollback_are_sent_again(run: RunDirectory) -> None:
    sink = FakeSink()
    tracker = Tracker(run, sink, interval=0.01)
    first, again = made(range(1, 11)), made(range(5, 13), rewinds=1)
    feed(run, tracker, first)
    until(lambda: len(sink.records) == 10)
    assert run.metrics.rewind(4) == 6
    feed(run, tracker, again)
    assert tracker.close() is None
    assert sink.records == first + again


def test_a_rollback_while_the_server_is_away_sends_what_counts(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "QUEUE_LENGTH", 4)  # what is missed comes from the log
    monkeypatch.setattr(tracking, "CLOSING_PAUSE", 0.02)
    sink = FakeSink()
    tracker = Tracker(run, sink, interval=0.01)
    feed(run, tracker, made(range(1, 7)))
    until(lambda: len(sink.records) == 6)
    sink.down = True
    feed(run, tracker, made(range(7, 11)))
    until(lambda: tracker.failures > 0)
    run.metrics.rewind(2)
    feed(run, tracker, made(range(3, 13), rewinds=1))
    sink.down = False
    assert tracker.close(patience=20) is None
    assert sink.records == made(range(1, 7)) + made(range(3, 13), rewinds=1)


def test_two_starts_of_a_run_one_after_the_other(run: RunDirectory) -> None:
    """The first makes steps 1 to 10 and is lost; the second goes on after 4, and is lost with 5 to 12 in the log and
    only some of them sent; what is left is sent later.
    """
    first, again = made(range(1, 11)), made(range(5, 13), start=1)
    start(run, 0)
    tracker = Tracker(run, MlflowSink(run, TrackingConfig(), SETTINGS, "1"), interval=0.01)
    feed(run, tracker, first)
    assert tracker.close("FAILED", patience=120) is None
    store = Mlflow(run)
    assert store.points() == points(first)
    assert store.children() == {}, "a run with one start has no child"
    assert "rewound_to" not in store.tags()

    tracker = Tracker(run, MlflowSink(run, TrackingConfig(), SETTINGS, "1"), interval=0.01)
    until(lambda: tracker.sent_until is not None)  # it may look before the run goes back
    run.metrics.rewind(4)
    start(run, 4)
    feed(run, tracker, again[:6])
    assert tracker.close("FAILED", patience=120) is None
    feed(run, None, again[6:])
    assert send_all(run, TrackingConfig(), SETTINGS, "1") == 2
    assert send_all(run, TrackingConfig(), SETTINGS, "1") == 0, "and nothing twice"

    assert store.points() == points(first + again), "both points of a step; that of the later time counts"
    assert dict(store.points()) == dict(points(list(read_records(run.storage)))), "which is the log"
    assert store.tags()["rewound_to"] == "4"
    assert store.children() == {
        "run from step 0": ("64", "FINISHED", points(first[:4])),
        "run from step 4": ("64", "FINISHED", points(again)),
    }


def test_a_start_that_goes_back_keeps_both_in_its_child(run: RunDirectory) -> None:
    """A context that grows after step 4, and a rollback to step 5 in the second stage."""
    stages = made(range(1, 5)), made(range(5, 9), start=1), made(range(6, 9), start=1, rewinds=1)
    settings: dict[str, Any] = {"data": {"schedule": "16 for 4 steps"}, "train": {"steps": 8}}
    start(run, 0, context=16)
    tracker = Tracker(run, MlflowSink(run, TrackingConfig(), settings, "1"), interval=0.01)
    feed(run, tracker, stages[0])
    start(run, 4, context=32)
    feed(run, tracker, stages[1])
    until(lambda: tracker.sent_until == (1, 0, 8))
    run.metrics.rewind(5)
    feed(run, tracker, stages[2])
    assert tracker.close(patience=120) is None
    assert Mlflow(run).children() == {
        "run from step 0": ("16", "FINISHED", points(stages[0])),
        "run from step 4": ("32", "FINISHED", points(stages[1] + stages[2])),
    }


def test_a_child_that_was_filled_in_part_is_filled_up(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    from longstride.workers import mlflow_stages

    monkeypatch.setattr(mlflow_stages, "_AT_ONCE", 2)
    calls, log = [0], mlflow_stages.log_records

    def fail_once(*arguments: Any) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise ConnectionError("lost in the middle")
        log(*arguments)

    monkeypatch.setattr(mlflow_stages, "log_records", fail_once)
    start(run, 0)
    feed(run, None, made(range(1, 7)))
    assert send_all(run, TrackingConfig(), SETTINGS, "1") == 6
    start(run, 6)
    feed(run, None, made(range(7, 9), start=1))
    with pytest.raises(ConnectionError):
        send_all(run, TrackingConfig(), SETTINGS, "1")
    assert Mlflow(run).children()["run from step 0"][2] == points(made(range(1, 3)))
    assert send_all(run, TrackingConfig(), SETTINGS, "1") == 2
    found = {name: child[2] for name, child in Mlflow(run).children().items()}
    assert found == {"run from step 0": points(made(range(1, 7))), "run from step 6": points(made([7, 8], start=1))}


def test_of_every_fourth_step_all_that_must_not_be_missed(run: RunDirectory) -> None:
    """Step 6 has a validation loss and 10 is the last of the first start; the second makes both again, without one."""
    config = TrackingConfig(every=4)
    first, again = made(range(1, 11)), made(range(6, 14), start=1)
    first[5] = replace(first[5], validation_loss=1.0)
    start(run, 0)
    tracker = Tracker(run, MlflowSink(run, config, SETTINGS, "1"), interval=0.01, every=4)
    feed(run, tracker, first)
    assert tracker.close("FAILED", patience=120) is None
    store, sent = Mlflow(run), [first[step - 1] for step in (4, 6, 8, 10)]
    assert store.points() == points(sent)

    run.metrics.rewind(5)
    start(run, 5)
    feed(run, None, again)
    assert send_all(run, config, SETTINGS, "1") == 5
    assert send_all(run, config, SETTINGS, "1") == 0
    sent_again = [again[step - 6] for step in (6, 8, 10, 12, 13)]
    assert store.points() == points(sent + sent_again)
    log = list(read_records(run.storage))
    assert len(log) == 13, "which has all"
    assert dict(store.points()).items() <= dict(points(log)).items(), "of no step a point that was taken back counts"
    assert store.tags()["rewound_to"] == "5"
    assert {name: child[2] for name, child in store.children().items()} == {
        "run from step 0": points([first[3]]),
        "run from step 5": points(sent_again),
    }


def test_steps_made_again_are_chosen_where_there_is_a_point_of_them() -> None:
    records = [*made(range(1, 8)), *made(range(5, 10), rewinds=1)]
    records[5] = replace(records[5], validation_loss=1.0)
    chosen = [(0, 0, 4), (0, 0, 6), (0, 1, 6), (0, 1, 8)]
    steps = TrackedSteps(4, lambda: set())
    assert [item.order for item in steps.choose(records)] == chosen
    assert [item.order for item in steps.choose(records)] == chosen, "asked again, after a failure"
    assert [item.order for item in TrackedSteps(4, lambda: {9}).choose(records)] == [*chosen, (0, 1, 9)]
    assert [item.order for item in TrackedSteps(4, lambda: set()).choose(records[7:])] == [(0, 1, 8)], "the control"
    assert TrackedSteps(1, lambda: set()).choose(records) == records


def test_a_batch_that_fails_at_first_is_no_going_back(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    from longstride.workers import mlflow_client

    sink, log = MlflowSink(run, TrackingConfig(), SETTINGS, "1"), mlflow_client.log_records
    sink.connect()
    monkeypatch.setattr(mlflow_client, "log_records", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sink.send(made(range(1, 4)))
    monkeypatch.setattr(mlflow_client, "log_records", log)
    sink.send(made(range(1, 4)))
    assert Mlflow(run).points() == points(made(range(1, 4)))
    assert "rewound_to" not in Mlflow(run).tags()


def train_through_a_bad_loss(rank: int, world_size: int, directory: str) -> tuple[list[Order], list[Order]]:
    """Four steps, a checkpoint after two, and a fourth that has no loss the first time it is tried; what was sent and
    what the log has.
    """
    words = ["train.steps=4", "checkpoint.every=2", "checkpoint.asynchronous=false", "train.validate_every=0"]
    trainer = make_trainer(tiny_experiment(directory, *words), rank)
    sink, read, tried = FakeSink(), trainer.bad_batches.read, list[float]()
    trainer.tracker = Tracker(trainer.run, sink, interval=0.01)

    def problem(loss: float, norm: float) -> str | None:
        tried.append(loss)
        if len(tried) != 4:
            return None
        until(lambda: len(sink.records) == 3)
        return "the loss is nan"

    def read_and_spoil(step: int) -> None:
        read(step)
        trainer.bad_batches.guard.problem = problem  # type: ignore[method-assign]

    trainer.bad_batches.read = read_and_spoil  # type: ignore[method-assign]
    trainer.train()
    assert trainer.tracker.close() is None
    return [item.order for item in sink.records], [item.order for item in read_records(trainer.run.storage)]


def test_a_trainer_that_rolls_back_is_followed(tmp_path: Path) -> None:
    sent, log = run_ranks(train_through_a_bad_loss, 1, str(tmp_path))[0]
    assert log == [(0, 0, 1), (0, 0, 2), (0, 1, 3), (0, 1, 4)]
    assert sent == [(0, 0, 1), (0, 0, 2), (0, 0, 3), (0, 1, 3), (0, 1, 4)]
