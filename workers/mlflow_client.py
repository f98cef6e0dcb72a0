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

from .environment import ENVIRONMENT_FILE  # noqa: E402
from .manifest import Checkpoint  # noqa: E402
from .metrics import Order, StepRecord  # noqa: E402
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
    "epochs",
    "context",
    "tokens_per_second",
    "flops_per_second",
    "wait_share",
    "data_share",
    "bytes_sent",
    "memory",
    "learning_rate",
    "grad_norm",
    "seconds",
    "pause",
)
# By MLflow's names, which its pages show as system metrics; megabytes there.
SYSTEM_METRICS = {
    "system/cpu_utilization_percentage": ("cpu_percent", 1.0),
    "system/system_memory_usage_megabytes": ("host_memory", 1e-6),
    "system/gpu_utilization_percentage": ("gpu_percent", 1.0),
    "system/gpu_memory_usage_megabytes": ("gpu_memory", 1e-6),
}
SENT_TAG = "longstride.sent"  # the order of the last record in the run
REWOUND_TAG = "rewound_to"  # the step to which it last went back: later ones are made again
_MOST_METRICS = 900  # at once; MLflow takes 1000 things, tags included
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
    """Parameters, tags, the resolved config and the environment of the last start.

    MLflow keeps a parameter's first value: changes become tags.
    """
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
    if run.storage.exists(ENVIRONMENT_FILE):
        client.log_text(run_id, run.storage.read_text(ENVIRONMENT_FILE), ENVIRONMENT_FILE)


def sent_until(found: Run) -> Order:
    """The order of the last record that a run of MLflow's was sent whole."""
    start, rewinds, step = found.data.tags.get(SENT_TAG, "0 0 0").split()
    return int(start), int(rewinds), int(step)


def steps(client: MlflowClient, run_id: str) -> set[int]:
    """Those of which a run of MLflow's has a point."""
    return {point.step for point in client.get_metric_history(run_id, "loss")}


def log_records(
    client: MlflowClient, run_id: str, records: list[StepRecord], tags: Mapping[str, str] | None = None
) -> None:
    """Every number of the records, at their step and time; then the tags, and that these records are there.

    Sending a record again changes nothing: MLflow keeps a point once.
    """
    metrics = [
        Metric(name, value, int(record.time * 1000), record.step)
        for record in records
        for name, value in values(record).items()
    ]
    last = {SENT_TAG: " ".join(map(str, records[-1].order))} | dict(tags or {})
    for start in range(0, len(metrics), _MOST_METRICS):
        part = metrics[start : start + _MOST_METRICS]
        complete = start + len(part) == len(metrics)
        client.log_batch(run_id, part, tags=[RunTag(*tag) for tag in last.items()] if complete else [])


def values(record: StepRecord) -> dict[str, float]:
    """A record's numbers by their names in MLflow; what was not measured is left out."""
    fields = {name: (name, 1.0) for name in METRICS} | SYSTEM_METRICS
    numbers = {name: (getattr(record, field), unit) for name, (field, unit) in fields.items()}
    return {name: float(number) * unit for name, (number, unit) in numbers.items() if number is not None}


def tag_checkpoint(client: MlflowClient, run_id: str, checkpoint: Checkpoint) -> None:
    """Where the newest committed checkpoint is."""
    tags = {"checkpoint": checkpoint.storage.url, "checkpoint_step": str(checkpoint.step)}
    client.log_batch(run_id, tags=[RunTag(*tag) for tag in tags.items()])


def log_curves(client: MlflowClient, run_id: str, records: list[StepRecord]) -> None:
    """The pictures `loss.png` and `training.png`."""
    client.log_figure(run_id, loss_curve(records), "loss.png")
    client.log_figure(run_id, training_curves(records), "training.png")


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


def training_curves(records: list[StepRecord]) -> Figure:
    """Learning rate, gradient norm and throughput over tokens, one below the other."""
    figure = Figure(figsize=(7, 8), layout="constrained")
    panels = {
        "learning rate": [record.learning_rate for record in records],
        "gradient norm before clipping": [record.grad_norm for record in records],
        "tokens per second": [record.tokens_per_second for record in records],
    }
    tokens = [record.tokens for record in records]
    all_axes = figure.subplots(len(panels), sharex=True)
    for axes, (name, numbers) in zip(all_axes, panels.items(), strict=True):
        axes.plot(tokens, numbers, lw=0.8)
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
    all_axes[-1].set_xlabel("tokens")
    return figure


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys. A mapping from other things is a value: MLflow takes no patterns for names."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value and all(name.isidentifier() for name in value):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
