"""What one training step is known by, and the log of all of them.

`metrics.jsonl` in the run directory holds one JSON object a step and is the truth: the live display and MLflow
only mirror it. A step is in it once; a resumed run first takes back what was recorded after its checkpoint.

An object store has no append: there the newest file is written again and again, and once it is long another begins, so
that what is written in all grows with the log and not with its square:

    metrics.jsonl  metrics-0001.jsonl  metrics-0002.jsonl ...     read one after the other they are the log
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

from .storage import Storage

METRICS_FILE = "metrics.jsonl"

# On an object store: the length at which a file is followed by another, and how often the newest is written (seconds),
# with the writing kept to this share of the time.
FILE_BYTES = 256 << 10
REWRITE_INTERVAL = 10.0
REWRITE_SHARE = 0.05
READERS = 16  # files read side by side
READ_BYTES = 64 << 10  # at a time, where a log is read from its end
_NAME = re.compile(r"metrics(?:-(\d{4,}))?\.jsonl")

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
        time: when the step ended, seconds since 1970; it grows from record to record whatever the system's clock does.
        start: which start of the run made the step, its place among "starts" in run.json.
        rewinds: how often that start had gone back to a checkpoint before it.
        cpu_percent: how busy the hosts' cores are, whoever uses them: mean over processes; the four from here on are
            sampled once a second, and None in records of older versions.
        host_memory: bytes in use on the host that has most in use.
        gpu_percent: how busy the GPUs are, mean; gpu_memory: bytes in use on the fullest. None without a GPU, the first
            also without NVML's Python package (nvidia-ml-py).
        flops_per_second: the model's operations in this step, over its seconds, all processes together: forward and
            backward, what is recomputed not counted. None, as the three that follow, in records of older versions.
        pause: seconds between the step before and this one, for validation, a checkpoint's copy, a rollback, the log;
            0 for the first of a start.
        context: tokens of a sequence. epochs: tokens trained on, over those of the corpus's training part.
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
    pause: float | None = None
    context: int | None = None
    epochs: float | None = None

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
    """Log of step records in a run directory. One writer (rank 0); readers at any time."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._writing = threading.Lock()
        self._unwritten: list[str] = []
        self._name = ""  # of the newest file; known once something was written
        self._lines: list[str] = []  # that it has, where appending means rewriting
        self._next_rewrite = 0.0
        self._thread: threading.Thread | None = None
        self._failing, self._note = False, ""
        self._latest = 0.0  # time of a record

    def now(self) -> float:
        """Seconds since 1970, later than the times of all records before it, also where the clock was put back: of two
        points of a step in MLflow the later counts.
        """
        self._latest = max(time.time(), self._latest + 0.001)
        return self._latest

    def append(self, record: StepRecord) -> str | None:
        """Adds a line. It is in the file at once on a file system. To an object store it is written beside training,
        within seconds.

        A store that fails now, or a full disk, is given the line later; `flush` insists. Returns a line for the person
        when that begins, and when the log is complete again.
        """
        self._unwritten.append(record.to_json())
        if self._storage.local:
            self._try_to_write()
        elif time.monotonic() >= self._next_rewrite and (self._thread is None or not self._thread.is_alive()):
            self._thread = threading.Thread(target=self._try_to_write, name="metrics", daemon=True)
            self._thread.start()
        note, self._note = self._note, ""
        return note or None

    def flush(self) -> None:
        """Everything appended so far is durable when this returns."""
        with self._writing:
            self._write()
            if self._storage.local and self._name:
                descriptor = os.open(self._storage.path(self._name), os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)

    def rewind(self, step: int) -> int:
        """Takes back records after `step` and anything torn; returns how many complete records went."""
        with self._writing:
            self._unwritten.clear()
            self._name, self._lines = "", []
            names, gone = log_files(self._storage), 0
            for name in reversed(names):  # so that what is left of an interruption is a log
                text = self._storage.read_text(name)
                found = list(_complete(text))
                kept = [line for line, record in found if record.step <= step]
                gone += len(found) - len(kept)
                self._latest = max(self._latest, *(record.time for _, record in found), 0.0)
                if not kept and name != names[0]:
                    self._storage.remove(name)
                    continue
                if (left := "".join(f"{line}\n" for line in kept)) != text:
                    self._storage.write_text(name, left)
                break
            return gone

    def _try_to_write(self) -> None:
        with self._writing:
            before = self._failing
            try:
                self._write()
            except OSError as error:
                self._failing = True
                cause = error.strerror or str(error)
                if not before:
                    self._note = f"{METRICS_FILE} takes no lines ({cause}); they are kept, and tried again"
            else:
                self._failing = False
                if before:
                    self._note = f"{METRICS_FILE} has all lines again"

    def _write(self) -> None:
        if not self._unwritten:
            return
        began, count = time.monotonic(), len(self._unwritten)  # training may append meanwhile
        try:
            if not self._name:
                self._find_end()
            if self._storage.local:
                self._extend(self._unwritten[:count])
            else:
                self._rewrite(self._unwritten[:count])
            del self._unwritten[:count]
        finally:
            now = time.monotonic()
            self._next_rewrite = now + max(REWRITE_INTERVAL, (now - began) / REWRITE_SHARE)

    def _find_end(self) -> None:
        """Of a log that may be there: by an earlier process, or fetched from an object store."""
        names = log_files(self._storage)
        if names and not self._storage.local:
            self._lines = [line for line, _ in _complete(self._storage.read_text(names[-1]))]
        self._name = names[-1] if names else METRICS_FILE

    def _extend(self, lines: list[str]) -> None:
        """All lines or none: half a line would end the log for its readers."""
        left = memoryview("".join(line + "\n" for line in lines).encode())
        with Path(self._storage.path(self._name)).open("ab", buffering=0) as stream:
            end = stream.seek(0, os.SEEK_END)
            try:
                while left:
                    left = left[stream.write(left) :]
            except OSError:
                stream.truncate(end)
                raise

    def _rewrite(self, lines: list[str]) -> None:
        if sum(map(len, self._lines)) >= FILE_BYTES:
            number = _number(self._name)
            assert number is not None
            self._name, self._lines = f"metrics-{number + 1:04d}.jsonl", []
        lines = [*self._lines, *lines]
        self._storage.write_text(self._name, "".join(line + "\n" for line in lines))
        self._lines = lines


