"""Carries what rank 0 reports to the driver, without either waiting for the other longer than it says."""

from __future__ import annotations

import threading
from typing import Any

from ..workers import Reporter, RunStart, Summary
from ..workers.metrics import StepRecord

# The name of a Reporter's method, and its argument.
Report = tuple[str, Any]


class Outbox:
    """Reports in the order they were put, numbered from 0, kept until the reader says it has them.

    One thread puts, another takes. When a reply goes astray nothing is lost: the reader asks again with its number.
    """

    def __init__(self) -> None:
        self._reports: list[Report] = []
        self._first = 0
        self._closed = False
        self._changed = threading.Condition()

    def put(self, report: Report) -> None:
        with self._changed:
            self._reports.append(report)
            self._changed.notify_all()

    def close(self) -> None:
        """No more reports will come: readers stop waiting."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def take(self, after: int, wait: float) -> list[Report]:
        """Reports from number `after` on, those before it dropped; waits up to `wait` seconds for the first."""
        with self._changed:
            drop = after - self._first
            if drop > 0:
                del self._reports[:drop]
                self._first = after
            self._changed.wait_for(lambda: bool(self._reports) or self._closed, timeout=wait)
            return list(self._reports)


class OutboxReporter:
    """A Reporter that puts everything into an outbox, from which `replay` plays it to another."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox

    def started(self, start: RunStart) -> None:
        self._outbox.put(("started", start))

    def stepped(self, record: StepRecord) -> None:
        self._outbox.put(("stepped", record))

    def noted(self, message: str) -> None:
        self._outbox.put(("noted", message))

    def finished(self, summary: Summary) -> None:
        self._outbox.put(("finished", summary))


def replay(report: Report, reporter: Reporter) -> None:
    """Tells `reporter` what was reported elsewhere."""
    method, argument = report
    getattr(reporter, method)(argument)
