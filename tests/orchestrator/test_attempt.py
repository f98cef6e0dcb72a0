"""When a run is taken to hang, with scripted workers; test_cluster.py stops real ones."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from longstride.orchestrator import attempt as module
from longstride.orchestrator.attempt import Crew
from longstride.orchestrator.failures import RunFailed
from longstride.orchestrator.stopping import StopRequest
from longstride.workers import Summary
from longstride.workers.reporting import Silent

SUMMARY = Summary("run", "runs/run", 9, 9, 1, True, 1.0, None, 1.0)


class Method:
    """An actor's method. Its answer is there from `when` on, in seconds from now."""

    def __init__(self, answer: Callable[[], Any], when: float = 0.0) -> None:
        self.answer, self.when = answer, when

    def remote(self, *_: Any) -> Method:
        return Method(self.answer, time.monotonic() + self.when)


class Ray:
    """`wait` and `get` for them."""

    def wait(self, references: list[Method], num_returns: int, timeout: float) -> tuple[list[Method], list[Method]]:
        time.sleep(0.01)
        ready = [reference for reference in references if reference.when <= time.monotonic()]
        return ready, [reference for reference in references if reference not in ready]

    def get(self, references: Method | list[Method], timeout: float | None = None) -> Any:
        if isinstance(references, list):
            return [self.get(reference, timeout) for reference in references]
        wait = max(0.0, references.when - time.monotonic())
        if timeout is not None and wait > timeout:
            raise module.GetTimeoutError
        time.sleep(wait)
        return references.answer()


class Scripted:
    """A worker whose training takes so many seconds, without a report; `silent`: what it says of its last progress."""

    def __init__(self, seconds: float, silent: Callable[[], float], answers: bool = True) -> None:
        self.training = Method(lambda: SUMMARY, seconds)
        self.reports = Method(list, 0.02)
        self.silent_seconds = Method(silent, 0.0 if answers else 60.0)
        self.stacks = Method(lambda: "in a wait", 0.0 if answers else 60.0)


def listen(workers: list[Scripted], monkeypatch: pytest.MonkeyPatch, hang_seconds: float = 0.2) -> Summary:
    monkeypatch.setattr(module, "ray", Ray())
    monkeypatch.setattr(module, "ANSWER_SECONDS", 0.1)
    nowhere: Any = None
    crew = Crew(nowhere, workers, [f"process {rank}" for rank in range(len(workers))])
    answers: Any = [worker.training.remote() for worker in workers]
    return crew._listen(answers, Silent(), StopRequest(), lambda: None, hang_seconds)


def test_work_between_steps_is_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that gets on is enough: the other waits for it."""
    workers = [Scripted(1.0, lambda: 10.0), Scripted(1.0, lambda: 0.05)]
    assert listen(workers, monkeypatch) == SUMMARY
    assert listen([Scripted(0.5, lambda: 10.0)], monkeypatch, hang_seconds=0.0) == SUMMARY, "0: never"


def test_it_is_one_once_nobody_gets_on(monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    workers = [Scripted(60.0, lambda: max(0.0, time.monotonic() - began - 0.5)), Scripted(60.0, lambda: 10.0)]
    with pytest.raises(RunFailed, match=r"no step for \d+ s: all workers answer, and wait") as caught:
        listen(workers, monkeypatch)
    assert 0.6 < time.monotonic() - began < 20, "not before the last progress was long ago"
    assert caught.value.retry and "in a wait" in caught.value.details


def test_one_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the other may still be writing what it had to write."""
    workers = [Scripted(60.0, lambda: 0.0), Scripted(60.0, lambda: 0.0, answers=False)]
    with pytest.raises(RunFailed, match=r"worker 1 \(process 1\) does not answer"):
        listen(workers, monkeypatch)
