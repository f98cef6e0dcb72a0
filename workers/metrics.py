"""What one training step is known by, and the log of all of them.

`metrics.jsonl` in the run directory holds one JSON object a step and is the truth: the live display and MLflow
only mirror it. A step is in it once; a resumed run first takes back what was recorded after its checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .storage import Storage, StorageError

METRICS_FILE = "metrics.jsonl"

# An object store has no append. The whole object is written again, at most this often (seconds) and with the
# writing kept to this share of the time, by which a long log is sent less often than a short one.
REWRITE_INTERVAL = 10.0
REWRITE_SHARE = 0.05

# A backward pass takes twice the operations of a forward pass.
PASSES = 3

Order = tuple[int, int, int]
NOTHING: Order = (0, 0, 0)  # the order before the first record


@dataclass(frozen=True)
class StepRecord:
    """One optimiser step. Losses are nats per token; counts are over all processes.

    Attributes:
        step: steps finished, from 1.
        loss: cross-entropy of the step's tokens before the update.
        validation_loss: cross-entropy of the held-out sequences after the update; None where not measured.
        tokens: tokens trained on since the run began.
        tokens_per_second: of this step.
        wait_share: share of the step that a process, or its GPU, spent waiting for others, mean over processes.
        data_share: share of the step that a process spent waiting for its batch, the largest over processes.
        memory: bytes held by the process that holds most (resident memory; allocated device memory on a GPU).
        learning_rate: of this step.
        grad_norm: global gradient norm before clipping.
        seconds: wall time of the step, validation and checkpoints not counted.
        bytes_sent: by the motions that split sequences and experts, all processes together.
        auxiliary_loss: what the model adds to the cross-entropy to balance its experts.
        time: when the step ended, seconds since 1970.
        start: which start of the run made the step, its place among "starts" in run.json.
        rewinds: how often that start had gone back to a checkpoint before it.
        cpu_percent: how busy the hosts' cores are, whoever uses them: mean over processes; the four from here on are
            sampled once a second, and None in records of older versions.
        host_memory: bytes in use on the host that has most in use.
        gpu_percent: how busy the GPUs are, mean; gpu_memory: bytes in use on the fullest. None without a GPU, the first
            also without NVML's Python package (nvidia-ml-py).
        flops_per_second: the model's operations in this step, over its seconds, all processes together: forward and
            backward, what is recomputed not counted. None in records of older versions.
    """

    step: int
    loss: float
    validation_loss: float | None
    tokens: int
    tokens_per_second: float
    wait_share: float
    memory: int
    learning_rate: float
    grad_norm: float
    seconds: float
    bytes_sent: int = 0
    auxiliary_loss: float = 0.0
    data_share: float = 0.0
    time: float = 0.0
    start: int = 0
    rewinds: int = 0
    cpu_percent: float | None = None
    host_memory: int | None = None
    gpu_percent: float | None = None
    gpu_memory: int | None = None
    flops_per_second: float | None = None

    @property
    def order(self) -> Order:
        """Grows from record to record as they are made, also where the run goes back to an earlier step."""
        return self.start, self.rewinds, self.step

    def to_json(self) -> str:
        # NaN and infinity are no JSON.
        values = {key: _finite(value) for key, value in asdict(self).items()}
        return json.dumps(values, allow_nan=False)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StepRecord:
        """The record from a parsed line; keys of newer versions are ignored."""
        known = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        for name in ("loss", "grad_norm"):
            known[name] = math.nan if known[name] is None else known[name]
        return cls(**known)


class MetricsLog:
    """Append-only log of step records in a run directory. One writer (rank 0); readers at any time."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._lock = threading.Lock()
        self._lines: list[str] | None = None  # the whole content, kept only where appending means rewriting
        self._unwritten = False
        self._next_rewrite = 0.0

    def append(self, record: StepRecord) -> None:
        """Adds a line. It is in the file at once on a file system, within seconds on an object store.

        A store that fails now is given the line later; `flush` insists.
        """
        with self._lock:
            if self._storage.local:
                with Path(self._storage.path(METRICS_FILE)).open("a", encoding="utf-8") as stream:
                    stream.write(record.to_json() + "\n")
                return
            self._content().append(record.to_json())
            self._unwritten = True
            if time.monotonic() >= self._next_rewrite:
                with contextlib.suppress(StorageError):
                    self._rewrite()

    def flush(self) -> None:
        """Everything appended so far is durable when this returns."""
        with self._lock:
            if self._unwritten:
                self._rewrite()
            if self._storage.local and self._storage.exists(METRICS_FILE):
                descriptor = os.open(self._storage.path(METRICS_FILE), os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)

    def rewind(self, step: int) -> int:
        """Takes back records after `step` and anything torn; returns how many complete records went."""
        with self._lock:
            records = list(read_records(self._storage))
            kept = [record for record in records if record.step <= step]
            lines = [record.to_json() for record in kept]
            if self._storage.exists(METRICS_FILE):
                self._storage.write_text(METRICS_FILE, "".join(line + "\n" for line in lines))
            self._lines = None if self._storage.local else lines
            return len(records) - len(kept)

    def _content(self) -> list[str]:
        if self._lines is None:
            self._lines = [record.to_json() for record in read_records(self._storage)]
        return self._lines

    def _rewrite(self) -> None:
        began = time.monotonic()
        try:
            self._storage.write_text(METRICS_FILE, "".join(line + "\n" for line in self._content()))
            self._unwritten = False
        finally:
            now = time.monotonic()
            self._next_rewrite = now + max(REWRITE_INTERVAL, (now - began) / REWRITE_SHARE)


def read_records(storage: Storage, after: int = 0) -> Iterator[StepRecord]:
    """Records with step > `after`, in order. A line cut short by a crash ends the log."""
    if not storage.exists(METRICS_FILE):
        return
    for line in storage.read_text(METRICS_FILE).splitlines():
        try:
            record = StepRecord.from_dict(json.loads(line))
        except (ValueError, TypeError, KeyError, AttributeError):
            return
        if record.step > after:
            yield record


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
