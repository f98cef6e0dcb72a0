"""The calls to MLflow, and nothing else. Importing this module imports MLflow (one to two seconds).

A lost server must fail in seconds: with MLflow's own defaults the first call blocks for minutes (247 s measured).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# All of these are read when MLflow is imported. What a user has set stays.
for _name, _value in {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}.items():
    os.environ.setdefault(_name, _value)
from matplotlib.figure import Figure  # noqa: E402
from mlflow import MlflowClient  # noqa: E402
from mlflow.entities import Metric, Param, Run, RunTag  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402

from .metrics import StepRecord  # noqa: E402
from .run_directory import EXPERIMENT_FILE, RunDirectory  # noqa: E402

# Importing sets their levels; they report the making of an empty database.
for _name in ("mlflow", "alembic"):
    logging.getLogger(_name).setLevel(logging.ERROR)

METRICS = (
    "step",
    "loss",
    "validation_loss",
    "auxiliary_loss",
    "tokens",
    "tokens_per_second",
    "wait_share",
    "data_share",
    "bytes_sent",
    "memory",
    "learning_rate",
    "grad_norm",
    "seconds",
)
_MOST_PARAMETERS = 100
_LONGEST_PARAMETER = 6000


def connect(uri: str) -> MlflowClient:
    """A client of the store at `uri`; the directory of a sqlite file is made."""
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    client = MlflowClient(tracking_uri=uri)
    client.search_experiments(max_results=1)  # sets up the store, and fails now if there is none
    return client


def find(client: MlflowClient, run_id: str) -> Run | None:
    """The run, running again; None when the store does not know it or it was deleted."""
    try:
        found = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    if found.info.lifecycle_stage != "active":
        return None
    client.update_run(run_id, status="RUNNING")
    return found


def create(client: MlflowClient, experiment: str, run: RunDirectory, uri: str) -> Run:
    """A new run in `experiment`, which is made if there is none."""
    known = client.get_experiment_by_name(experiment)
    if known is not None:
        number = known.experiment_id
    else:
        # A server knows where artifacts go; an embedded store would put them into the current directory.
        beside = Path(uri.removeprefix("sqlite:///")).parent / "mlflow-artifacts"
        number = client.create_experiment(experiment, beside.as_uri() if uri.startswith("sqlite:///") else None)
    return client.create_run(number, run_name=run.name)


def describe(client: MlflowClient, found: Run, settings: Mapping[str, Any], run: RunDirectory, version: str) -> None:
    """Parameters, tags and the resolved config. MLflow keeps a parameter's first value: changes become tags."""
    known = found.data.params
    values = {key: str(value)[:_LONGEST_PARAMETER] for key, value in flatten(settings).items()}
    added = [Param(key, value) for key, value in values.items() if key not in known]
    tags = {f"changed.{key}": value for key, value in values.items() if known.get(key, value) != value}
    tags |= {"code_version": version, "run_directory": run.url}
    run_id = found.info.run_id
    for start in range(0, len(added), _MOST_PARAMETERS):
        client.log_batch(run_id, params=added[start : start + _MOST_PARAMETERS])
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    client.log_text(run_id, run.read_experiment(), EXPERIMENT_FILE)


def log_records(client: MlflowClient, run_id: str, records: list[StepRecord]) -> None:
    """Every number of the records, at their step and time."""
    metrics = [
        Metric(name, float(value), int(record.time * 1000), record.step)
        for record in records
        for name in METRICS
        if (value := getattr(record, name)) is not None
    ]
    for start in range(0, len(metrics), 1000):
        client.log_batch(run_id, metrics=metrics[start : start + 1000])


def log_loss_curve(client: MlflowClient, run_id: str, records: list[StepRecord]) -> None:
    """The picture `loss.png`."""
    client.log_figure(run_id, loss_curve(records), "loss.png")


def loss_curve(records: list[StepRecord]) -> Figure:
    """Training and validation loss over tokens."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([record.tokens for record in records], [record.loss for record in records], lw=0.8, label="training")
    measured = [record for record in records if record.validation_loss is not None]
    if measured:
        values = [float(record.validation_loss or 0) for record in measured]
        axes.plot([record.tokens for record in measured], values, "o-", label="validation")
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
