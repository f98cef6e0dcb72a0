"""Metrics that were spooled while there was no tracker reach it afterwards, once."""

from __future__ import annotations

from pathlib import Path

import pytest

from longstride.orchestrator.cli import main
from longstride.workers.mlflow_client import connect

from .commands import GROWING


def test_spooled_metrics_are_sent_once(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "small.yaml", *GROWING]) == 0  # which does not track
    capsys.readouterr()
    store = f"sqlite:///{place / 'tracker' / 'mlflow.db'}"
    words = ["track", "small", f"tracking.uri={store}"]
    assert main(words) == 0
    assert capsys.readouterr().out == f"6 steps sent to MLflow at {store}\n"
    assert main(words) == 0
    assert capsys.readouterr().out.startswith("0 steps sent")

    client = connect(store)
    experiment = client.get_experiment_by_name("longstride")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    parent = next(found for found in runs if found.info.run_name == "small")
    steps = {}
    for found in runs:
        child = found.data.tags.get("mlflow.parentRunId") == parent.info.run_id
        history = client.get_metric_history(found.info.run_id, "loss")
        steps[found.data.params["context"] if child else "all"] = sorted(metric.step for metric in history)
    assert steps == {"all": [1, 2, 3, 4, 5, 6], "64": [1, 2, 3, 4], "128": [5, 6]}, "a child for every stage"
    assert parent.info.status == "FINISHED"
    assert main([*words, "train.steps=7"]) == 0
    assert client.get_run(parent.info.run_id).info.status == "KILLED", "as a run that was stopped before its end"


def test_a_tracker_that_is_away_is_one_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "small.yaml", "train.steps=3"]) == 0
    capsys.readouterr()
    assert main(["track", "small", "tracking.uri=http://127.0.0.1:9"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("longstride: MLflow at http://127.0.0.1:9 has not taken the records: ")
