"""The pieces of the orchestrator that need no cluster: faults, reports, signals, placement rules, tables."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from longstride.orchestrator import cluster, launcher
from longstride.orchestrator.cluster import Resources, choose_device
from longstride.orchestrator.failures import Fault, RunFailed, Terminated, is_mistake, one_line, raise_fault, root_cause
from longstride.orchestrator.records import Outbox
from longstride.orchestrator.stopping import (
    ECHO_SECONDS,
    STOPPING,
    StopRequest,
    postponed,
    stoppable,
    terminable,
    undisturbed,
)
from longstride.orchestrator.tables import amount_of_bytes, columns

ECHO = Fault(0, "RuntimeError", "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:31416")
BUG = Fault(1, "IndexError", "list index out of range", "Traceback ...")
DEATH = Fault(2, "died", "died: killed from outside (out of memory?) or crashed")
MISTAKE = Fault(3, "ConfigError", "no such corpus", mistake=True)
PLACES = [f"process {rank}" for rank in range(4)]


def test_the_cause_is_told_from_its_echoes() -> None:
    assert root_cause([ECHO, BUG]) is BUG
    assert root_cause([ECHO, BUG, DEATH]) is DEATH
    assert root_cause([ECHO]) is ECHO
    with pytest.raises(RunFailed, match=r"^worker 2 \(process 2\) died: killed") as caught:
        raise_fault([ECHO, DEATH], PLACES)
    assert "\n" not in str(caught.value)
    with pytest.raises(RunFailed, match=r"^worker 1 \(process 1\) failed: IndexError: list index") as caught:
        raise_fault([ECHO, BUG], PLACES)
    assert caught.value.details == "Traceback ..."
    with pytest.raises(ValueError, match=r"^no such corpus$"):
        raise_fault([MISTAKE, ECHO], PLACES)


def test_messages_for_the_user_stand_as_they_are() -> None:
    with pytest.raises(RunFailed, match=r"^the loss is nan$"):
        raise_fault([Fault(0, "TrainingError", "the loss is nan")], PLACES)


def test_what_a_user_can_put_right() -> None:
    missing = FileNotFoundError(2, "No such file or directory", "a.yaml")
    assert is_mistake(missing)
    assert one_line(missing) == "a.yaml: no such file or directory"
    assert is_mistake(ValueError("bad"))
    assert not is_mistake(ConnectionResetError(104, "Connection reset by peer"))
    assert not is_mistake(KeyError("x"))
    assert one_line(ValueError("two\nlines")) == "two lines"


def test_reports_arrive_in_order_and_again_when_a_reply_is_lost() -> None:
    outbox = Outbox()
    outbox.put(("noted", "a"))
    outbox.put(("noted", "b"))
    assert outbox.take(0, 0) == outbox.take(0, 0) == [("noted", "a"), ("noted", "b")]
    outbox.put(("noted", "c"))
    assert outbox.take(2, 0) == [("noted", "c")]
    assert outbox.take(3, 0) == []


def test_a_reader_waits_for_a_report_but_not_for_a_closed_outbox() -> None:
    outbox = Outbox()
    timer = threading.Timer(0.1, outbox.put, [("noted", "late")])
    timer.start()
    assert outbox.take(0, 10) == [("noted", "late")]
    outbox.close()
    began = time.monotonic()
    assert outbox.take(1, 10) == []
    assert time.monotonic() - began < 5


def test_the_second_signal_ends_what_the_first_only_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    now = [100.0]
    monkeypatch.setattr("longstride.orchestrator.stopping.time.monotonic", lambda: now[0])
    told: list[str] = []
    request = StopRequest(told.append)
    with stoppable(request):
        signal.raise_signal(signal.SIGINT)
        assert request.event.is_set()
        signal.raise_signal(signal.SIGINT)  # a launcher's echo
        assert told == [STOPPING]
        now[0] += ECHO_SECONDS + 1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert request.exit_code == 130
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(("warning", "code"), [(signal.SIGUSR1, 138), (signal.SIGHUP, 129)])
def test_a_warning_asks_for_the_end_and_never_makes_it(
    warning: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm's or a closed terminal's, however often it comes; SIGTERM after it is the second signal."""
    now = [100.0]
    monkeypatch.setattr("longstride.orchestrator.stopping.time.monotonic", lambda: now[0])
    before = signal.signal(warning, signal.SIG_DFL)  # the tests may run under nohup
    try:
        request = StopRequest()
        with stoppable(request):
            signal.raise_signal(warning)
            assert request.event.is_set()
            assert request.exit_code == code
            now[0] += ECHO_SECONDS + 1
            signal.raise_signal(warning)
            with pytest.raises(Terminated):
                signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(warning, before)


def test_a_closed_terminal_does_not_reach_what_nohup_started() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        request = StopRequest()
        with terminable(), stoppable(request):
            signal.raise_signal(signal.SIGHUP)
        assert not request.event.is_set()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_waits_for_what_cannot_be_left_half_made() -> None:
    reached = False
    with pytest.raises(Terminated), postponed():
        signal.raise_signal(signal.SIGTERM)
        reached = True
    assert reached
    with undisturbed():
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(Terminated), terminable():
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(
    ("there", "local", "workers", "device"),
    [
        (Resources(1, 8, 0), True, 8, "cpu"),
        (Resources(2, 8, 8), False, 8, "cuda"),
        (Resources(1, 8, 1), True, 1, "cuda"),
        (Resources(1, 8, 1), True, 2, "cpu"),  # a laptop with one GPU runs the two-worker example
    ],
)
def test_devices(there: Resources, local: bool, workers: int, device: str) -> None:
    assert choose_device(workers, there, local) == device


@pytest.mark.parametrize(
    ("there", "local", "workers", "words"),
    [
        (Resources(1, 8, 0), True, 9, "8 CPUs and 0 GPUs on 1 node"),
        (Resources(3, 12, 0), False, 13, "12 CPUs and 0 GPUs on 3 nodes"),
        (Resources(2, 96, 8), False, 16, "96 CPUs and 8 GPUs on 2 nodes: use workers=8 or fewer"),
    ],
)
def test_more_workers_than_there_is_room_for(there: Resources, local: bool, workers: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        choose_device(workers, there, local)


def test_a_launcher_sets_the_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert launcher.present()
    assert launcher.with_workers(["seed=1"]) == ["seed=1", "workers=4"]
    assert launcher.with_workers(["workers=4"])[-1] == "workers=4"
    with pytest.raises(ValueError, match="workers=2, but the launcher started 4 processes"):
        launcher.with_workers(["workers=2"])


def test_environment_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGSTRIDE_TEST_A", "before")
    monkeypatch.delenv("LONGSTRIDE_TEST_B", raising=False)
    import os

    with cluster._environment({"LONGSTRIDE_TEST_A": None, "LONGSTRIDE_TEST_B": "inside"}):
        assert os.environ.get("LONGSTRIDE_TEST_A") is None
        assert os.environ["LONGSTRIDE_TEST_B"] == "inside"
    assert os.environ["LONGSTRIDE_TEST_A"] == "before"
    assert "LONGSTRIDE_TEST_B" not in os.environ


def test_tables() -> None:
    assert columns(("A", "LONG"), [("x", "y"), ("wide", "z")]) == "A     LONG\nx     y\nwide  z"
    assert [amount_of_bytes(count) for count in (0, 1023, 1536, 5 * 2**40)] == ["0 B", "1023 B", "1.5 KiB", "5.0 TiB"]
