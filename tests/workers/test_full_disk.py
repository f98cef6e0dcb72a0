"""A disk that takes no more: it is said in its own words, and training goes on until there is room, for a while."""

from __future__ import annotations

import contextlib
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from longstride.workers import RunDirectory, create_run, saving, train_process
from longstride.workers.checkpoint import CheckpointError
from longstride.workers.manifest import list_checkpoints
from longstride.workers.metrics import METRICS_FILE, MetricsLog, StepRecord, read_records
from longstride.workers.recovery import FailedCheckpoints, RecoveryConfig, TrainingError
from longstride.workers.reporting import Silent
from longstride.workers.storage import Storage

from .test_run_directory import record
from .tiny import tiny_experiment


@contextlib.contextmanager
def room_in_a_file(room: int) -> Iterator[None]:
    """No file may be longer: a real error of a real write, as ENOSPC is."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [8_000, 40_000], ids=["a first tensor", "a few"])
def test_what_the_disk_says_is_the_cause(room: int, tmp_path: Path) -> None:
    experiment = tiny_experiment(str(tmp_path), "train.steps=4", "checkpoint.every=2", "recovery.max_failures=0")
    run = create_run(experiment)
    with (
        room_in_a_file(room),
        pytest.raises(TrainingError, match=r"step-00000002 was not written .*File too large"),
    ):
        train_process(experiment, threads=1, device="cpu")
    assert not run.storage.directories("checkpoints"), "what was begun is gone"


class MakesRoom(Silent):
    """Ends a shortage after a step, and remembers what was said. No checkpoint takes longer than a step."""

    def __init__(self, step: int, shortage: contextlib.ExitStack) -> None:
        self.step, self.shortage = step, shortage
        self.notes: list[str] = []

    def stepped(self, record: StepRecord) -> None:
        for thread in threading.enumerate():
            if thread.name == "checkpoint":
                thread.join()
        if record.step == self.step:
            self.shortage.close()

    def noted(self, message: str) -> None:
        self.notes.append(message)


def losses(run: RunDirectory) -> list[float]:
    return [record.loss for record in read_records(run.storage)]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_training_goes_on_until_there_is_room(asynchronous: bool, tmp_path: Path) -> None:
    words = ["train.steps=12", "checkpoint.every=4", f"checkpoint.asynchronous={asynchronous}"]
    words += ["train.validate_every=0", "checkpoint.keep=0"]
    peace = create_run(tiny_experiment(str(tmp_path), *words, "run.name=peace"))
    train_process(tiny_experiment(str(tmp_path), *words, "run.name=peace"), threads=1, device="cpu")

    experiment = tiny_experiment(str(tmp_path), *words)
    run = create_run(experiment)
    with contextlib.ExitStack() as shortage:
        shortage.enter_context(room_in_a_file(3_000))
        reporter = MakesRoom(9, shortage)
        train_process(experiment, threads=1, device="cpu", reporter=reporter)
    assert losses(run) == losses(peace), "bitwise, and all of them"
    (first, second, full, again) = sorted(reporter.notes, key=lambda note: note.startswith(METRICS_FILE))
    assert first.startswith("checkpoint step-00000004 was not written (process 0: [Errno 27] File too large)")
    assert first.endswith("training goes on, and the next tries again (failure 1 of 3 in a row)")
    assert second.endswith("(failure 2 of 3 in a row)")
    assert full == f"{METRICS_FILE} takes no lines (File too large); they are kept, and tried again"
    assert again == f"{METRICS_FILE} has all lines again"
    assert [(found.step, found.committed) for found in list_checkpoints(run)] == [(12, True)]


def test_not_for_ever(tmp_path: Path) -> None:
    words = ["train.steps=12", "checkpoint.every=2", "train.validate_every=0", "checkpoint.asynchronous=false"]
    experiment = tiny_experiment(str(tmp_path), *words, "recovery.max_failures=2", "recovery.wait_seconds=0.1")
    run = create_run(experiment)
    reporter = MakesRoom(0, contextlib.ExitStack())
    said = rf"step-00000006.*: once its store takes files, `longstride resume {run.url}` goes on"
    with room_in_a_file(4_000), pytest.raises(TrainingError, match=said):
        train_process(experiment, threads=1, device="cpu", reporter=reporter)
    assert len([note for note in reporter.notes if "training goes on" in note]) == 2
    assert len([note for note in reporter.notes if "training stands still until one is, for up to 0 s" in note]) == 1


@pytest.mark.parametrize("asynchronous", [True, False])
def test_training_stands_still_for_room_and_loses_nothing(
    asynchronous: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After two failures in a row; without more room it would be the end."""
    words = ["train.steps=8", "checkpoint.every=2", "train.validate_every=0", f"checkpoint.asynchronous={asynchronous}"]
    experiment = tiny_experiment(str(tmp_path), *words, "recovery.max_failures=1", "checkpoint.keep=0")
    run = create_run(experiment)
    with contextlib.ExitStack() as shortage:
        shortage.enter_context(room_in_a_file(4_000))
        reporter, stood = MakesRoom(0, shortage), list[int]()

        def make_room(seconds: float) -> None:
            stood.append(1)
            if len(stood) == 3:
                shortage.close()

        monkeypatch.setattr(saving, "time", SimpleNamespace(sleep=make_room, monotonic=time.monotonic))
        train_process(experiment, threads=1, device="cpu", reporter=reporter)
    assert len(stood) == 3
    committed = [found.step for found in list_checkpoints(run) if found.committed]
    assert committed[0] in ((5, 6) if asynchronous else (4,)) and committed[-1] == 8
    assert [record.step for record in read_records(run.storage)] == list(range(1, 9))
    assert len(run.read_info()["starts"]) == 1


def test_a_good_checkpoint_forgives_the_failures_before_it() -> None:
    failed, error = FailedCheckpoints(RecoveryConfig(max_failures=1)), CheckpointError("no room")
    assert failed.bear(error, 0).endswith("(failure 1 of 1 in a row)")
    assert failed.bear(error, 1).endswith("(failure 1 of 1 in a row)")
    assert failed.bear(error, 1) is None


def test_no_line_of_the_log_is_torn(tmp_path: Path) -> None:
    log, lines = MetricsLog(Storage(str(tmp_path))), [record(step) for step in range(1, 8)]
    one = len(lines[0].to_json()) + 1
    with room_in_a_file(3 * one + one // 2):
        said = [log.append(line) for line in lines[:6]]
        assert (tmp_path / METRICS_FILE).read_text() == "".join(line.to_json() + "\n" for line in lines[:3])
        with pytest.raises(OSError, match="File too large"):
            log.flush()
    assert [note is not None for note in said] == [False, False, False, True, False, False]
    assert log.append(lines[6]) is not None
    assert list(read_records(Storage(str(tmp_path)))) == lines
