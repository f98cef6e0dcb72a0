"""Child runs in MLflow: one for every start of a run that has several, because it was resumed or its context grows.

The parent has all metrics; a child has those of the steps that its start made, and as parameters its context, batch
and mesh. What starts there were is read from run.json, and which children there are from MLflow, by their tags. A run
that has one start has no child: when the second start appears, the first one's child is filled from metrics.jsonl.
"""

from __future__ import annotations

from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Param, Run
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from .metrics import NOTHING, Order, StepRecord, read_records
from .mlflow_client import flatten, log_records, sent_until, steps
from .run_directory import RunDirectory

START_TAG = "longstride.start"
_AT_ONCE = 100  # records
_KEYS = ("context", "batch", "workers", "parallel")


class StageRuns:
    """The children of `parent`.

    Args:
        scheduled: the run's context grows, so that its first start is not alone.
        thinned: the parent is not sent every step, and neither are they.
    """

    def __init__(
        self, client: MlflowClient, run: RunDirectory, parent: Run, *, scheduled: bool, thinned: bool = False
    ) -> None:
        self._client, self._run, self._parent = client, run, parent
        self._scheduled, self._thinned = scheduled, thinned
        query = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{parent.info.run_id}'"
        found = client.search_runs([parent.info.experiment_id], query)
        self._ids = {int(child.data.tags[START_TAG]): child.info.run_id for child in found}
        self._sent: dict[int, Order] = {int(child.data.tags[START_TAG]): sent_until(child) for child in found}
        self._open: set[int] = set()
        self._filled = False  # with what the log has of steps that the parent was sent before

    def send(self, records: list[StepRecord]) -> None:
        """Give the records to the children whose steps they are; a child begins with its first."""
        starts = self._run.read_info().get("starts", [])
        if not starts or (len(starts) < 2 and not self._scheduled):
            return
        if not self._filled:
            records = self._sent_before(records[0].order) + records
        parts: dict[int, list[StepRecord]] = {}
        for record in records:
            if record.order > self._sent.get(record.start, NOTHING):
                parts.setdefault(record.start, []).append(record)
        for index, own in sorted(parts.items()):
            for earlier in [number for number in self._open if number < index]:
                self._close(earlier, "FINISHED")
            child = self._begin(index, starts[index])
            for start in range(0, len(own), _AT_ONCE):
                part = own[start : start + _AT_ONCE]
                log_records(self._client, child, part)
                self._sent[index] = part[-1].order
        self._filled = True

    def _sent_before(self, first: Order) -> list[StepRecord]:
        """The records before `first` that the parent has."""
        earlier = [record for record in read_records(self._run.storage) if record.order < first]
        if not self._thinned:
            return earlier
        known = steps(self._client, self._parent.info.run_id)
        return [record for record in earlier if record.step in known]

    def finish(self, status: str) -> None:
        """End the children that are open."""
        for index in list(self._open):
            self._close(index, status)

    def _begin(self, index: int, start: dict[str, Any]) -> str:
        """The id of the child of a start, made where there is none."""
        if index not in self._ids:
            tags = {MLFLOW_PARENT_RUN_ID: self._parent.info.run_id, START_TAG: str(index)}
            name = f"{self._run.name} from step {start['step']}"
            made = self._client.create_run(self._parent.info.experiment_id, tags=tags, run_name=name)
            settings = flatten({key: start[key] for key in _KEYS if key in start})
            self._client.log_batch(made.info.run_id, params=[Param(key, str(value)) for key, value in settings.items()])
            self._ids[index] = made.info.run_id
        elif index not in self._open:
            self._client.update_run(self._ids[index], status="RUNNING")
        self._open.add(index)
        return self._ids[index]

    def _close(self, index: int, status: str) -> None:
        self._client.set_terminated(self._ids[index], status)
        self._open.discard(index)