def log_files(storage: Storage) -> list[str]:
    """The names of the files of a run's log, oldest first."""
    numbers = {name: _number(name) for name in storage.files()}
    return sorted((name for name, number in numbers.items() if number is not None), key=lambda name: numbers[name] or 0)


def read_records(storage: Storage, after: int = 0) -> Iterator[StepRecord]:
    """Records with step > `after`, in order. A line cut short by a crash ends the log."""
    for text in _read_files(storage):
        lines = 0
        for _, record in _complete(text):
            lines += 1
            if record.step > after:
                yield record
        if lines < text.count("\n"):
            return


def newest_records(storage: Storage) -> Iterator[StepRecord]:
    """The same records from the last to the first. Of a log of any length, only as much is read as is asked for."""
    for name in reversed(log_files(storage)):
        # A file that is taken back meanwhile has no records.
        with contextlib.suppress(FileNotFoundError), storage.explained(name), storage.open(name, "rb") as stream:
            for line in _lines_from_the_end(stream):
                for _, record in _complete(line):  # none of a line cut short
                    yield record


def _lines_from_the_end(stream: IO[bytes]) -> Iterator[str]:
    """What lies between line ends, last first."""
    left, rest = stream.seek(0, os.SEEK_END), b""
    while left:
        size = min(READ_BYTES, left)
        left = stream.seek(left - size)
        rest, *lines = (stream.read(size) + rest).split(b"\n")
        for line in reversed(lines):
            yield line.decode("utf-8", "replace")
    yield rest.decode("utf-8", "replace")


def _read_files(storage: Storage) -> Iterator[str]:
    """The files of a log, one after the other; those that are taken back meanwhile are not."""
    names = log_files(storage)
    with contextlib.suppress(FileNotFoundError), ThreadPoolExecutor(READERS) as pool:
        yield from pool.map(storage.read_text, names) if len(names) > 1 else map(storage.read_text, names)


def _complete(text: str) -> Iterator[tuple[str, StepRecord]]:
    """The lines of a file with their records, up to one that was cut short."""
    for line in text.splitlines():
        try:
            yield line, StepRecord.from_dict(json.loads(line))
        except (ValueError, TypeError, KeyError, AttributeError):
            return


def _number(name: str) -> int | None:
    """Which of a log's files has the name; None: it is another's."""
    match = _NAME.fullmatch(name)
    return None if match is None else int(match[1] or 0)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
