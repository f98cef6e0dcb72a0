"""MLflow as a mirror of metrics.jsonl: fed from a thread, never waited for, able to catch up later.

The first process hands every record over and goes on. A thread sends them in batches; what it cannot send (no
server, a slow one) stays in metrics.jsonl and is replayed from there, in this run or by `send_all` afterwards.

Records are sent in the order in which they were made (`StepRecord.order`), and how far that went is written to MLflow
with them. A run that goes back, after a bad loss or in another start, sends the steps that it makes again: MLflow then
has two points of such a step, of which the one with the later time counts, and metrics.jsonl that one alone.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from pydantic import Field, field_validator

from ..data.credentials import refuse_credentials
from .configuration import Settings
from .environment import ENVIRONMENT_FILE, describe_environment
from .manifest import list_checkpoints
from .metrics import NOTHING, Order, StepRecord, read_records
from .run_directory import RunDirectory
from .storage import Storage
from .tracked_steps import TrackedSteps, is_due

QUEUE_LENGTH = 10_000
BATCH_LENGTH = 100
SEND_INTERVAL = 2.0
LONGEST_PAUSE = 60.0
CLOSING_PAUSE = 1.0
CHECKPOINT_INTERVAL = 60.0  # between looks for a newer one


class TrackingConfig(Settings):
    """Where a run is mirrored to.

    Attributes:
        enabled: whether at all.
        uri: of an MLflow tracking server (http://...) or store (sqlite:///...); an embedded sqlite store beside the
            runs when not given. Credentials: MLFLOW_TRACKING_USERNAME, _PASSWORD or _TOKEN.
        experiment: MLflow's name for a group of runs.
        every: steps between those that are sent: MLflow's database grows with each. Steps with a validation loss and
            the last are sent too; metrics.jsonl has all.
        patience: seconds to wait at the end of training for records not yet sent.
    """

    enabled: bool = True
    uri: str | None = None
    experiment: str = Field(default="longstride", min_length=1)
    every: int = Field(default=1, ge=1)
    patience: float = Field(default=30.0, ge=0)

    @field_validator("uri")
    @classmethod
    def _holds_no_secret(cls, uri: str | None) -> str | None:
        variables = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        return None if uri is None else refuse_credentials("tracking.uri", uri, variables)


class Sink(Protocol):
    """Where records go. Every method may fail or take long."""

    def connect(self) -> Order:
        """Opens or continues the run; the order of the last record it has, `NOTHING` if it has none."""
        ...

    def send(self, records: list[StepRecord]) -> None:
        """Takes them, in order, or what it wants of them."""
        ...

    def finish(self, records: list[StepRecord], status: str) -> None:
        """Takes the last of all records if it has not, adds what describes the whole run (the curves) and ends it."""
        ...


class Tracker:
    """Sends records to a sink from a thread. `record` takes microseconds whatever the sink does.

    `every`: of how many steps the sink wants one, to say how many it lacks.
    """

    def __init__(self, run: RunDirectory, sink: Sink, *, interval: float = SEND_INTERVAL, every: int = 1) -> None:
        self.run, self.sink, self.interval, self.every = run, sink, interval, every
        self.sent_until: Order | None = None  # the last record that the sink was given; None before it is connected
        self.failures = 0
        self.last_failure = ""  # while it fails
        self._told_of_failure = False
        self._queue: deque[StepRecord] = deque(maxlen=QUEUE_LENGTH)
        self._newest = 0
        self._caught_up = False  # with what earlier starts left in the log
        self._closing = threading.Event()
        self._deadline = 0.0  # of trying again, once it is closing
        self._status = "FINISHED"
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def record(self, record: StepRecord) -> None:
        """Hands over one record, which is in metrics.jsonl already."""
        self._queue.append(record)  # a full queue drops its oldest: it will be replayed from the log
        self._newest = record.step

    def take_note(self) -> str | None:
        """A line when the sink has begun to fail, and one when it takes records again; None in between."""
        cause = self.last_failure
        if bool(cause) == self._told_of_failure:
            return None
        self._told_of_failure = bool(cause)
        if cause:
            return f"tracking: MLflow does not take records ({cause}); metrics.jsonl has them, and it is tried again"
        return "tracking: MLflow takes records again"

    def close(self, status: str = "FINISHED", patience: float = 30.0) -> str | None:
        """Sends the rest, trying again for `patience` seconds; a line about what could not be sent, None if nothing."""
        self._status, self._deadline = status, time.monotonic() + patience
        self._closing.set()
        self._thread.join(patience)
        if not self._thread.is_alive() and not self.last_failure:
            return None
        cause = f" ({self.last_failure})" if self.last_failure else ""
        try:
            unsent = self._unsent()
        except OSError:  # the store of the log is lost too
            unsent = list(self._queue)
        behind = sum(is_due(record, self.every) or record is unsent[-1] for record in unsent)
        return (
            f"tracking: {behind} of {self._newest} steps are not in MLflow{cause}; metrics.jsonl has them all, and "
            f"`longstride track {self.run.url}` sends them"
        )

    def _work(self) -> None:
        pause = 0.0
        while True:
            closing = self._closing.wait(pause)
            try:
                if self.sent_until is None:
                    self.sent_until = self.sink.connect()
                self._send()
                if closing:
                    self.sink.finish(list(read_records(self.run.storage)), self._status)
                self.last_failure = ""
                pause = self.interval
                if closing:
                    return
            except Exception as error:
                self.failures += 1
                self.last_failure = one_line(error)
                pause = min(max(1.0, 2 * pause), LONGEST_PAUSE)
                if closing and time.monotonic() + CLOSING_PAUSE > self._deadline:
                    return
                if closing:
                    time.sleep(CLOSING_PAUSE)

    def _send(self) -> None:
        for records in _batches(self._unsent()):
            self.sink.send(records)
            self.sent_until = records[-1].order
        self._caught_up = True
        while self._queue and self._queue[0].order <= (self.sent_until or NOTHING):
            self._queue.popleft()

    def _unsent(self) -> list[StepRecord]:
        """Records after `sent_until`, in order; from the log where the queue does not have them all."""
        sent = self.sent_until or NOTHING
        queued = [record for record in list(self._queue) if record.order > sent]
        if self._caught_up and (not queued or queued[0].order == (*sent[:2], sent[2] + 1)):
            return queued
        logged = [record for record in read_records(self.run.storage) if record.order > sent]
        # An object store has the log of some seconds ago.
        last = logged[-1].order if logged else sent
        return logged + [record for record in queued if record.order > last]


class MlflowSink:
    """One MLflow run, with a child for every stage and every further start (`mlflow_stages`).

    MLflow is imported in the tracker's thread, at the first use.

    Args:
        settings: the resolved experiment as plain values: parameters of the run, and experiment.yaml.
        training: this process trains, so that its environment is the run's; otherwise what the run's directory says.
    """

    def __init__(
        self,
        run: RunDirectory,
        config: TrackingConfig,
        settings: Mapping[str, Any],
        version: str,
        *,
        training: bool = False,
    ) -> None:
        self.run, self.config, self.settings, self.version = run, config, settings, version
        self._training = training
        self._checkpoint = ""  # last told of
        self._looked = -math.inf  # for checkpoints, when
        self.uri = tracking_uri(config, run)
        self._client: Any = None
        self._stages: Any = None
        self._steps: Any = None
        self._run_id = ""
        self._last_step = 0  # of those given
        self._logged = NOTHING  # the last record that MLflow has
        self._tags: dict[str, str] = {}  # that go with the next
        self.sent = 0  # records, by this process

    def connect(self) -> Order:
        from . import mlflow_client
        from .mlflow_stages import StageRuns

        if self._training:
            self.run.storage.write_text(ENVIRONMENT_FILE, describe_environment())
            self._training = False  # it does not change
        self._client = mlflow_client.connect(self.uri)
        known = self.run.read_info().get("mlflow", {})
        found = None
        if known.get("uri") == self.uri:
            found = mlflow_client.find(self._client, known["run_id"])
        if found is None:
            found = mlflow_client.create(self._client, self.config.experiment, self.run, self.uri)
        self._run_id = found.info.run_id
        self.run.update_info(mlflow={"uri": self.uri, "experiment": self.config.experiment, "run_id": self._run_id})
        mlflow_client.describe(self._client, found, self.settings, self.run, self.version)
        scheduled = bool(self.settings.get("data", {}).get("schedule"))
        self._steps = TrackedSteps(self.config.every, lambda: mlflow_client.steps(self._client, self._run_id))
        self._stages = StageRuns(self._client, self.run, found, scheduled=scheduled, thinned=self.config.every > 1)
        self._logged = mlflow_client.sent_until(found)
        self._last_step = self._logged[2]
        return self._logged

    def send(self, records: list[StepRecord]) -> None:
        from .mlflow_client import REWOUND_TAG

        last = self._last_step
        for record in records:
            if record.step <= last:
                self._tags = {REWOUND_TAG: str(record.step - 1)}
            last = record.step
        if chosen := self._steps.choose(records):
            self._log(chosen)
        self._last_step = last
        if time.monotonic() - self._looked > CHECKPOINT_INTERVAL:
            self._tag_checkpoint()

    def finish(self, records: list[StepRecord], status: str) -> None:
        from . import mlflow_client

        if records and records[-1].order > self._logged:
            self._log(records[-1:])
        self._tag_checkpoint()
        mlflow_client.log_curves(self._client, self._run_id, records)
        self._stages.finish(status)
        self._client.set_terminated(self._run_id, status)

    def _log(self, records: list[StepRecord]) -> None:
        from . import mlflow_client

        self._stages.send(records)
        mlflow_client.log_records(self._client, self._run_id, records, self._tags)
        self._logged, self._tags = records[-1].order, {}
        self.sent += len(records)

    def _tag_checkpoint(self) -> None:
        from . import mlflow_client

        self._looked = time.monotonic()
        newest = next((found for found in reversed(list_checkpoints(self.run)) if found.committed), None)
        if newest is not None and newest.name != self._checkpoint:
            mlflow_client.tag_checkpoint(self._client, self._run_id, newest)
            self._checkpoint = newest.name


def tracking_uri(config: TrackingConfig, run: RunDirectory) -> str:
    """The MLflow store of a run: as configured, or mlflow.db beside the runs (in ./runs if they are not on a disk)."""
    if config.uri is not None:
        return config.uri
    parent = run.url.rsplit("/", 1)[0] if run.storage.local else Storage("runs").url
    return f"sqlite:///{Path(parent) / 'mlflow.db'}"


def send_all(run: RunDirectory, config: TrackingConfig, settings: Mapping[str, Any], version: str) -> int:
    """Sends every record that MLflow is to have and does not; how many. A run with steps left counts as stopped.

    Raises what MLflow raises.
    """
    sink = MlflowSink(run, config, settings, version)
    after = sink.connect()
    missing = [record for record in read_records(run.storage) if record.order > after]
    for records in _batches(missing):
        sink.send(records)
    records = list(read_records(run.storage))
    complete = bool(records) and records[-1].step >= settings["train"]["steps"]
    sink.finish(records, "FINISHED" if complete else "KILLED")
    return sink.sent


def one_line(error: BaseException) -> str:
    """An error as one short line."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]


def _batches(records: list[StepRecord]) -> list[list[StepRecord]]:
    return [records[start : start + BATCH_LENGTH] for start in range(0, len(records), BATCH_LENGTH)]
