"""What the supervisor decides, on a scripted cluster; test_cluster.py shows it on a real one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from longstride.data import CorpusError, StoreUnavailable
from longstride.orchestrator import supervisor as module
from longstride.orchestrator.arrangement import Node, arrange
from longstride.orchestrator.cluster import Resources
from longstride.orchestrator.failures import Fault, RunFailed, raise_fault
from longstride.orchestrator.forecast import forecast
from longstride.orchestrator.placement import Placement, room
from longstride.orchestrator.preparation import Prepared
from longstride.orchestrator.rendezvous import Rendezvous
from longstride.orchestrator.stopping import StopRequest
from longstride.orchestrator.supervisor import Supervisor
from longstride.orchestrator.tables import amount_of_bytes
from longstride.parallel import Degrees
from longstride.workers import Experiment, RunDirectory, Summary, create_run
from longstride.workers.reporting import Silent
from longstride.workers.storage import StorageError, StorageUnavailable

LOST = RunFailed("worker 1 died", "details", retry=True)


class Outage(RunFailed):
    """A failure that comes with a store that cannot be reached for so many seconds more."""

    def __init__(self, seconds: float) -> None:
        super().__init__("the store is gone", retry=True)
        self.seconds = seconds


class Script:
    """A cluster and the attempts on it: what every attempt does, and how many places there are before it.

    An attempt is an exception, the step of a new checkpoint followed by an exception, or a reason to leave.
    """

    local = False

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *attempts: Any, places: int | list[int] = 4) -> None:
        self.attempts = list(attempts)
        self.places = places if isinstance(places, list) else [places]
        self.workers: list[int] = []
        self.asked: list[int] = []
        self.resumed: list[bool] = []
        self.clock = 0.0
        self.checkpoint = 0
        self.room: int | None = None  # bytes for a worker
        self.store_is_back = 0.0  # until then nobody reaches the run's store
        self.draining: dict[str, int] = {}
        monkeypatch.setattr(module, "usable_nodes", lambda device: self.nodes())
        monkeypatch.setattr(module, "room", lambda places, device: self.room)
        monkeypatch.setattr(module, "draining", lambda: self.draining)
        monkeypatch.setattr(module, "reserved", self.reserved)
        monkeypatch.setattr(module, "formed", lambda placement: contextlib.nullcontext(self))
        monkeypatch.setattr(module.Supervisor, "_committed_step", lambda _: self.committed())
        monkeypatch.setattr(module.time, "monotonic", lambda: self.clock)
        monkeypatch.setattr(module.time, "sleep", self.sleep)

    def committed(self) -> int:
        if self.clock < self.store_is_back:
            raise StorageUnavailable(5, "could not connect", "s3://bucket/runs/small")
        return self.checkpoint

    def nodes(self) -> list[Node]:
        return [Node("n1", "10.0.0.1", self.places[0], self.places[0])]

    def resources(self) -> Resources:
        return Resources(1, self.places[0], 0)

    def ask_for(self, workers: int, device: str) -> None:
        self.asked.append(workers)

    def sleep(self, seconds: float) -> None:
        self.clock += seconds
        self.next_places()

    def next_places(self) -> None:
        if len(self.places) > 1:
            self.places.pop(0)

    @contextlib.contextmanager
    def reserved(self, nodes: list[Node], degrees: Degrees, device: str) -> Iterator[Placement]:
        group: Any = None
        yield Placement(group, tuple(arrange(nodes, degrees)), "cpu", degrees)

    def train(self, prepared: Prepared, meeting: Rendezvous, reporter: Any, stop: Any, watch: Callable) -> Summary:
        self.workers.append(prepared.experiment.workers)
        self.resumed.append(prepared.resume)
        assert meeting.attempt == len(self.workers) - 1, "every attempt meets in a place of its own"
        attempt = self.attempts.pop(0)
        self.next_places()
        if isinstance(attempt, tuple):
            self.checkpoint, attempt = attempt
        if isinstance(attempt, Outage):
            self.store_is_back = self.clock + attempt.seconds
        if isinstance(attempt, Exception):
            raise attempt
        if attempt == "watch":
            reasons = [watch() for _ in range(3)]
            self.places = [len(self.nodes()) and self.places[0] + prepared.experiment.workers]
            reporter.noted(next(reason for reason in reasons if reason))
        return Summary("run", "runs/run", 9, 10, 1, attempt == "finished", 1.0, None, 1.0)


class Heard(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.summaries = 0

    def noted(self, message: str) -> None:
        self.notes.append(message)

    def finished(self, summary: Summary) -> None:
        self.summaries += 1


def run(script: Script, place: Path, *overrides: str, elastic: bool = False) -> Heard:
    experiment = Experiment.load("small.yaml", ["workers=4", "parallel.data=2", *overrides])
    prepared = Prepared(experiment, create_run(experiment), False, "")
    heard = Heard()
    cluster: Any = script
    try:
        Supervisor(prepared, cluster, heard, StopRequest(), elastic).run(Rendezvous("127.0.0.1", 1))
    finally:
        failures = prepared.run.read_info().get("failures", [])
        heard.notes.append(f"{len(failures)} failures noted")
    assert heard.summaries == 1, "all attempts are one run"
    return heard


def test_it_goes_on_from_what_was_saved(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(monkeypatch, LOST, (5, LOST), "finished")
    heard = run(script, place)
    assert script.workers == [4, 4, 4]
    assert script.resumed == [False, False, True]
    assert script.asked == [], "nothing is missing"
    assert any("worker 1 died; going on from the beginning (failure 1 of 3 in a row)" in note for note in heard.notes)
    assert any("going on from step 5 (failure 1 of 3 in a row)" in note for note in heard.notes)
    assert (place / "runs/small/failure.txt").read_text() == "details\n"


def test_failures_in_a_row_are_bounded_and_progress_counts(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(monkeypatch, *[(step, LOST) for step in (5, 5, 10, 10, 15)], "finished")
    assert run(script, place, "recovery.max_failures=2").notes[-1] == "5 failures noted"
    script = Script(monkeypatch, (5, LOST), (5, LOST), (5, RunFailed("worker 1 died", retry=True)))
    with pytest.raises(RunFailed, match="worker 1 died") as caught:
        run(script, place, "recovery.max_failures=2", "run.name=other")
    assert caught.value.__notes__ == ["gave up after 3 failures in a row without a new checkpoint"]


@pytest.mark.parametrize(
    ("fault", "retry"),
    [
        (Fault.from_exception(0, IndexError("out of range"), ""), False),
        (Fault.from_exception(0, type("TrainingError", (Exception,), {})("the loss is nan"), ""), False),
        (Fault.from_exception(0, type("CheckpointError", (Exception,), {})("no space"), ""), True),
        (Fault.from_exception(0, RuntimeError("Connection closed by peer"), ""), True),
        (Fault.from_exception(0, MemoryError("cannot allocate"), ""), True),
        (Fault.from_exception(0, type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"), ""), True),
        (Fault(0, "died", "was lost with its node 10.0.0.1"), True),
        (Fault.from_exception(0, StoreUnavailable("cannot read s3://bucket/shard: given up after 30 s"), ""), True),
        (Fault.from_exception(0, OSError(28, "No space left on device", "/runs/small/.run.json.7.tmp"), ""), True),
        (Fault.from_exception(0, StorageUnavailable(5, "given up", "s3://bucket/runs/small/run.json"), ""), True),
    ],
)
def test_what_is_tried_again(fault: Fault, retry: bool, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunFailed) as caught:
        raise_fault([fault], ["process 1"])
    script = Script(monkeypatch, caught.value, "finished")
    if retry:
        run(script, place)
        assert len(script.workers) == 2
    else:
        with pytest.raises(RunFailed):
            run(script, place)


def test_a_failure_that_a_full_disk_does_not_take_is_said(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    update_info = RunDirectory.update_info

    def full(self: RunDirectory, **values: Any) -> None:
        if "failures" in values:
            raise OSError(28, "No space left on device", "run.json")
        update_info(self, **values)

    script = Script(monkeypatch, (5, LOST), "finished")
    monkeypatch.setattr(RunDirectory, "update_info", full)
    assert "run.json: no space left on device: run.json does not have this failure" in run(script, place).notes


def test_a_store_that_does_not_let_us_in_is_a_mistake() -> None:
    """It stays so however often it is tried."""
    for error in (StorageError(5, "access denied", "s3://bucket/runs/small"), CorpusError("no credentials")):
        with pytest.raises(ValueError, match=r"access denied|no credentials"):
            raise_fault([Fault.from_exception(0, error, "")], ["process 1"])


def test_a_store_that_is_away_after_a_failure_is_waited_for(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(monkeypatch, (5, Outage(20)), "finished")
    heard = run(script, place)
    assert script.resumed == [False, True]
    assert 20 <= script.clock < 22
    assert "s3://bucket/runs/small: could not connect: waiting up to 60 s" in heard.notes
    assert any("the store is gone; going on from step 5" in note for note in heard.notes)
    script = Script(monkeypatch, (5, Outage(100)))
    with pytest.raises(RunFailed, match="the run's store stayed away for 60 s: s3://bucket/runs/small: could not"):
        run(script, place, "run.name=other")


def test_it_shrinks_at_once_and_grows_when_there_is_room(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(monkeypatch, (5, LOST), "watch", "finished", places=[4, 3, 2])
    heard = run(script, place)
    assert script.workers == [4, 2, 4]
    assert "2 of 4 workers have a place: going on as data 1 x sequence 2" in heard.notes
    assert "there is room for 4 workers: writing a checkpoint and growing" in heard.notes
    assert heard.notes[-1] == "1 failures noted", "to move is no failure"


def test_a_mesh_that_its_devices_cannot_hold_is_not_taken(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = Experiment.load("small.yaml", ["workers=2", "parallel.data=1"])
    needed = sum(next(forecast(experiment, "cpu")).memory.values())
    for limit, workers in ((needed, [4, 2]), (needed - 1, [4, 4])):
        script = Script(monkeypatch, (5, LOST), "finished", places=[4, *[3] * 60, 4])
        script.room = limit
        heard = run(script, place, f"run.name=room-{limit}")
        assert script.workers == workers
        said = f"2 of 4 workers would need {amount_of_bytes(needed)} a process, and there is {amount_of_bytes(limit)}"
        assert (f"{said}: waiting up to 60 s" in heard.notes) == (limit < needed)
    script = Script(monkeypatch, (5, LOST), places=[4, 3])
    script.room = needed - 1
    with pytest.raises(RunFailed, match="no room within 60 s: 2 of 4 workers would need"):
        run(script, place, "run.name=small")


def test_room_is_shared_by_the_workers_of_a_node() -> None:
    one, two = Node("n1", "10.0.0.1", 2, 2, memory=30), Node("n2", "10.0.0.2", 1, 1, memory=20)
    assert room([one, one, two], "cpu") == 15
    assert room([one, two], "cpu") == 20
    assert room([Node("n3", "10.0.0.3", 1, 1)], "cpu") is None


def test_it_leaves_a_node_that_is_about_to_go(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(monkeypatch, "watch", "finished")
    script.draining = {"n1": 0}
    assert "node 10.0.0.1 is about to leave: writing a checkpoint and moving" in run(script, place).notes


def test_places_of_the_attempt_before_are_waited_for(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a moment: a larger mesh that does not come free is not."""
    script = Script(monkeypatch, (5, LOST), "finished")
    monkeypatch.setattr(script, "nodes", lambda: [Node("n1", "10.0.0.1", 4 if script.clock in (0, 5) else 2, 4)])
    run(script, place)
    assert script.workers == [4, 4]
    script = Script(monkeypatch, (5, LOST), "finished")
    monkeypatch.setattr(script, "nodes", lambda: [Node("n1", "10.0.0.1", 2 if script.workers else 4, 4)])
    run(script, place, "run.name=other")
    assert script.workers == [4, 2]
    assert 15 < script.clock < 17


def test_a_cluster_that_is_too_small_or_busy(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(monkeypatch, places=3)
    with pytest.raises(ValueError, match=r"workers=4 want a CPU each, and Ray has 3 CPUs .* use workers=3 or fewer"):
        run(script, place)
    assert 59 < script.clock < 62
    script = Script(monkeypatch)
    monkeypatch.setattr(script, "nodes", lambda: [Node("n1", "10.0.0.1", 1, 4)])
    with pytest.raises(RunFailed, match=r"no room within 60 s: workers=4 want a CPU each; 1 of 4 CPUs on 1 node"):
        run(script, place, "run.name=busy")
    script = Script(monkeypatch, "finished", places=[3] * 20 + [4])
    heard = run(script, place, "run.name=late")
    assert script.asked == [4, 0], "an autoscaler is told what is missing, and when it no longer is"
    assert heard.notes[0].startswith(
        "workers=4 want a CPU each, and Ray has 3 CPUs and 0 GPUs on 1 node: waiting up to"
    )
    script = Script(monkeypatch, "finished", places=3)
    run(script, place, "run.name=continued", elastic=True)
    assert script.workers == [2]
