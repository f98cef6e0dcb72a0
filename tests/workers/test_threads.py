"""The threads of a run end with it, however it ends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest

from longstride.workers import RunDirectory, create_run, launch, train_process
from longstride.workers.checkpoint import Checkpointer
from longstride.workers.metrics import StepRecord
from longstride.workers.reporting import Silent
from longstride.workers.run_directory import RunTaken
from longstride.workers.tracking import Tracker

from .test_tracking import FakeSink
from .tiny import tiny_experiment

LAST = 5  # the step after which the run ends


def names() -> set[str]:
    """Of the threads but the one that asks."""
    return {thread.name for thread in threading.enumerate()} - {threading.current_thread().name}


class Watcher(Silent):
    """Sees which threads there are after every step, and ends the run."""

    def __init__(self, end: Callable[[], object]) -> None:
        self.end, self.seen = end, set[str]()
        self.stepped_once_more = threading.Event()

    def stepped(self, record: StepRecord) -> None:
        self.seen |= names()
        self.stepped_once_more.set()
        if record.step == LAST:
            self.end()


def fail() -> None:
    raise OSError("the terminal is gone")


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("how", ["finishes", "is asked to stop", "is taken over", "fails", "is interrupted"])
def test_no_thread_outlives_its_run(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it goes on there is one that reads ahead, one that writes a checkpoint and one that tracks.

    Who interrupts a run that was asked to stop already does not want to wait for a checkpoint: it alone may be left.
    """
    settings = (
        "checkpoint.every=2",
        "checkpoint.asynchronous=true",
        f"train.steps={LAST + 2}",
        "tracking.enabled=true",
    )
    experiment = tiny_experiment(str(tmp_path), *settings)
    run, stop = create_run(experiment), threading.Event()
    run.take()
    ends: dict[str, tuple[Callable[[], object], AbstractContextManager[object]]] = {
        "finishes": (lambda: None, nullcontext()),
        "is asked to stop": (stop.set, nullcontext()),
        "is taken over": (RunDirectory(run.url).take, pytest.raises(RunTaken)),
        "fails": (fail, pytest.raises(OSError, match="the terminal is gone")),
        "is interrupted": (interrupt, pytest.raises(KeyboardInterrupt)),
    }
    end, outcome = ends[how]
    watcher = Watcher(end)
    begin = Checkpointer._begin

    def begin_beside_a_step(self: Checkpointer, step: int) -> str:
        if threading.current_thread().name == "checkpoint":
            watcher.stepped_once_more.clear()
            watcher.stepped_once_more.wait(5)
        return begin(self, step)

    monkeypatch.setattr(Checkpointer, "_begin", begin_beside_a_step)
    monkeypatch.setattr(launch, "_tracker", lambda _, run: Tracker(run, FakeSink()))
    before = names()
    with outcome:
        train_process(experiment, threads=1, run=run.url, token=run.token, reporter=watcher, stop=stop)
    assert watcher.seen - before == {"prefetch", "checkpoint", "tracking"}
    left = [thread for thread in threading.enumerate() if thread.name in names() - before]
    assert {thread.name for thread in left} <= ({"checkpoint"} if how == "is interrupted" else set())
    for thread in left:
        thread.join(30)
